//! InfiniteBench (arXiv 2402.13718): eight tasks of 88,000 tokens and more, read from its own files.
//!
//! Facts of OpenBMB/InfiniteBench at commit 88b3daa: prompts of `src/prompt.py` (`yarn_mistral_templates`,
//! which its open models get), answer lengths and wanted answers of `src/eval_utils.py`, metrics of
//! `src/compute_scores.py`. The hub keeps one JSON-lines file per task in `xinrongzhang2022/InfiniteBench`:
//! `id`, `context`, `input`, `answer`, `options`.
//!
//! Code.Run, Code.Debug, Math.Calc and En.Dia are left out: each has a metric of its own.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_recipe::EvalSection;
use pkv_recipe::plan::TaskWork;
use serde_json::{Value, json};

use crate::example::{Example, Turn};
use crate::metric::Metric;
use crate::rows;
use crate::suite::{Benchmark, Opening, Suite};

/// InfiniteBench as a suite.
pub struct InfiniteBench;

impl Suite for InfiniteBench {
    fn name(&self) -> &'static str {
        "infinitebench"
    }

    fn tasks(&self) -> Vec<&'static str> {
        TASKS.iter().map(|task| task.name).collect()
    }

    fn open<'a>(&self, from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>> {
        from.of_files(self, &json!({}), |name: &str, files: &[PathBuf], limit| {
            let task = TASKS.iter().find(|task| task.name == name);
            task.expect("it is one of InfiniteBench's names").read(files, limit)
        })
    }

    fn work(&self, section: &EvalSection, named: &[&str]) -> Vec<TaskWork> {
        let work = |task: &Task| {
            let name = format!("{}.{}", self.name(), task.name);
            TaskWork::of_prompts(name, &section.benchmark, task.max_new_tokens)
        };
        TASKS.iter().filter(|t| named.is_empty() || named.contains(&t.name)).map(work).collect()
    }
}

/// A task of InfiniteBench; its name is that of its file.
struct Task {
    name: &'static str,
    max_new_tokens: usize,
    metric: Metric,
    /// The prompt before the context; `{asked}` is what Math.Find asks for.
    before: &'static str,
    /// And after it, with `{input}`.
    after: &'static str,
}

const fn task(
    name: &'static str,
    max_new_tokens: usize,
    metric: Metric,
    before: &'static str,
    after: &'static str,
) -> Task {
    Task { name, max_new_tokens, metric, before, after }
}

/// In the order of the reference's `ALL_TASKS`.
///
/// Differs: Retrieve.KV's value counts wherever the answer has it; the reference wants it as a word. Values
/// are UUIDs, which no other word contains.
#[rustfmt::skip]
const TASKS: [Task; 8] = [
    task("passkey", 6, Metric::FirstNumber,
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information.\n\n",
        "\n\n{input}\n\nThe pass key is"),
    task("number_string", 12, Metric::FirstNumber,
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the important information there.\n\n",
        "\n\n{input}\n\nThe sequence of digits is"),
    task("kv_retrieval", 50, Metric::Contains,
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        "\n\n{input}"),
    task("longbook_sum_eng", 1200, Metric::RougeLsum,
        "Summarize the book below.\n\n",
        "\n\nSummary:"),
    task("longbook_choice_eng", 40, Metric::Choice,
        "Read the book and answer the question.\n\n",
        "\n\nQuestion: {input}\n\nThe letter of the correct answer is"),
    task("longbook_qa_eng", 40, Metric::QaF1,
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "\n\nQuestion: {input}\nAnswer:"),
    task("longbook_qa_chn", 40, Metric::QaF1ZhCharacters,
        "阅读以下书籍然后回答问题。\n\n",
        "\n\n问题：{input}\n答案："),
    task("math_find", 3, Metric::MathFind,
        "What is {asked} in the following list?\n\n",
        "\n\n{input}"),
];

impl Task {
    /// The examples of a task's files, one after the other, at most `limit`.
    fn read(&self, paths: &[PathBuf], limit: usize) -> Result<Vec<Example>> {
        let rows = rows::read_all(paths, limit)?;
        let example = |(i, row): (usize, &rows::Row)| {
            self.example(i, &row.value).with_context(|| {
                hinted(
                    format!("{} is none of InfiniteBench's `{}`", row.place, self.name),
                    "give the files of the hub's xinrongzhang2022/InfiniteBench: each row has `id`, `context`, `input`, \
                     `answer` and `options`",
                )
            })
        };
        rows.iter().take(limit).enumerate().map(example).collect()
    }

    fn example(&self, index: usize, row: &Value) -> Result<Example> {
        // The prompt of a summary has no question.
        let mut input = match self.after.contains("{input}") {
            true => rows::filled(row, "input")?.to_owned(),
            false => String::new(),
        };
        let mut before = self.before.to_owned();
        if self.metric == Metric::MathFind {
            before = before.replace("{asked}", &number_asked_for(&input)?);
        }
        let mut wanted = rows::scalars(row, "answer")?;
        let given = wanted[0].clone();
        if self.metric == Metric::Choice {
            let options = rows::scalars(row, "options")?;
            ensure!(options.len() == 4, "column `options` has {} entries, expected 4", options.len());
            let at = options.iter().position(|option| *option == given);
            let at = at.with_context(|| format!("column `answer` holds {given:?}, none of `options`"))?;
            let letters = ["A", "B", "C", "D"];
            wanted = vec![given.clone(), letters[at].to_owned()];
            for (letter, option) in letters.iter().zip(&options) {
                input.push_str(&format!("\n{letter}. {option}"));
            }
        }
        let turn = Turn {
            question: self.after.replace("{input}", &input),
            answer_prefix: String::new(),
            given,
            wanted,
            others: Vec::new(),
            metric: self.metric,
            max_new_tokens: self.max_new_tokens,
            first_line: false,
            part: self.name.to_owned(),
        };
        turn.check_form("answer")?;
        Ok(Example {
            id: row.get("id").map_or_else(|| format!("{}-{index}", self.name), rows::spell),
            context: format!("{before}{}", rows::filled(row, "context")?),
            turns: vec![turn],
            conversation: false,
            chat: false,
        })
    }
}

