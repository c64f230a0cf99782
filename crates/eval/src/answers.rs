//! Every answer to a question, one row each: `eval/answers.parquet`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{BooleanArray, Float64Array, StringArray, UInt32Array};
use pkv_tasks::Squad;
use serde::{Deserialize, Serialize};

use crate::bench::{BenchAnswer, BenchAsked};
use crate::cell::Cell;
use crate::columns::write_columns;

/// One answer to one question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Decoded text; the wanted one where it was given exactly.
    pub text: String,
    pub correct: bool,
    /// KL(full || pruned), summed over the wanted tokens, nats.
    pub kl: f64,
    /// Wanted tokens whose most likely token differs from the full cache's.
    pub flipped: u32,
    /// Wanted tokens: the answer's, and the stop token.
    pub tokens: u32,
}

/// A question as it was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    pub question: String,
    pub wanted: String,
}

impl Answer {
    /// Exact match and token F1.
    pub fn squad(&self, asked: &Asked) -> Squad {
        Squad::of(&self.text, [asked.wanted.as_str()])
    }
}

/// Rows of the file, in order.
#[derive(Default)]
pub struct AnswerTable {
    task: Vec<String>,
    context: Vec<u32>,
    question: Vec<u32>,
    question_text: Vec<String>,
    method: Vec<&'static str>,
    policy: Vec<Option<&'static str>>,
    ratio: Vec<f64>,
    gold: Vec<String>,
    answer: Vec<String>,
    correct: Vec<bool>,
    score: Vec<f64>,
    exact_match: Vec<Option<f64>>,
    f1: Vec<Option<f64>>,
    kl: Vec<f64>,
    flipped: Vec<u32>,
    tokens: Vec<u32>,
    context_id: Vec<String>,
    /// Of the rows to come.
    current: String,
}

impl AnswerTable {
    /// The rows that follow belong to the context with this [`crate::columns::context_id`].
    pub fn of_context(&mut self, id: &str) {
        id.clone_into(&mut self.current);
    }

    /// Add an answer to a planted fact; `place` is context and question, no cell is the full cache.
    pub fn push(
        &mut self,
        task: &str,
        place: (usize, usize),
        asked: &Asked,
        cell: Option<&Cell>,
        a: &Answer,
    ) {
        let answer = BenchAnswer {
            text: a.text.clone(),
            score: f64::from(a.correct),
            kl: a.kl,
            flipped: a.flipped,
            tokens: a.tokens,
            squad: Some(a.squad(asked)),
        };
        self.row(task, place, &asked.question, asked.wanted.clone(), cell, &answer);
    }

    /// Add an answer to a benchmark's turn; several wanted answers are written as a JSON list.
    pub fn push_benchmark(
        &mut self,
        task: &str,
        place: (usize, usize),
        asked: &BenchAsked,
        cell: Option<&Cell>,
        a: &BenchAnswer,
    ) {
        let gold = match asked.wanted.as_slice() {
            [one] => one.clone(),
            several => serde_json::json!(several).to_string(),
        };
        self.row(task, place, &asked.question, gold, cell, a);
    }

    pub fn is_empty(&self) -> bool {
        self.task.is_empty()
    }

    fn row(
        &mut self,
        task: &str,
        (context, question): (usize, usize),
        question_text: &str,
        gold: String,
        cell: Option<&Cell>,
        a: &BenchAnswer,
    ) {
        self.task.push(task.to_owned());
        self.context.push(context as u32);
        self.question.push(question as u32);
        self.question_text.push(question_text.to_owned());
        self.method.push(cell.map_or("full", |c| c.method.name()));
        self.policy.push(cell.map(|c| c.policy.name()));
        self.ratio.push(cell.map_or(1.0, |c| c.ratio.get()));
        self.gold.push(gold);
        self.answer.push(a.text.clone());
        self.correct.push(a.score == 1.0);
        self.score.push(a.score);
        self.exact_match.push(a.squad.map(|s| s.exact));
        self.f1.push(a.squad.map(|s| s.f1));
        self.kl.push(a.kl);
        self.flipped.push(a.flipped);
        self.tokens.push(a.tokens);
        self.context_id.push(self.current.clone());
    }

    /// Write the file, whole or not at all; zstd, the same bytes for the same answers.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(self, path: &Path) -> Result<()> {
        write_columns(
            path,
            vec![
                ("task", false, Arc::new(StringArray::from(self.task))),
                ("context", false, Arc::new(UInt32Array::from(self.context))),
                ("question", false, Arc::new(UInt32Array::from(self.question))),
                ("question_text", false, Arc::new(StringArray::from(self.question_text))),
                ("method", false, Arc::new(StringArray::from(self.method))),
                ("policy", true, Arc::new(StringArray::from(self.policy))),
                ("ratio", false, Arc::new(Float64Array::from(self.ratio))),
                ("gold", false, Arc::new(StringArray::from(self.gold))),
                ("answer", false, Arc::new(StringArray::from(self.answer))),
                ("correct", false, Arc::new(BooleanArray::from(self.correct))),
                ("score", false, Arc::new(Float64Array::from(self.score))),
                ("exact_match", true, Arc::new(Float64Array::from(self.exact_match))),
                ("f1", true, Arc::new(Float64Array::from(self.f1))),
                ("kl", false, Arc::new(Float64Array::from(self.kl))),
                ("flipped", false, Arc::new(UInt32Array::from(self.flipped))),
                ("answer_tokens", false, Arc::new(UInt32Array::from(self.tokens))),
                ("context_id", false, Arc::new(StringArray::from(self.context_id))),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::Columns;
    use pkv_core::{Policy, RetentionRatio};
    use pkv_recipe::MethodName;

    #[test]
    fn answers_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.parquet");
        let asked = Asked { question: "Who?".to_owned(), wanted: "Ann".to_owned() };
        let answer =
            |text: &str, correct| Answer { text: text.to_owned(), correct, kl: 0.5, flipped: 1, tokens: 3 };
        let cell = Cell {
            method: MethodName::SNAPKV,
            policy: Policy::PairUniform,
            ratio: RetentionRatio::new(0.05).unwrap(),
        };
        let mut table = AnswerTable::default();
        table.of_context("c0ffee");
        table.push("facts", (2, 1), &asked, None, &answer("Ann", true));
        table.push("facts", (2, 1), &asked, Some(&cell), &answer("Bob", false));
        table.write(&path).unwrap();
        let read = Columns::read(&path).unwrap();
        assert_eq!(read.text("method").unwrap(), ["full", "snapkv"]);
        assert_eq!(read.text("policy").unwrap(), ["", "pair-uniform"]);
        assert_eq!(read.text("answer").unwrap(), ["Ann", "Bob"]);
        assert_eq!(read.text("context_id").unwrap(), ["c0ffee", "c0ffee"]);
        assert_eq!(read.numbers("ratio").unwrap(), [1.0, 0.05]);
        assert_eq!(read.numbers("score").unwrap(), [1.0, 0.0]);
        assert_eq!(read.numbers("exact_match").unwrap(), [1.0, 0.0]);
        assert_eq!(read.numbers("f1").unwrap(), [1.0, 0.0]);
        assert_eq!(read.counts("question").unwrap(), [1, 1]);
        assert!(read.has("gold") && !read.has("nonsense"));
        assert!(read.text("ratio").is_err() && Columns::read(&dir.path().join("absent")).is_err());
    }
}
