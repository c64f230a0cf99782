//! Every answer to a question, one row each: `eval/answers.parquet`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{BooleanArray, Float64Array, StringArray, UInt32Array};

use crate::answered::{Answer, AnswersOutcome, Asked};
use crate::cell::Cell;
use crate::columns::write_columns;

/// Rows of the file, in order.
#[derive(Default)]
pub struct AnswerTable {
    /// Kind of the planted fact that a question asks for.
    fact_kind: Option<fn(&str) -> Option<&'static str>>,
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
    context_tokens: Vec<u32>,
    /// Kind of planted fact.
    kind: Vec<Option<&'static str>>,
    /// Place of the fact in its context, from 0 at the beginning to 1 at the end.
    depth: Vec<Option<f64>>,
    kept: Vec<Option<f64>>,
    /// Of the rows to come.
    current: (String, usize),
}

impl AnswerTable {
    /// A table without rows; `fact_kind` gives the kind of planted fact that a question asks for.
    pub fn new(fact_kind: fn(&str) -> Option<&'static str>) -> Self {
        Self { fact_kind: Some(fact_kind), ..Self::default() }
    }

    /// The rows that follow belong to the context of `tokens` tokens with this
    /// [`crate::columns::context_id`].
    pub fn of_context(&mut self, id: &str, tokens: usize) {
        self.current = (id.to_owned(), tokens);
    }

    /// Add an answer; `place` is context and question, no cell is the full cache. Several wanted answers are
    /// written as a JSON list.
    pub fn push(
        &mut self,
        task: &str,
        (context, question): (usize, usize),
        asked: &Asked,
        cell: Option<&Cell>,
        a: &Answer,
    ) {
        let gold = match asked.wanted.as_slice() {
            [one] => one.clone(),
            several => serde_json::json!(several).to_string(),
        };
        self.task.push(task.to_owned());
        self.context.push(context as u32);
        self.question.push(question as u32);
        self.question_text.push(asked.question.clone());
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
        let (id, length) = &self.current;
        self.context_id.push(id.clone());
        self.context_tokens.push(*length as u32);
        self.kind.push(asked.fact.zip(self.fact_kind).and_then(|(_, kind)| kind(&asked.question)));
        let depth =
            |(start, len): (u32, u32)| f64::from(start) / length.saturating_sub(len as usize).max(1) as f64;
        self.depth.push(asked.fact.map(depth));
        self.kept.push(a.kept);
    }

    /// Add every answer of a context: question by question, the full cache's and then those of each of
    /// `cells` that it has.
    pub fn push_all(&mut self, task: &str, context: usize, o: &AnswersOutcome, cells: &[Cell]) {
        self.of_context(&o.context_id, o.context_tokens);
        for (q, asked) in o.asked.iter().enumerate() {
            self.push(task, (context, q), asked, None, &o.full[q]);
            for cell in cells {
                let Some(answers) = o.cells.get(cell) else { continue };
                self.push(task, (context, q), asked, Some(cell), &answers[q]);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.task.is_empty()
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
                ("context_tokens", false, Arc::new(UInt32Array::from(self.context_tokens))),
                ("kind", true, Arc::new(StringArray::from(self.kind))),
                ("depth", true, Arc::new(Float64Array::from(self.depth))),
                ("kept", true, Arc::new(Float64Array::from(self.kept))),
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
    use pkv_tasks::Squad;

    #[test]
    fn answers_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.parquet");
        let asked = Asked {
            question: "Who is the owner of the red bell?".to_owned(),
            wanted: vec!["Ann".to_owned()],
            part: String::new(),
            fact: Some((30, 10)),
        };
        let answer = |text: &str, right: bool| Answer {
            text: text.to_owned(),
            score: f64::from(right),
            kl: 0.5,
            flipped: 1,
            tokens: 3,
            squad: Some(Squad::of(text, ["Ann"])),
            kept: (!right).then_some(0.25),
        };
        let cell = Cell {
            method: MethodName::SNAPKV,
            policy: Policy::PairUniform,
            ratio: RetentionRatio::new(0.05).unwrap(),
        };
        let mut table = AnswerTable::new(|question| question.contains("owner").then_some("owner"));
        table.of_context("c0ffee", 70);
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
        assert_eq!(read.text("kind").unwrap(), ["owner", "owner"]);
        assert_eq!(read.optional_numbers("depth").unwrap(), [Some(0.5); 2]);
        assert_eq!(read.optional_numbers("kept").unwrap(), [None, Some(0.25)]);
        assert!(read.has("gold") && !read.has("nonsense"));
        assert!(read.text("ratio").is_err() && Columns::read(&dir.path().join("absent")).is_err());
    }
}
