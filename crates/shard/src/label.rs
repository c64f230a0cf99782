//! Labels: the KVzip scores of one example.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
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

    /// No score is above `most`.
    ///
    /// # Errors
    /// One is; the error names it.
    pub fn check_limit(&self, most: f32) -> Result<()> {
        check_scores(&self.scores, most)
    }

    fn shape(&self) -> Vec<usize> {
        [self.layers, self.kv_heads, self.positions].map(|n| n as usize).to_vec()
    }
}

/// Scores are maxima of weights, from 0 to `most`.
fn check_scores(scores: &[f32], most: f32) -> Result<()> {
    if scores.iter().fold(true, |fits, x| fits & (0.0..=most).contains(x)) {
        return Ok(());
    }
    let Some(i) = scores.iter().position(|x| !(0.0..=most).contains(x)) else { return Ok(()) };
    bail!(hinted(
        match most.is_finite() {
            true => format!("score {i} is {}, expected 0 to {most}", scores[i]),
            false => format!("score {i} is {}, expected 0 or more", scores[i]),
        },
        "these are no KVzip scores: make them again with `--redo label`"
    ))
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
        check_numbers("scores", &self.scores, store)?;
        check_scores(&self.scores, f32::INFINITY)
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

#[cfg(test)]
mod tests {
    use pkv_core::Fingerprint;

    use super::*;
    use crate::{StageDir, StageReader, StageWriter};

    /// Labels that another program wrote: nothing looked at them before they were stored.
    struct Unchecked(LabelRow);

    impl Row for Unchecked {
        const FILES: &'static str = LabelRow::FILES;

        fn schema(store: StoreDtype) -> SchemaRef {
            LabelRow::schema(store)
        }

        fn id(&self) -> &str {
            self.0.id()
        }

        fn raw_bytes(&self, store: StoreDtype) -> usize {
            self.0.raw_bytes(store)
        }

        fn check(&self, _: StoreDtype) -> Result<()> {
            Ok(())
        }

        fn encode(rows: &[Self], store: StoreDtype) -> Result<Vec<Column>> {
            LabelRow::encode(&rows.iter().map(|r| r.0.clone()).collect::<Vec<_>>(), store)
        }

        fn decode(batch: &RecordBatch, i: usize) -> Result<Self> {
            LabelRow::decode(batch, i).map(Self)
        }
    }

    #[test]
    fn a_stored_score_that_is_none_is_refused_with_its_row() {
        let found =
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -0.5].map(|score| (score, format!("{score}")));
        for ((score, text), store) in found.into_iter().zip([StoreDtype::F16, StoreDtype::F32].repeat(2)) {
            let folder = tempfile::tempdir().unwrap();
            let stage = StageDir::open(folder.path(), "label", &Fingerprint::new()).unwrap();
            let mut writer = StageWriter::new(stage, 2, store, Some(4)).unwrap();
            for i in 0..4 {
                let (id, mut scores) = (format!("doc-{i}"), vec![0.25; 6]);
                if i == 3 {
                    scores[4] = score;
                }
                writer
                    .push(Unchecked(LabelRow { id, layers: 1, kv_heads: 2, positions: 3, scores }))
                    .unwrap();
            }
            writer.finish().unwrap();
            let reader = StageReader::<LabelRow>::open(folder.path()).unwrap();
            assert!((0..3).all(|i| reader.get(i).is_ok()));
            let said = format!("{:#}", reader.get(3).unwrap_err());
            for part in ["row 1 of shard", "labels-00001.parquet", "example `doc-3`", " 4 ", &text] {
                assert!(said.contains(part), "`{part}` is missing in: {said}");
            }
        }
    }
}
