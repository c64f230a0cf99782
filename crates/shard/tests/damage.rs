//! Bytes, files and choices that changed without the index.

use std::fs;
use std::path::Path;

use pkv_core::{Fingerprint, StoreDtype};
use pkv_shard::{Example, LabelRow, StageDir, StageReader, StageState, StageWriter, StaleError};
use serde_json::json;
use tempfile::{TempDir, tempdir};

use crate::common::*;

/// Twenty labels in three shards.
fn complete() -> TempDir {
    let dir = tempdir().unwrap();
    write_labels(StageDir::open(dir.path(), "label", &choices()).unwrap(), 20).unwrap();
    dir
}

fn open(dir: &Path) -> anyhow::Result<StageDir> {
    StageDir::open(dir, "label", &choices())
}

/// `expected` in the error, `--redo label` in its hint.
#[track_caller]
fn says(error: &anyhow::Error, expected: &[&str]) {
    let (said, hint) = text_and_hint(error);
    for text in expected {
        assert!(said.contains(text), "`{text}` is missing in: {said}");
    }
    assert!(hint.contains("--redo"), "{hint}");
}

#[test]
fn a_flipped_byte_is_found_when_its_shard_is_read() {
    let dir = complete();
    let shard = dir.path().join("labels-00001.parquet");
    let good = fs::read(&shard).unwrap();
    // A byte of the data, one of the footer, and the very first.
    for at in [good.len() / 3, good.len() - 20, 0] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&shard, bad).unwrap();
        let reader = StageReader::<LabelRow>::open(dir.path()).unwrap();
        assert_eq!(reader.get(0).unwrap(), label(0), "the first shard is whole");
        let error = reader.get(8).unwrap_err();
        says(
            &error,
            &["cannot use shard", "labels-00001.parquet", "expected SHA-256", "its bytes have changed"],
        );
        says(&reader.stage().verify().unwrap_err(), &["labels-00001.parquet"]);
    }
    fs::write(&shard, good).unwrap();
    open(dir.path()).unwrap().verify().unwrap();
}

#[test]
fn a_truncated_shard_is_named_with_both_lengths() {
    let dir = complete();
    let shard = dir.path().join("labels-00002.parquet");
    let length = fs::metadata(&shard).unwrap().len();
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(100).unwrap();
    let both = format!("expected {length} bytes, found 100");
    says(
        &StageReader::<LabelRow>::open(dir.path()).unwrap().get(19).unwrap_err(),
        &["labels-00002.parquet", &both],
    );
    says(&open(dir.path()).unwrap_err(), &["labels-00002.parquet", &both]);
}

#[test]
fn a_missing_shard_is_named() {
    let dir = complete();
    fs::remove_file(dir.path().join("labels-00000.parquet")).unwrap();
    let expected = ["labels-00000.parquet", "named by the index, but is not there"];
    says(&StageReader::<LabelRow>::open(dir.path()).unwrap().get(3).unwrap_err(), &expected);
    says(&open(dir.path()).unwrap_err(), &expected);
    // Shards that are there can still be read.
    assert_eq!(StageReader::<LabelRow>::open(dir.path()).unwrap().get(8).unwrap(), label(8));
}

#[test]
fn other_choices_are_stale_and_differences_have_names() {
    let dir = complete();
    let other = Fingerprint::new().with("label", json!({"preset": "plus", "chunk_tokens": 2000}));
    let difference = vec![("label.preset".to_owned(), json!("original"), json!("plus"))];
    assert_eq!(StageDir::state(dir.path(), &other).unwrap(), StageState::Stale(difference.clone()));

    let before = files(dir.path());
    let error = StageDir::open(dir.path(), "label", &other).unwrap_err();
    says(
        &error,
        &[
            "made with other choices",
            r#"`label.preset` was "original" when it was written and is "plus" now"#,
        ],
    );
    assert_eq!(error.downcast_ref::<StaleError>().unwrap().differences, difference);
    assert_eq!(files(dir.path()), before, "a stale folder is left as it is");

    StageDir::clear(dir.path()).unwrap();
    assert_eq!(StageDir::state(dir.path(), &other).unwrap(), StageState::Absent);
    assert_eq!(StageDir::open(dir.path(), "label", &other).unwrap().rows(), 0);
}

