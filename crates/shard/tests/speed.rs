//! How fast features are written: a measurement, run by name in a release build.

use std::time::Instant;

use pkv_core::StoreDtype;
use pkv_shard::{FeatureRow, StageDir, StageReader, StageWriter};

use crate::common::choices;

/// 24 layers of 2 KV heads, 12 channels: a 0.5B model reading 4,096 tokens.
fn row(i: usize) -> FeatureRow {
    let (layers, kv_heads, channels, positions) = (24, 2, 12, 4096);
    let mut state = i as u32 + 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) as f32 / u32::MAX as f32
    };
    // Log weights: a level of the head, slow drift, and noise of the size that attention has.
    let n = (layers * kv_heads * channels * positions) as usize;
    let heads = (0..n).map(|j| -4.0 - (j / 4096 % 11) as f32 - 3.0 * noise() * noise()).collect();
    let globals = (0..4 * positions as usize).map(|_| noise()).collect();
    FeatureRow { id: format!("doc-{i}-0"), layers, kv_heads, channels, positions, heads, globals }
}

#[test]
#[ignore = "a measurement: cargo test --release -p pkv-shard -- --ignored --nocapture speed"]
fn speed_of_writing_features() {
    const ROWS: usize = 24;
    for store in [StoreDtype::F16, StoreDtype::F32] {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<FeatureRow> = (0..ROWS).map(row).collect();
        let raw: usize = rows.iter().map(|r| (r.heads.len() + r.globals.len()) * store.bytes()).sum();
        let stage = StageDir::open(folder.path(), "extract", &choices()).unwrap();
        let mut writer = StageWriter::new(stage, 64, store, Some(ROWS as u64)).unwrap();
        let begin = Instant::now();
        for row in rows {
            writer.push(row).unwrap();
        }
        let stage = writer.finish().unwrap();
        let secs = begin.elapsed().as_secs_f64();
        let bytes: u64 = stage.index().shards.iter().map(|s| s.bytes).sum();
        drop(stage);
        let begin = Instant::now();
        let reader = StageReader::<FeatureRow>::open(folder.path()).unwrap();
        reader.iter().for_each(|row| drop(row.unwrap()));
        println!(
            "{store:?}: {:.1} ms a row, {:.0} MB/s of raw numbers, {:.2} of them on disk; read in {:.1} ms a row",
            secs * 1e3 / ROWS as f64,
            raw as f64 / secs / 1e6,
            bytes as f64 / raw as f64,
            begin.elapsed().as_secs_f64() * 1e3 / ROWS as f64,
        );
    }
}
