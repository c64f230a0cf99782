//! A process that dies at any moment costs nothing but time.

use std::fs;
use std::time::Duration;

use pkv_files::WriteBudget;
use pkv_shard::{LabelRow, StageDir, StageReader};
use pkv_test_support::kill::{FOLDER, kill};
use tempfile::{TempDir, tempdir};

use crate::common::*;

const ROWS: usize = 30;
/// Rows of the process that is killed: ten shards.
const MANY_ROWS: usize = 10 * SHARD_ROWS;

fn open(dir: &TempDir) -> StageDir {
    StageDir::open(dir.path(), "label", &choices()).unwrap()
}

/// How many shards bear their names, in the index or not.
fn shards(dir: &TempDir) -> usize {
    let names = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.ends_with(".parquet")).count()
}

/// The folder that an unbroken run leaves.
fn unbroken(rows: usize) -> TempDir {
    let dir = tempdir().unwrap();
    write_labels(open(&dir), rows).unwrap();
    dir
}

/// The disk fills up at every point of the run in turn: inside a shard, between a shard's rename
/// and its index entry, inside the index.
#[test]
fn a_full_disk_at_any_point_is_an_error_and_the_next_run_continues() {
    let whole = files(unbroken(ROWS).path());
    let total: usize = whole.values().map(Vec::len).sum();
    let (mut failures, mut resumed) = (0, 0);
    for budget in (0..2 * total as u64).step_by(499) {
        let dir = tempdir().unwrap();
        if let Err(error) = write_labels(open(&dir).with_write_budget(WriteBudget::bytes(budget)), ROWS) {
            failures += 1;
            let (said, hint) = text_and_hint(&error);
            assert!(said.starts_with(&format!("cannot write `{}/", dir.path().display())), "{said}");
            assert!(hint.contains("free some space"), "{hint}");
            assert!(files(dir.path()).keys().all(|f| !f.ends_with(".tmp")), "a temporary file was left");
        }
        let stage = open(&dir);
        resumed += usize::from(stage.rows() > 0 && !stage.is_complete());
        if !stage.is_complete() {
            write_labels(stage, ROWS).unwrap();
        }
        assert_eq!(files(dir.path()), whole, "after {budget} bytes");
    }
    assert!(failures > 20 && resumed > 10, "{failures} failures, {resumed} resumed in the middle");
}

#[test]
fn a_shard_renamed_but_not_indexed_is_made_again() {
    let whole = files(unbroken(ROWS).path());
    let dir = tempdir().unwrap();
    let stage = open(&dir);
    // What a process killed between rename and index leaves, and what one killed before rename does.
    fs::write(dir.path().join("labels-00000.parquet"), &whole["labels-00000.parquet"]).unwrap();
    fs::write(dir.path().join("labels-00001.parquet.tmp"), "half").unwrap();
    fs::write(dir.path().join("index.json.tmp"), "{").unwrap();
    drop(stage);
    let stage = open(&dir);
    assert_eq!(stage.rows(), 0);
    assert_eq!(files(dir.path()).keys().collect::<Vec<_>>(), ["index.json"]);
    write_labels(stage, ROWS).unwrap();
    assert_eq!(files(dir.path()), whole);
}

/// Asked to stop after every number of rows in turn, and once more after what is there by then.
#[test]
fn an_orderly_stop_keeps_all_rows_and_changes_no_byte() {
    let whole = files(unbroken(ROWS).path());
    let writer = |dir: &TempDir, shard_rows| {
        pkv_shard::StageWriter::new(open(dir), shard_rows, pkv_core::StoreDtype::F16, Some(ROWS as u64))
            .unwrap()
    };
    for first in 0..ROWS {
        let dir = tempdir().unwrap();
        for stop in [first, first, (first + 2).min(ROWS - 1)] {
            let mut writer = writer(&dir, SHARD_ROWS);
            (writer.rows() as usize..stop).for_each(|i| writer.push(label(i)).unwrap());
            writer.keep().unwrap();
        }
        let at_work = (first + 2).min(ROWS - 1) % SHARD_ROWS;
        assert_eq!(
            StageDir::read(dir.path()).unwrap().index().rest.as_ref().map_or(0, |r| r.rows),
            at_work as u64
        );
        // One that dies with the rows in its hands loses none of them.
        drop(writer(&dir, SHARD_ROWS));
        write_labels(open(&dir), ROWS).unwrap();
        assert_eq!(files(dir.path()), whole, "stopped after {first}");
    }
}

