//! Features: the mapper's input for one example.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use arrow::array::{RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt32Type};
use half::f16;
use half::slice::HalfFloatSliceExt;
use pkv_core::StoreDtype;

use crate::column::{decode_nested, nested_type, number, text};
use crate::page::Numbers;
use crate::row::{Column, Row, check_numbers};

/// Raw (not standardized) features of every position of an example.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureRow {
    /// The example's id.
    pub id: String,
    /// Layers of the proxy.
    pub layers: u32,
    /// KV heads per layer.
    pub kv_heads: u32,
    /// Channels per KV head.
    pub channels: u32,
    /// Positions of the context, prefix left out.
    pub positions: u32,
    /// `[layer, KV head, channel, position]`, row-major.
    pub heads: Vec<f32>,
    /// `[global channel, position]`, row-major; empty if the recipe has no global channels.
    pub globals: Vec<f32>,
}

impl FeatureRow {
    fn shape(&self) -> Vec<usize> {
        [self.layers, self.kv_heads, self.channels, self.positions].map(|n| n as usize).to_vec()
    }

    /// As it would be read back after it was stored.
    ///
    /// # Errors
    /// It cannot be stored.
    pub fn as_stored(mut self, store: StoreDtype) -> Result<Self> {
        self.check(store).with_context(|| format!("cannot use the features of example `{}`", self.id))?;
        if store == StoreDtype::F16 {
            for values in [&mut self.heads, &mut self.globals] {
                let mut narrow = vec![f16::ZERO; values.len()];
                narrow.convert_from_f32_slice(values);
                narrow.convert_to_f32_slice(values);
            }
        }
        Ok(self)
    }

    /// Channels that all proxy heads share.
    pub fn global_channels(&self) -> usize {
        self.globals.len().checked_div(self.positions as usize).unwrap_or(0)
    }
}

impl Row for FeatureRow {
    const FILES: &'static str = "features";

    fn schema(store: StoreDtype) -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("id", DataType::Utf8, false),
            Field::new("layers", DataType::UInt32, false),
            Field::new("kv_heads", DataType::UInt32, false),
            Field::new("channels", DataType::UInt32, false),
            Field::new("positions", DataType::UInt32, false),
            Field::new("heads", nested_type(4, store), false),
            Field::new("globals", nested_type(2, store), false),
        ]))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn raw_bytes(&self, store: StoreDtype) -> usize {
        self.id.len() + 16 + (self.heads.len() + self.globals.len()) * store.bytes()
    }

    fn check(&self, store: StoreDtype) -> Result<()> {
        let expected: usize = self.shape().iter().product();
        ensure!(
            self.heads.len() == expected,
            "{} features for {} layers x {} KV heads x {} channels x {} positions",
            self.heads.len(),
            self.layers,
            self.kv_heads,
            self.channels,
            self.positions
        );
        let t = self.positions as usize;
        ensure!(
            if t == 0 { self.globals.is_empty() } else { self.globals.len().is_multiple_of(t) },
            "{} global features are no multiple of {t} positions",
            self.globals.len()
        );
        check_numbers("features", &self.heads, store)?;
        check_numbers("global features", &self.globals, store)
    }

    fn encode(rows: &[Self], store: StoreDtype) -> Result<Vec<Column>> {
        let count =
            |f: fn(&Self) -> u32| Column::Array(Arc::new(UInt32Array::from_iter_values(rows.iter().map(f))));
        let globals = |r: &Self| vec![r.global_channels(), r.positions as usize];
        Ok(vec![
            Column::Array(Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.id)))),
            count(|r| r.layers),
            count(|r| r.kv_heads),
            count(|r| r.channels),
            count(|r| r.positions),
            Column::Numbers(Numbers::new(rows.iter().map(|r| (r.shape(), r.heads.as_slice())), store)),
            Column::Numbers(Numbers::new(rows.iter().map(|r| (globals(r), r.globals.as_slice())), store)),
        ])
    }

    fn decode(batch: &RecordBatch, i: usize) -> Result<Self> {
        let count = |name| number::<UInt32Type>(batch, name, i);
        let (layers, kv_heads, channels, positions) =
            (count("layers")?, count("kv_heads")?, count("channels")?, count("positions")?);
        let axes = [layers, kv_heads, channels, positions].map(|n| Some(n as usize));
        let (_, heads) = decode_nested(batch, "heads", i, &axes)?;
        let (_, globals) = decode_nested(batch, "globals", i, &[None, Some(positions as usize)])?;
        Ok(Self {
            id: text(batch, "id", i)?.to_owned(),
            layers,
            kv_heads,
            channels,
            positions,
            heads,
            globals,
        })
    }
}

#[cfg(test)]
mod tests {
    use pkv_core::Fingerprint;

    use super::*;
    use crate::{StageDir, StageReader, StageWriter};

    fn row() -> FeatureRow {
        let values = [0.1, -1.0 / 3.0, 15.9993, 1e-5, 6.1e-8, -0.0, 2049.0, 1.0005];
        FeatureRow {
            id: "a".into(),
            layers: 1,
            kv_heads: 2,
            channels: 2,
            positions: 2,
            heads: values.to_vec(),
            globals: values[..4].to_vec(),
        }
    }

    #[test]
    fn a_row_as_stored_is_the_row_that_is_read_back() {
        for store in [StoreDtype::F16, StoreDtype::F32] {
            let folder = tempfile::tempdir().unwrap();
            let stage = StageDir::open(folder.path(), "extract", &Fingerprint::new()).unwrap();
            let mut writer = StageWriter::new(stage, 1, store, Some(1)).unwrap();
            writer.push(row()).unwrap();
            writer.finish().unwrap();
            let stored = StageReader::<FeatureRow>::open(folder.path()).unwrap().get(0).unwrap();
            let bits =
                |r: &FeatureRow| r.heads.iter().chain(&r.globals).map(|x| x.to_bits()).collect::<Vec<_>>();
            let as_stored = row().as_stored(store).unwrap();
            assert_eq!(bits(&as_stored), bits(&stored));
            assert_eq!(bits(&as_stored) == bits(&row()), store == StoreDtype::F32);
        }
        let mut large = row();
        large.globals[0] = 70_000.0;
        let e = large.clone().as_stored(StoreDtype::F16).unwrap_err();
        assert!(format!("{e:#}").contains("more than f16 holds"), "{e:#}");
        assert_eq!(large.clone().as_stored(StoreDtype::F32).unwrap(), large);
        large.heads[1] = f32::NAN;
        assert!(large.as_stored(StoreDtype::F32).is_err());
    }
}
