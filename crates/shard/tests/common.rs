//! Rows that the other files write, and folders to write them to.

use anyhow::Result;
use pkv_core::{Fingerprint, Split, StoreDtype};
use pkv_shard::{Example, FeatureRow, LabelRow, PlantedFact, StageDir, StageWriter};

pub use pkv_test_support::errors::text_and_hint;
pub use pkv_test_support::files::files;

/// A number in [0, 1) that f16 holds exactly and that no neighbour shares.
pub fn number(i: usize) -> f32 {
    ((i * 37 + 11) % 1024) as f32 / 1024.0
}

pub fn label(i: usize) -> LabelRow {
    // Lengths differ, so that neither lists nor row groups are regular.
    let (layers, kv_heads, positions) = (3, 2, 40 + 13 * (i as u32 % 7));
    let scores = (0..(layers * kv_heads * positions) as usize).map(|j| number(i * 1000 + j)).collect();
    LabelRow { id: format!("doc-{i}-0"), layers, kv_heads, positions, scores }
}

pub fn feature(i: usize, globals: usize) -> FeatureRow {
    let (layers, kv_heads, channels, positions) = (2, 1, 8, 25 + i as u32 % 5);
    let n = (layers * kv_heads * channels * positions) as usize;
    FeatureRow {
        id: format!("doc-{i}-0"),
        layers,
        kv_heads,
        channels,
        positions,
        heads: (0..n).map(|j| -16.0 + 32.0 * number(i + j)).collect(),
        globals: (0..globals * positions as usize).map(number).collect(),
    }
}

pub fn example(i: usize) -> Example {
    let tokens: Vec<u32> = (0..50 + i as u32 % 9).map(|t| t * 31 % 8192).collect();
    let fact = |k: usize| PlantedFact {
        sentence: format!("The colour of the {k}th door is \u{201c}blue\u{201d}."),
        question: "What is the colour of the door?".to_owned(),
        answer: format!("blue {k}"),
        start: k as u32 * 10,
        len: 9,
    };
    Example {
        id: format!("doc-{i}-{}", i % 3),
        document: format!("doc-{i}"),
        source: "novels".to_owned(),
        split: Split::ALL[i % 3],
        window: i as u32 % 3,
        start: (i as u64) << 33,
        tokens,
        facts: (0..i % 4).map(fact).collect(),
    }
}

pub fn choices() -> Fingerprint {
    Fingerprint::new().with("label", serde_json::json!({"preset": "original", "chunk_tokens": 2000}))
}

pub const SHARD_ROWS: usize = 8;

/// Write labels `from the first missing one` to `n` and finish.
pub fn write_labels(stage: StageDir, n: usize) -> Result<StageDir> {
    let mut writer = StageWriter::new(stage, SHARD_ROWS, StoreDtype::F16, Some(n as u64))?;
    for i in writer.rows() as usize..n {
        writer.push(label(i))?;
    }
    writer.finish()
}
