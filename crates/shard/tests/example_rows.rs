//! The three stages as one: rows belong together or are refused.

use std::path::{Path, PathBuf};

use pkv_core::{Split, StoreDtype};
use pkv_shard::{
    Example, ExampleRows, FeatureFolders, FeatureRow, LabelRow, Row, Sizes, StageDir, StageWriter,
};

use crate::common::*;

const ROWS: usize = 9;

/// Example `i` with its labels and features: 3 layers x 2 KV heads, 1 layer x 2 KV heads of 3 channels, 1
/// global.
fn rows(i: usize) -> (Example, LabelRow, FeatureRow) {
    let (example, positions) = (example(i), example(i).tokens.len());
    let (id, t) = (example.id.clone(), positions as u32);
    let numbers = |n: usize| (0..n * positions).map(number).collect::<Vec<_>>();
    let label = LabelRow { id: id.clone(), layers: 3, kv_heads: 2, positions: t, scores: numbers(6) };
    let feature = FeatureRow {
        id,
        layers: 1,
        kv_heads: 2,
        channels: 3,
        positions: t,
        heads: numbers(6),
        globals: numbers(1),
    };
    (example, label, feature)
}

fn write<R: Row>(dir: PathBuf, rows: Vec<R>) {
    let stage = StageDir::open(&dir, "label", &choices()).unwrap();
    let mut writer = StageWriter::new(stage, SHARD_ROWS, StoreDtype::F32, None).unwrap();
    rows.into_iter().for_each(|row| writer.push(row).unwrap());
    writer.finish().unwrap();
}

fn open(run: &Path) -> anyhow::Result<ExampleRows> {
    let at = |name: &str| run.join(name);
    ExampleRows::open(&at("examples"), &at("labels"), &FeatureFolders::one(&at("features")))
}

/// Stages of `n` rows, with `change` made to labels and features.
fn stages(n: usize, change: impl Fn(&mut Vec<LabelRow>, &mut Vec<FeatureRow>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..n).map(rows).collect();
    let (mut labels, mut features) =
        (all.iter().map(|r| r.1.clone()).collect(), all.iter().map(|r| r.2.clone()).collect());
    change(&mut labels, &mut features);
    write(dir.path().join("examples"), all.into_iter().map(|r| r.0).collect());
    write(dir.path().join("labels"), labels);
    write(dir.path().join("features"), features);
    dir
}

#[test]
fn rows_that_belong_together_come_out_together() {
    let dir = stages(ROWS, |_, _| ());
    let opened = open(dir.path()).unwrap();
    assert_eq!(opened.sizes(), Some(Sizes { heads: 2, channels: 3, globals: 1, layers: 3, kv_heads: 2 }));
    assert_eq!(opened.splits(), (0..ROWS).map(|i| Split::ALL[i % 3]).collect::<Vec<_>>());
    for i in (0..ROWS).rev() {
        let ((example, label, feature), row) = (rows(i), i as u64);
        assert_eq!((opened.id(row), opened.positions(row)), (example.id.as_str(), example.tokens.len()));
        assert_eq!(opened.example(row).unwrap(), example);
        assert_eq!(opened.get(row).unwrap(), (label, feature));
    }
    assert!(opened.get(ROWS as u64).is_err());
    assert_eq!(open(stages(0, |_, _| ()).path()).unwrap().sizes(), None);
}

#[test]
fn rows_that_do_not_belong_together_are_refused_by_name() {
    let refused = |change: fn(&mut Vec<LabelRow>, &mut Vec<FeatureRow>), parts: &[&str], hint: &str| {
        let dir = stages(ROWS, change);
        let error = open(dir.path()).and_then(|opened| {
            // Only row 5 is another's.
            (0..5).for_each(|row| assert!(opened.get(row).is_ok(), "row {row}"));
            opened.get(5)
        });
        let (text, hinted) = text_and_hint(&error.unwrap_err());
        for part in parts {
            assert!(text.contains(part), "`{part}` is missing in: {text}");
        }
        assert!(hinted.contains(hint), "{hinted}");
    };
    refused(|labels, _| labels.truncate(7), &["labels` has 7 rows for 9 examples"], "--redo label");
    refused(|_, features| features.truncate(8), &["features` has 8 rows for 9 examples"], "--redo extract");
    refused(
        |labels, _| labels.swap(5, 6),
        &["labels of row 5", "do not belong to example `doc-5-2`", "found `doc-6-0`"],
        "--redo label",
    );
    refused(
        |_, features| features.swap(5, 6),
        &["features of row 5", "do not belong to example `doc-5-2`", "found `doc-6-0`"],
        "--redo extract",
    );
    refused(
        |labels, _| {
            let half = labels[5].scores.len() / 2;
            labels[5].kv_heads = 1;
            labels[5].scores.truncate(half);
        },
        &["labels of row 5", "expected `doc-5-2` with 6 KV heads", "with 3 KV heads"],
        "--redo label",
    );
    refused(
        |_, features| {
            let less = features[5].heads.len() / 3 * 2;
            features[5].channels = 2;
            features[5].heads.truncate(less);
        },
        &["features of row 5", "channels (3, 1)", "channels (2, 1)"],
        "--redo extract",
    );
    refused(
        |_, features| {
            let row = &mut features[5];
            row.positions -= 1;
            row.heads.truncate(6 * row.positions as usize);
            row.globals.truncate(row.positions as usize);
        },
        &["features of row 5", "and 55 positions", "and 54 positions"],
        "--redo extract",
    );
}

#[test]
fn labels_above_the_highest_score_are_refused_by_name() {
    let dir = stages(ROWS, |labels, _| labels[5].scores[7] = 1.5);
    assert!(open(dir.path()).unwrap().get(5).is_ok(), "some scores have no limit");
    let opened = open(dir.path()).unwrap().with_most_score(1.001);
    assert!((0..5).all(|row| opened.get(row).is_ok()));
    let (text, hint) = text_and_hint(&opened.get(5).unwrap_err());
    for part in ["labels of row 5, example `doc-5-2`", "score 7 is 1.5, expected 0 to 1.001"] {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
    assert!(hint.contains("--redo label"), "{hint}");
}
