//! Tasks that are asked of pruned caches: one interface for planted facts, continuations and all benchmarks.
//!
//! A [`Task`] has contexts, and each context has questions, or a continuation that is read. A question
//! defines the right answer ([`Right`]) and the score of an answer. Prefill, pruning, asking and storing are
//! left to `evaluate`, summaries to `answered` and `perplexity`.
//!
//! A new benchmark needs no file here: it is a suite of `pkv-tasks`, which `benchmark` turns into tasks.

mod benchmark;
mod facts;

use anyhow::Result;
use pkv_results::Timing;
use pkv_results::answered::{Answer, AnswersOutcome, Asked};
use pkv_results::cell::Cell;
use pkv_results::columns::context_id;
use pkv_results::store::{About, Outcome};
use pkv_shard::Example;
use pkv_tasks::Squad;
use pkv_text::TextTokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Kind;

use crate::asking::Asking;
use crate::context::PrunedContext;
use crate::perplexity::{self, PerplexityOutcome};

pub use benchmark::BenchmarkTask;
pub use facts::Facts;

/// One task of an evaluation.
pub trait Task {
    fn info(&self) -> TaskInfo;

    /// Context number `index`; `None` if there is nothing to ask of it.
    ///
    /// # Errors
    /// It cannot be made or encoded.
    fn context(&self, index: usize, from: &Texts) -> Result<Option<TaskContext<'_>>>;
}

/// Data of a task that is known before its contexts.
pub struct TaskInfo {
    /// Its name, and what summing up its outcomes needs.
    pub about: About,
    /// Choices that its numbers depend on, beside those of every task and of `about`.
    pub settings: Value,
    pub contexts: usize,
    /// Name of its contexts, for the progress bar.
    pub what: String,
    /// Name of its questions in the table of times.
    pub timed: String,
}

/// Inputs from which contexts are made.
pub struct Texts<'a> {
    pub tokenizer: &'a TextTokenizer,
    /// The test example of that number, with its row.
    pub test_example: &'a dyn Fn(usize) -> Result<(u64, Example)>,
}

/// A context, and what is asked of its cache.
pub struct TaskContext<'a> {
    pub tokens: Vec<u32>,
    /// Whether its middle was cut out.
    pub cut: bool,
    /// Number of its random draws.
    pub draw: u64,
    pub asks: Asks<'a>,
}

/// Work that follows a context.
pub enum Asks<'a> {
    Questions(Vec<Question<'a>>),
    /// Tokens whose likelihood is measured; the first is read and not counted.
    Continuation(Vec<u32>),
}

/// One question, and what an answer to it is worth.
pub struct Question<'a> {
    /// Tokens read after the context.
    pub prompt: Vec<u32>,
    pub right: Right,
    /// Tokens that an answer may have.
    pub max_tokens: usize,
    /// As it is stored.
    pub asked: Asked,
    pub score: Score<'a>,
}

/// The answer along which drift is measured; another one is decoded.
pub enum Right {
    Answer {
        tokens: Vec<u32>,
        text: String,
    },
    /// The full cache's answer.
    FullCache,
}

/// Score in [0, 1], and exact match and F1 where a short answer is wanted; gets the answer's text and whether
/// it is the right one token by token.
pub type Score<'a> = Box<dyn Fn(&str, bool) -> (f64, Option<Squad>) + 'a>;

/// Stored outcome of one context.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TaskOutcome {
    Answers(AnswersOutcome),
    Likelihood(PerplexityOutcome),
}

impl TaskOutcome {
    /// Ask the full cache of `context`, and the pruned one of each of `cells`; times are left to the caller.
    ///
    /// # Errors
    /// There is no question, or a forward pass fails.
    pub fn of(
        context: &TaskContext,
        asking: &Asking,
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<Self> {
        Ok(match &context.asks {
            Asks::Questions(questions) => {
                let mut rows = asking.answers(questions, cells, pruned)?;
                // The first row is the full cache's.
                for (row, cell) in rows.iter_mut().skip(1).zip(cells) {
                    note_kept(row, questions, cell, pruned)?;
                }
                let mut rows = rows.into_iter();
                Self::Answers(AnswersOutcome {
                    context_id: context_id(&context.tokens),
                    context_tokens: context.tokens.len(),
                    cut: context.cut,
                    asked: questions.iter().map(|q| q.asked.clone()).collect(),
                    full: rows.next().unwrap_or_default(),
                    cells: cells.iter().copied().zip(rows).collect(),
                    timings: Vec::new(),
                })
            }
            Asks::Continuation(tokens) => {
                Self::Likelihood(perplexity::read(asking.target, tokens, pruned, cells)?)
            }
        })
    }

    pub fn timings(&mut self) -> &mut Vec<Timing> {
        match self {
            Self::Answers(o) => &mut o.timings,
            Self::Likelihood(o) => &mut o.timings,
        }
    }
}

/// Fill in how much of each question's fact `cell` keeps.
fn note_kept(row: &mut [Answer], questions: &[Question], cell: &Cell, pruned: &PrunedContext) -> Result<()> {
    if questions.iter().all(|q| q.asked.fact.is_none()) {
        return Ok(());
    }
    let keep_lht = pruned.keep(cell.method, cell.policy, cell.ratio)?;
    for (answer, question) in row.iter_mut().zip(questions) {
        if let Some((start, len)) = question.asked.fact {
            let of_fact_lht = keep_lht.narrow(2, start.into(), len.into());
            answer.kept = Some(of_fact_lht.mean(Kind::Double).double_value(&[]));
        }
    }
    Ok(())
}

impl Outcome for TaskOutcome {
    fn add(&mut self, new: Self) {
        match (self, new) {
            (Self::Answers(old), Self::Answers(new)) => old.add(new),
            (Self::Likelihood(old), Self::Likelihood(new)) => old.add(new),
            // A task asks the same of a context every time.
            (old, new) => *old = new,
        }
    }
}