#[test]
fn kept_rows_that_are_damaged_or_of_other_choices_are_made_again() {
    let whole = files(unbroken(ROWS).path());
    for stop in [2, SHARD_ROWS + 2] {
        for damage in ["flipped", "cut", "gone", "other choices"] {
            let dir = tempdir().unwrap();
            let stage = match damage {
                "other choices" => StageDir::open(dir.path(), "label", &choices().with("other", 1)).unwrap(),
                _ => open(&dir),
            };
            let mut writer =
                pkv_shard::StageWriter::new(stage, SHARD_ROWS, pkv_core::StoreDtype::F16, Some(30)).unwrap();
            (0..stop).for_each(|i| writer.push(label(i)).unwrap());
            writer.keep().unwrap();
            let rest = StageDir::read(dir.path()).unwrap().index().rest.clone().unwrap().file;
            let (path, mut bytes) = (dir.path().join(&rest), fs::read(dir.path().join(&rest)).unwrap());
            match damage {
                "flipped" => bytes[100] ^= 1,
                "cut" => bytes.truncate(100),
                _ => {}
            }
            fs::write(&path, bytes).unwrap();
            if damage == "gone" {
                fs::remove_file(&path).unwrap();
            }
            if damage == "other choices" && stop > SHARD_ROWS {
                assert!(StageDir::open(dir.path(), "label", &choices()).is_err());
                continue;
            }
            write_labels(open(&dir), ROWS).unwrap();
            assert_eq!(files(dir.path()), whole, "{damage}, after {stop}");
        }
    }
}

#[test]
fn a_run_that_ends_early_is_not_complete() {
    let dir = tempdir().unwrap();
    let mut writer =
        pkv_shard::StageWriter::new(open(&dir), SHARD_ROWS, pkv_core::StoreDtype::F16, Some(30)).unwrap();
    (0..12).for_each(|i| writer.push(label(i)).unwrap());
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().contains("has 12 labels, expected 30"), "{error:#}");
    assert!(!StageDir::read(dir.path()).unwrap().is_complete());
}

#[test]
fn two_processes_do_not_write_one_folder() {
    let dir = tempdir().unwrap();
    let _first = open(&dir);
    let (said, hint) = text_and_hint(&StageDir::open(dir.path(), "label", &choices()).unwrap_err());
    assert!(said.contains("another process writes") && hint.contains("another run name"), "{said}");
    assert!(StageDir::clear(dir.path()).is_err());
    // Reading is no writing.
    StageDir::read(dir.path()).unwrap();
}

/// SIGKILL at random moments.
#[test]
fn a_killed_process_is_continued_by_the_next() {
    let whole = files(unbroken(MANY_ROWS).path());
    let mut dir = tempdir().unwrap();
    let mut seen = Vec::new();
    for attempt in 0u64.. {
        assert!(attempt < 60, "no progress: {seen:?}");
        let (before, delay) = (shards(&dir), Duration::from_millis(attempt * 17 % 60));
        kill("crash::child", dir.path(), || shards(&dir) > before, delay);
        let rows = if dir.path().join("index.json").exists() { open(&dir).rows() } else { 0 };
        seen.push(rows);
        if rows == MANY_ROWS as u64 && seen.len() > 2 {
            break;
        }
        if rows == MANY_ROWS as u64 {
            // On a busy machine it may be done before this process gets to kill it.
            dir = tempdir().unwrap();
            seen.clear();
        }
    }
    if !open(&dir).is_complete() {
        write_labels(open(&dir), MANY_ROWS).unwrap();
    }
    assert_eq!(files(dir.path()), whole);
    assert_eq!(StageReader::<LabelRow>::open(dir.path()).unwrap().get(29).unwrap(), label(29));
    assert!(seen.len() > 2, "the process was never killed in the middle: {seen:?}");
}

/// Not a test: the process that the test above kills. It works slowly.
#[test]
#[ignore = "run by a_killed_process_is_continued_by_the_next"]
fn child() {
    let dir = std::env::var(FOLDER).expect("run by a_killed_process_is_continued_by_the_next");
    let stage = StageDir::open(dir.as_ref(), "label", &choices()).unwrap();
    let done = stage.rows() as usize;
    let mut writer =
        pkv_shard::StageWriter::new(stage, SHARD_ROWS, pkv_core::StoreDtype::F16, Some(MANY_ROWS as u64))
            .unwrap();
    for i in done..MANY_ROWS {
        writer.push(label(i)).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    writer.finish().unwrap();
}

#[test]
fn a_complete_stage_is_open_to_all() {
    let dir = unbroken(ROWS);
    let (one, other) = (open(&dir), open(&dir));
    assert!(one.is_complete() && other.is_complete());
    let different = StageDir::open(dir.path(), "label", &choices().with("more", 1)).unwrap_err();
    assert!(text_and_hint(&different).0.contains("other choices"), "{different:#}");
    drop((one, other));
    fs::remove_file(dir.path().join("labels-00000.parquet")).unwrap();
    assert!(StageDir::open(dir.path(), "label", &choices()).is_err(), "a shard is gone");
}
