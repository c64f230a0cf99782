//! A task of a standard benchmark, tokenized. Drift is measured along the full cache's own answer, because
//! the right answer need not be unique. Scores of answers are defined by `pkv-tasks`.

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_results::answered::Asked;
use pkv_results::store::About;
use pkv_tasks::{Benchmark, Example, Turn, cut_middle};
use pkv_text::TextTokenizer;
use serde_json::json;

use super::{Asks, Question, Right, Task, TaskContext, TaskInfo, Texts};

/// One [`Benchmark`] as a task of the evaluation.
pub struct BenchmarkTask<'a>(pub &'a Benchmark<'a>);

impl Task for BenchmarkTask<'_> {
    fn info(&self) -> TaskInfo {
        let Benchmark { suite, task, .. } = self.0;
        TaskInfo {
            about: About::Benchmark { suite: (*suite).to_owned(), name: task.clone() },
            settings: json!(self.0.identity),
            contexts: self.0.examples,
            what: format!("contexts of {suite}.{task}"),
            timed: format!("{suite}: questions"),
        }
    }

    fn context(&self, index: usize, texts: &Texts) -> Result<Option<TaskContext<'_>>> {
        let example = (self.0.example)(index)?;
        let Tokenized { context, cut, prompts } = tokenize(&example, self.0.prompt_tokens, texts.tokenizer)?;
        let question = |(turn, prompt): (Turn, Vec<u32>)| Question {
            prompt,
            right: Right::FullCache,
            max_tokens: turn.max_new_tokens,
            asked: Asked {
                question: turn.question.clone(),
                wanted: turn.wanted.clone(),
                part: turn.part.clone(),
                fact: None,
            },
            score: Box::new(move |text, _| (turn.score(text), turn.squad(text))),
        };
        let questions = example.turns.into_iter().zip(prompts).map(question).collect();
        let asks = Asks::Questions(questions);
        Ok(Some(TaskContext { tokens: context, cut, draw: index as u64, asks }))
    }
}

/// An example in tokens, ready to be read.
struct Tokenized {
    context: Vec<u32>,
    cut: bool,
    /// Per turn: what is read after the context.
    prompts: Vec<Vec<u32>>,
}

/// Tokenize an example; of a prompt above `prompt_tokens` the middle is cut out of the context.
///
/// # Errors
/// A text cannot be encoded, nothing of the context is left, or it is a conversation and the chat template
/// takes none.
fn tokenize(e: &Example, prompt_tokens: Option<usize>, tokenizer: &TextTokenizer) -> Result<Tokenized> {
    let mut context = tokenizer.encode(&e.context)?;
    let mut prompts: Vec<Vec<u32>> = Vec::with_capacity(e.turns.len());
    for (i, turn) in e.turns.iter().enumerate() {
        let mut prompt = Vec::new();
        if e.conversation && i > 0 {
            prompt.extend(&prompts[i - 1]);
            prompt.extend(tokenizer.encode(&e.turns[i - 1].given)?);
            prompt.extend(tokenizer.turn().with_context(|| {
                hinted(
                    format!(
                        "example `{}` is a conversation, which the model's chat template does not take",
                        e.id
                    ),
                    "set `eval.benchmark.scbench_mode` to `multi-request`",
                )
            })?);
        }
        prompt.extend(tokenizer.encode(&turn.question)?);
        if e.chat {
            prompt.extend(tokenizer.switch());
        }
        prompt.extend(tokenizer.encode(&turn.answer_prefix)?);
        ensure!(!prompt.is_empty(), "turn {} of example `{}` asks nothing", i + 1, e.id);
        prompts.push(prompt);
    }
    let mut cut = false;
    if let Some(most) = prompt_tokens {
        let after = prompts.iter().map(Vec::len).max().unwrap_or(0);
        cut = cut_middle(&mut context, after, most);
    }
    ensure!(
        !context.is_empty(),
        hinted(
            format!("the questions of example `{}` leave no room for its context", e.id),
            "raise `eval.benchmark.prompt_tokens`"
        )
    );
    Ok(Tokenized { context, cut, prompts })
}
