//! The 21 tasks of LongBench: prompts, room for answers, metrics.
//!
//! Facts of THUDM/LongBench at commit 2e00731: prompts of `LongBench/config/dataset2prompt.json`, answer
//! lengths of `dataset2maxlen.json`, metrics of `LongBench/eval.py`, chat templates and first lines of
//! `pred.py` and `eval.py`.

use super::Task;
use crate::metric::Metric;

/// Asked in the model's chat template.
const fn task(
    name: &'static str,
    max_new_tokens: usize,
    metric: Metric,
    before: &'static str,
    after: &'static str,
) -> Task {
    Task { name, before, after, max_new_tokens, metric, chat: true, first_line: false }
}

/// A list of examples to continue: no template, and the first line is the answer.
const fn few_shot(task: Task) -> Task {
    Task { chat: false, first_line: true, ..task }
}

/// Code to continue: no template.
const fn code(name: &'static str, before: &'static str, after: &'static str) -> Task {
    Task { chat: false, ..task(name, 64, Metric::CodeSimilarity, before, after) }
}

/// In the order of the paper's tables.
#[rustfmt::skip]
pub(super) const TASKS: [Task; 21] = [
    task("narrativeqa", 128, Metric::QaF1,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: ",
        "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"),
    task("qasper", 128, Metric::QaF1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: ",
        "\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"),
    task("multifieldqa_en", 64, Metric::QaF1,
        "Read the following text and answer briefly.\n\n",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"),
    task("multifieldqa_zh", 64, Metric::QaF1Zh,
        "阅读以下文字并用中文简短回答：\n\n",
        "\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答："),
    task("hotpotqa", 32, Metric::QaF1,
        "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n",
        "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"),
    task("2wikimqa", 32, Metric::QaF1,
        "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n",
        "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"),
    task("musique", 32, Metric::QaF1,
        "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n",
        "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"),
    task("dureader", 128, Metric::RougeLZh,
        "请基于给定的文章回答下述问题。\n\n文章：",
        "\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："),
    task("gov_report", 512, Metric::RougeL,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:"),
    task("qmsum", 512, Metric::RougeL,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\n",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"),
    task("multi_news", 512, Metric::RougeL,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:"),
    task("vcsum", 512, Metric::RougeLZh,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n",
        "\n\n会议总结："),
    few_shot(task("trec", 64, Metric::Classification,
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\n{input}")),
    few_shot(task("triviaqa", 32, Metric::QaF1,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\n",
        "\n\n{input}")),
    few_shot(task("samsum", 128, Metric::RougeL,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n{input}")),
    few_shot(task("lsht", 64, Metric::Classification,
        "请判断给定新闻的类别，下面是一些例子。\n\n",
        "\n{input}")),
    task("passage_count", 32, Metric::Count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "),
    task("passage_retrieval_en", 32, Metric::Retrieval,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n",
        "\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: "),
    task("passage_retrieval_zh", 32, Metric::RetrievalZh,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n",
        "\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是："),
    code("lcc",
        "Please complete the code given below. \n",
        "Next line of code:\n"),
    code("repobench-p",
        "Please complete the code given below. \n",
        "{input}Next line of code:\n"),
];
