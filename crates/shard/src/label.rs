//! Labels: the KVzip scores of one example.

use std::sync::Arc;

use anyhow::{Result, ensure};
use arrow::array::{RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt32Type};
use pkv_core::{StoreDtype, hinted};

use crate::Example;
use crate::column::{decode_nested, nested_type, number, text};
use crate::page::Numbers;
use crate::row::{Column, Row, check_numbers};

/// Raw scores (never pooled, never log-odds) of every KV pair of an example.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelRow {
    /// The example's id.
    pub id: String,
    /// Layers of the target.
    pub layers: u32,
    /// KV heads per layer.
    pub kv_heads: u32,
    /// Positions of the context, prefix left out.
    pub positions: u32,
    /// `[layer, KV head, position]`, row-major.
    pub scores: Vec<f32>,
}

impl LabelRow {
    /// These labels are of `example`, in row `row`.
    ///
    /// # Errors
    /// They are of another one, or of another number of positions.
    pub fn check_example(&self, row: u64, example: &Example) -> Result<()> {
        ensure!(
            example.id == self.id && example.tokens.len() == self.positions as usize,
            hinted(
                format!(
                    "row {row}: the labels are of `{}` ({} positions), the example is `{}` ({} tokens)",
                    self.id,
                    self.positions,
                    example.id,
                    example.tokens.len()
                ),
                "labels must come from these examples: `--redo label`"
            )
        );
        Ok(())
    }

    fn shape(&self) -> Vec<usize> {
        [self.layers, self.kv_heads, self.positions].map(|n| n as usize).to_vec()
    }
}

impl Row for LabelRow {
    const FILES: &'static str = "labels";

    fn schema(store: StoreDtype) -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("id", DataType::Utf8, false),
            Field::new("layers", DataType::UInt32, false),
            Field::new("kv_heads", DataType::UInt32, false),
            Field::new("positions", DataType::UInt32, false),
            Field::new("scores", nested_type(3, store), false),
        ]))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn raw_bytes(&self, store: StoreDtype) -> usize {
        self.id.len() + 12 + self.scores.len() * store.bytes()
    }

    fn check(&self, store: StoreDtype) -> Result<()> {
        let expected: usize = self.shape().iter().product();
        ensure!(
            self.scores.len() == expected,
            "{} scores for {} layers x {} KV heads x {} positions",
            self.scores.len(),
            self.layers,
            self.kv_heads,
            self.positions
        );
        check_numbers("scores", &self.scores, store)
    }

    fn encode(rows: &[Self], store: StoreDtype) -> Result<Vec<Column>> {
        let count =
            |f: fn(&Self) -> u32| Column::Array(Arc::new(UInt32Array::from_iter_values(rows.iter().map(f))));
        Ok(vec![
            Column::Array(Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.id)))),
            count(|r| r.layers),
            count(|r| r.kv_heads),
            count(|r| r.positions),
            Column::Numbers(Numbers::new(rows.iter().map(|r| (r.shape(), r.scores.as_slice())), store)),
        ])
    }

    fn decode(batch: &RecordBatch, i: usize) -> Result<Self> {
        let count = |name| number::<UInt32Type>(batch, name, i);
        let (layers, kv_heads, positions) = (count("layers")?, count("kv_heads")?, count("positions")?);
        let axes = [layers, kv_heads, positions].map(|n| Some(n as usize));
        let (_, scores) = decode_nested(batch, "scores", i, &axes)?;
        Ok(Self { id: text(batch, "id", i)?.to_owned(), layers, kv_heads, positions, scores })
    }
}