#[test]
fn states_tell_how_far_a_stage_is() {
    let dir = tempdir().unwrap();
    assert_eq!(StageDir::state(&dir.path().join("none"), &choices()).unwrap(), StageState::Absent);
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Absent);
    drop(open(dir.path()).unwrap());
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Partial(0));
    let dir = complete();
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Complete(20));
}

#[test]
fn another_schema_version_is_refused() {
    let dir = complete();
    let index = dir.path().join("index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("\"schema_version\": 1", "\"schema_version\": 9, \"new_key\": true"))
        .unwrap();
    for error in [open(dir.path()).unwrap_err(), StageReader::<LabelRow>::open(dir.path()).err().unwrap()] {
        says(&error, &["index.json", "expected schema version 1, found 9"]);
    }
    fs::write(&index, "{\"schema_ver").unwrap();
    says(&open(dir.path()).unwrap_err(), &["index.json", "it is no shard index"]);
    fs::write(&index, b"{\"schema_version\": \xff1}").unwrap();
    says(&open(dir.path()).unwrap_err(), &["cannot use shard index", "invalid utf-8"]);
}

#[test]
fn rows_of_another_kind_are_refused() {
    let dir = complete();
    let error = StageReader::<Example>::open(dir.path()).unwrap().get(0).unwrap_err();
    says(&error, &["expected examples, found labels"]);
    let error = StageDir::open(dir.path(), "extract", &choices()).unwrap_err();
    assert!(text_and_hint(&error).0.contains("was written by `label`, not by `extract`"));
}

#[test]
fn an_incomplete_or_absent_stage_cannot_be_read() {
    let dir = tempdir().unwrap();
    let (said, hint) = text_and_hint(&StageReader::<LabelRow>::open(dir.path()).err().unwrap());
    assert!(said.contains("there is no `index.json`") && hint.contains("run the stage"), "{said} {hint}");
    drop(open(dir.path()).unwrap());
    let (said, hint) = text_and_hint(&StageReader::<LabelRow>::open(dir.path()).err().unwrap());
    assert!(
        said.contains("is not complete: it has 0 labels") && hint.contains("proxykv-train label"),
        "{said} {hint}"
    );
}

#[test]
fn clearing_leaves_the_files_of_others() {
    let dir = complete();
    for name in ["notes.txt", "my-table.parquet", "labels-00003.parquet.tmp"] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    StageDir::clear(dir.path()).unwrap();
    assert_eq!(files(dir.path()).keys().collect::<Vec<_>>(), ["my-table.parquet", "notes.txt"]);
}

#[test]
fn a_stage_whose_files_vanish_while_it_is_written_is_not_complete() {
    type Vanish = fn(&Path);
    let one_shard: Vanish = |dir| fs::remove_file(dir.join("labels-00000.parquet")).unwrap();
    let all: Vanish = |dir| fs::remove_dir_all(dir).unwrap();
    for (vanish, expected) in
        [(one_shard, "it is named by the index, but is not there"), (all, "cannot write")]
    {
        for rows in [2 * SHARD_ROWS, 2 * SHARD_ROWS + 1] {
            let dir = tempdir().unwrap();
            let stage = dir.path().join("labels");
            let mut writer =
                StageWriter::new(open(&stage).unwrap(), SHARD_ROWS, StoreDtype::F16, Some(rows as u64))
                    .unwrap();
            (0..rows).for_each(|i| writer.push(label(i)).unwrap());
            vanish(&stage);
            let (said, hint) = text_and_hint(&writer.finish().unwrap_err());
            assert!(said.contains(expected) || said.contains("is not there"), "{said}");
            assert!(!hint.is_empty(), "{said}");
            assert!(!StageDir::read(&stage).is_ok_and(|stage| stage.is_complete()));
        }
    }
}
