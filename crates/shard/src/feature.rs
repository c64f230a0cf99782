//! Features: what the mapper sees of one example.

use std::sync::Arc;

use anyhow::{Result, ensure};
use arrow::array::{RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt32Type};
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
