//! Every answer to a question, one row each: `eval/answers.parquet`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use arrow::array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use pkv_shard::durable::{WriteBudget, write_file};
use serde::{Deserialize, Serialize};

use crate::bench::{BenchAnswer, BenchAsked};
use crate::cell::Cell;

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
    kl: Vec<f64>,
    flipped: Vec<u32>,
    tokens: Vec<u32>,
}

impl AnswerTable {
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
        self.kl.push(a.kl);
        self.flipped.push(a.flipped);
        self.tokens.push(a.tokens);
    }

    /// Write the file, whole or not at all; zstd, the same bytes for the same answers.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(self, path: &Path) -> Result<()> {
        let columns: Vec<(&str, DataType, ArrayRef)> = vec![
            ("task", DataType::Utf8, Arc::new(StringArray::from(self.task))),
            ("context", DataType::UInt32, Arc::new(UInt32Array::from(self.context))),
            ("question", DataType::UInt32, Arc::new(UInt32Array::from(self.question))),
            ("question_text", DataType::Utf8, Arc::new(StringArray::from(self.question_text))),
            ("method", DataType::Utf8, Arc::new(StringArray::from(self.method))),
            ("policy", DataType::Utf8, Arc::new(StringArray::from(self.policy))),
            ("ratio", DataType::Float64, Arc::new(Float64Array::from(self.ratio))),
            ("gold", DataType::Utf8, Arc::new(StringArray::from(self.gold))),
            ("answer", DataType::Utf8, Arc::new(StringArray::from(self.answer))),
            ("correct", DataType::Boolean, Arc::new(BooleanArray::from(self.correct))),
            ("score", DataType::Float64, Arc::new(Float64Array::from(self.score))),
            ("kl", DataType::Float64, Arc::new(Float64Array::from(self.kl))),
            ("flipped", DataType::UInt32, Arc::new(UInt32Array::from(self.flipped))),
            ("answer_tokens", DataType::UInt32, Arc::new(UInt32Array::from(self.tokens))),
        ];
        let field =
            |(name, kind, _): &(&str, DataType, ArrayRef)| Field::new(*name, kind.clone(), *name == "policy");
        let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
        let encode = || -> Result<Vec<u8>> {
            let batch = RecordBatch::try_new(schema.clone(), columns.into_iter().map(|c| c.2).collect())?;
            let properties = WriterProperties::builder()
                .set_compression(Compression::ZSTD(ZstdLevel::default()))
                .set_created_by("proxykv-train".to_owned())
                .build();
            let mut bytes = Vec::new();
            let mut writer = ArrowWriter::try_new(&mut bytes, schema.clone(), Some(properties))?;
            writer.write(&batch)?;
            writer.close()?;
            Ok(bytes)
        };
        let bytes = encode().with_context(|| format!("cannot encode `{}`", path.display()))?;
        write_file(path, &bytes, &WriteBudget::from_env()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::AsArray;
    use arrow::datatypes::Float64Type;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use pkv_core::{Policy, RetentionRatio};
    use pkv_recipe::Method;

    #[test]
    fn answers_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.parquet");
        let asked = Asked { question: "Who?".to_owned(), wanted: "Ann".to_owned() };
        let answer =
            |text: &str, correct| Answer { text: text.to_owned(), correct, kl: 0.5, flipped: 1, tokens: 3 };
        let cell = Cell {
            method: Method::Snapkv,
            policy: Policy::PairUniform,
            ratio: RetentionRatio::new(0.05).unwrap(),
        };
        let mut table = AnswerTable::default();
        table.push("facts", (2, 1), &asked, None, &answer("Ann", true));
        table.push("facts", (2, 1), &asked, Some(&cell), &answer("Bob", false));
        table.write(&path).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let mut batches = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
        let batch = batches.next().unwrap().unwrap();
        let text = |name: &str| {
            let column = batch.column_by_name(name).unwrap().as_string::<i32>();
            column.iter().map(|v| v.map(str::to_owned)).collect::<Vec<_>>()
        };
        assert_eq!(text("method"), [Some("full".to_owned()), Some("snapkv".to_owned())]);
        assert_eq!(text("policy"), [None, Some("pair-uniform".to_owned())]);
        assert_eq!(text("answer"), [Some("Ann".to_owned()), Some("Bob".to_owned())]);
        let ratios = batch.column_by_name("ratio").unwrap().as_primitive::<Float64Type>();
        assert_eq!(ratios.values().to_vec(), [1.0, 0.05]);
        assert!(batch.column_by_name("correct").unwrap().as_boolean().value(0));
    }
}