/// `The largest number of the list is` asks for `the largest number`.
fn number_asked_for(input: &str) -> Result<String> {
    let line = input.lines().find_map(|line| {
        let start = line.find("The ")?;
        // `The .+ of`: greedy, with at least one character between.
        let end = line.rfind(" of").filter(|end| *end > start + 4)?;
        Some(line[start..end].to_lowercase())
    });
    line.with_context(|| format!("column `input` holds {input:?}, expected `The ... of`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, rows: &[Value]) -> Result<Vec<Example>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{name}.jsonl"));
        std::fs::write(&path, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).unwrap();
        TASKS.iter().find(|task| task.name == name).unwrap().read(&[path], 10)
    }

    fn row(input: &str, answer: &Value) -> Value {
        json!({"id": 3, "context": "C {input}", "input": input, "answer": answer, "options": []})
    }

    fn prompt(example: &Example) -> String {
        format!("{}{}", example.context, example.turns[0].question)
    }

    #[test]
    fn rows_become_the_prompts_of_the_reference() {
        let of =
            |name: &str, input: &str, answer: Value| read(name, &[row(input, &answer)]).unwrap().remove(0);
        let key = of("passkey", "What is the pass key?", json!(["71432"]));
        assert!(prompt(&key).ends_with("\n\nC {input}\n\nWhat is the pass key?\n\nThe pass key is"));
        let turn = &key.turns[0];
        assert_eq!((key.id.as_str(), key.chat, turn.max_new_tokens), ("3", false, 6));
        assert_eq!((turn.score(" 71432."), turn.score("714321"), turn.score("none")), (1.0, 0.0, 0.0));

        let find = of("math_find", "Only one number. The largest number of the list is: ", json!([88]));
        assert_eq!(
            prompt(&find),
            "What is the largest number in the following list?\n\nC {input}\n\nOnly one number. The largest number of the list is: "
        );
        assert_eq!((find.turns[0].score("88\n\nThe"), find.turns[0].score("8")), (1.0, 0.0));

        let sum = of("longbook_sum_eng", "", json!(["The cat sat. The dog ran."]));
        assert_eq!(prompt(&sum), "Summarize the book below.\n\nC {input}\n\nSummary:");
        assert_eq!(sum.turns[0].score("The cat sat. The dog ran."), 1.0);

        let kv = of("kv_retrieval", "Key: \"a\"", json!("5e6b7b90-710d"));
        assert_eq!(kv.turns[0].score("\"5e6b7b90-710d\""), 1.0);
        let qa = of("longbook_qa_eng", "Who?", json!(["a red fox", "Reynard"]));
        assert_eq!((qa.turns[0].score("Reynard."), qa.turns[0].score("The red dog")), (1.0, 0.5));
        let chinese = of("longbook_qa_chn", "谁？", json!(["胡一刀"]));
        assert!(
            prompt(&chinese).ends_with("\n\n问题：谁？\n答案：") && chinese.turns[0].score("胡一刀。") == 1.0
        );
    }

    #[test]
    fn a_choice_has_its_options_and_counts_by_text_or_letter() {
        let mut row = row("Who?", &json!(["Bo"]));
        row["options"] = json!(["Al", "Bo", "Cy", "Di"]);
        let made = read("longbook_choice_eng", std::slice::from_ref(&row)).unwrap();
        let turn = &made[0].turns[0];
        assert_eq!(
            turn.question,
            "\n\nQuestion: Who?\nA. Al\nB. Bo\nC. Cy\nD. Di\n\nThe letter of the correct answer is"
        );
        assert_eq!((turn.score(" B"), turn.score("Bo"), turn.score("C. Bo")), (1.0, 1.0, 0.0));
        // Some rows name the letter, too.
        row["answer"] = json!(["Bo", "B"]);
        assert_eq!(read("longbook_choice_eng", &[row]).unwrap()[0].turns[0].wanted, ["Bo", "B"]);
    }

    #[test]
    fn rows_that_do_not_fit_are_named() {
        let fits = json!({"id": 1, "context": "C", "input": "The sum of it", "answer": ["3"], "options": ["3", "4", "5", "6"]});
        for task in &TASKS {
            assert_eq!(read(task.name, std::slice::from_ref(&fits)).unwrap().len(), 1, "{}", task.name);
            let mut wrong = vec![("context", json!("")), ("answer", json!([])), ("answer", json!([null]))];
            if task.after.contains("{input}") {
                wrong.push(("input", json!(" ")));
            }
            match task.metric {
                Metric::FirstNumber => wrong.push(("answer", json!(["none"]))),
                Metric::MathFind => {
                    wrong.extend([("answer", json!(["x"])), ("input", json!("Which number?"))])
                }
                Metric::Choice => wrong.extend([("options", json!(["3"])), ("answer", json!(["7"]))]),
                _ => {}
            }
            for (column, value) in wrong {
                let mut row = fits.clone();
                row[column] = value.clone();
                let error = read(task.name, &[fits.clone(), row])
                    .err()
                    .unwrap_or_else(|| panic!("{}: {column} = {value} was accepted", task.name));
                let text = format!("{error:#}");
                assert!(text.contains("row 2 of `") && text.contains(&format!("column `{column}")), "{text}");
            }
        }
    }
}
