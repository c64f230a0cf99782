//! Examples: the tokenized contexts that are labelled, extracted and trained on.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use arrow::array::{
    Array, ArrayRef, AsArray, ListArray, RecordBatch, StringArray, StructArray, UInt32Array, UInt64Array,
};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, UInt32Type, UInt64Type};
use pkv_core::{Split, StoreDtype};

use crate::column::{element, get, number, offsets, text};
use crate::row::{Column, Row};

/// A window of a document, tokenized.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Unique in the run.
    pub id: String,
    /// The document's id.
    pub document: String,
    /// The manifest source that the document came from.
    pub source: String,
    pub split: Split,
    /// Which window of its document, from 0.
    pub window: u32,
    /// First token of the window in its document.
    pub start: u64,
    /// Context tokens, prefix left out.
    pub tokens: Vec<u32>,
    /// Planted facts, in order of position.
    pub facts: Vec<PlantedFact>,
}

/// A sentence put into a document, and what can be asked about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlantedFact {
    pub sentence: String,
    pub question: String,
    pub answer: String,
    /// First token of the sentence in the example's tokens.
    pub start: u32,
    /// Tokens of the sentence.
    pub len: u32,
}

fn fact_fields() -> Fields {
    Fields::from(vec![
        Field::new("sentence", DataType::Utf8, false),
        Field::new("question", DataType::Utf8, false),
        Field::new("answer", DataType::Utf8, false),
        Field::new("start", DataType::UInt32, false),
        Field::new("len", DataType::UInt32, false),
    ])
}

impl Row for Example {
    const FILES: &'static str = "examples";

    fn schema(_: StoreDtype) -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("id", DataType::Utf8, false),
            Field::new("document", DataType::Utf8, false),
            Field::new("source", DataType::Utf8, false),
            Field::new("split", DataType::Utf8, false),
            Field::new("window", DataType::UInt32, false),
            Field::new("start", DataType::UInt64, false),
            Field::new("tokens", DataType::List(element(DataType::UInt32)), false),
            Field::new("facts", DataType::List(element(DataType::Struct(fact_fields()))), false),
        ]))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn raw_bytes(&self, _: StoreDtype) -> usize {
        let facts: usize =
            self.facts.iter().map(|f| f.sentence.len() + f.question.len() + f.answer.len() + 8).sum();
        self.id.len() + self.document.len() + self.source.len() + 24 + 4 * self.tokens.len() + facts
    }

    fn check(&self, _: StoreDtype) -> Result<()> {
        for f in &self.facts {
            let end = f.start as usize + f.len as usize;
            ensure!(
                end <= self.tokens.len(),
                "a planted fact ends at token {end}, the example at {}",
                self.tokens.len()
            );
        }
        Ok(())
    }

    fn encode(rows: &[Self], _: StoreDtype) -> Result<Vec<Column>> {
        let tokens: ArrayRef =
            Arc::new(rows.iter().flat_map(|r| &r.tokens).map(|&t| Some(t)).collect::<UInt32Array>());
        let tokens = ListArray::try_new(
            element(DataType::UInt32),
            offsets(rows.iter().map(|r| r.tokens.len()))?,
            tokens,
            None,
        )?;
        let facts: Vec<&PlantedFact> = rows.iter().flat_map(|r| &r.facts).collect();
        let fact_text =
            |f: fn(&PlantedFact) -> &str| Arc::new(StringArray::from_iter_values(facts.iter().map(|x| f(x))));
        let fact_count =
            |f: fn(&PlantedFact) -> u32| Arc::new(UInt32Array::from_iter_values(facts.iter().map(|x| f(x))));
        let facts = StructArray::try_new(
            fact_fields(),
            vec![
                fact_text(|f| &f.sentence),
                fact_text(|f| &f.question),
                fact_text(|f| &f.answer),
                fact_count(|f| f.start),
                fact_count(|f| f.len),
            ],
            None,
        )?;
        let facts = ListArray::try_new(
            element(DataType::Struct(fact_fields())),
            offsets(rows.iter().map(|r| r.facts.len()))?,
            Arc::new(facts),
            None,
        )?;
        let text = |f: fn(&Self) -> &str| Arc::new(StringArray::from_iter_values(rows.iter().map(f)));
        let arrays: [ArrayRef; 8] = [
            text(|r| &r.id),
            text(|r| &r.document),
            text(|r| &r.source),
            text(|r| r.split.name()),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.window))),
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.start))),
            Arc::new(tokens),
            Arc::new(facts),
        ];
        Ok(arrays.map(Column::Array).into())
    }

    fn decode(batch: &RecordBatch, i: usize) -> Result<Self> {
        let own = |name| text(batch, name, i).map(str::to_owned);
        let split = own("split")?;
        let tokens = list(batch, "tokens", i)?;
        let tokens = tokens.as_primitive_opt::<UInt32Type>().context("column `tokens` holds no u32")?;
        let facts = list(batch, "facts", i)?;
        let facts = facts.as_struct_opt().context("column `facts` holds no struct")?;
        let facts = RecordBatch::from(facts);
        Ok(Self {
            id: own("id")?,
            document: own("document")?,
            source: own("source")?,
            split: Split::ALL
                .into_iter()
                .find(|s| s.name() == split)
                .with_context(|| format!("`{split}` is no split"))?,
            window: number::<UInt32Type>(batch, "window", i)?,
            start: number::<UInt64Type>(batch, "start", i)?,
            tokens: tokens.values().to_vec(),
            facts: (0..facts.num_rows()).map(|j| fact(&facts, j)).collect::<Result<_>>()?,
        })
    }
}

fn fact(facts: &RecordBatch, j: usize) -> Result<PlantedFact> {
    let own = |name| text(facts, name, j).map(str::to_owned);
    Ok(PlantedFact {
        sentence: own("sentence")?,
        question: own("question")?,
        answer: own("answer")?,
        start: number::<UInt32Type>(facts, "start", j)?,
        len: number::<UInt32Type>(facts, "len", j)?,
    })
}

/// The elements of list `i`.
fn list(batch: &RecordBatch, name: &str, i: usize) -> Result<ArrayRef> {
    let column = get(batch, name)?;
    let lists = column
        .as_list_opt::<i32>()
        .with_context(|| format!("column `{name}` holds {}, expected lists", column.data_type()))?;
    Ok(lists.value(i))
}
