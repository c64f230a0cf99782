//! A stage in pieces ends in the bytes of one that was written as a whole, whatever happens between.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use pkv_core::{StoreDtype, Task};
use pkv_files::WriteBudget;
use pkv_shard::{
    Claimed, Ended, FailedRow, LabelRow, Pieces, PiecesPlan, PiecesState, Seal, StageDir, StageReader,
    StageState, StaleError, Worker, check_row,
};
use tempfile::{TempDir, tempdir};

use crate::common::*;

const ROWS: u64 = 30;
/// 30 rows, 8 to a shard.
const PIECES: u64 = 4;

fn plan() -> PiecesPlan {
    PiecesPlan::new("label", &choices(), ROWS, SHARD_ROWS as u64).unwrap()
}

fn worker(task: &str) -> Worker {
    Worker { task: task.parse().unwrap(), device: "cpu".to_owned() }
}

/// `None` if the stage is complete.
fn open(dir: &Path, task: &str) -> Option<Pieces> {
    Pieces::open(dir, plan(), worker(task)).unwrap()
}

/// Make a piece; the number of rows that were computed.
fn make(pieces: &Pieces, shard: u64) -> anyhow::Result<u64> {
    let Claimed::Free(piece) = pieces.claim(shard)? else { return Ok(0) };
    let mut writer = pieces.writer::<LabelRow>(&piece, StoreDtype::F16);
    for i in piece.rows.clone() {
        let row = label(i as usize);
        check_row(&row, StoreDtype::F16)?;
        writer.push(row)?;
    }
    let done = piece.rows.end - piece.rows.start;
    let ended = Ended { done, file: writer.publish()?, tokens: 10 * done, ..Ended::default() };
    let marker = pieces.end(piece, ended)?;
    assert_eq!((marker.rows, marker.done, marker.skipped, marker.failed.len()), (done, done, 0, 0));
    Ok(done)
}

/// What a task makes; the number of rows that it computed, and whether the stage is complete then.
fn run(dir: &Path, task: &str) -> (u64, bool) {
    let Some(pieces) = open(dir, task) else { return (0, true) };
    let mine: Vec<u64> = pieces.plan().of_task(pieces.task()).collect();
    let made = mine.into_iter().map(|shard| make(&pieces, shard).unwrap()).sum();
    (made, matches!(pieces.seal().unwrap(), Seal::Done(_)))
}

/// The folder that one process leaves that writes the stage as a whole.
fn whole() -> BTreeMap<String, Vec<u8>> {
    let dir = tempdir().unwrap();
    write_labels(StageDir::open(dir.path(), "label", &choices()).unwrap(), ROWS as usize).unwrap();
    files(dir.path())
}

/// All of a folder, and that no folder of pieces is left in it.
fn sealed(dir: &TempDir) -> BTreeMap<String, Vec<u8>> {
    assert!(!dir.path().join("pieces").exists());
    files(dir.path())
}

#[test]
fn any_number_of_tasks_in_any_order_gives_the_same_bytes() {
    let expected = whole();
    for n in [1, 3, 5] {
        for backwards in [false, true] {
            let dir = tempdir().unwrap();
            let mut tasks: Vec<String> = (0..n).map(|k| format!("{k}/{n}")).collect();
            if backwards {
                tasks.reverse();
            }
            let ran: Vec<(u64, bool)> = tasks.iter().map(|task| run(dir.path(), task)).collect();
            assert_eq!(ran.iter().map(|(made, _)| made).sum::<u64>(), ROWS);
            assert!(ran.last().unwrap().1 && sealed(&dir) == expected, "{tasks:?}");
            // Later starts find it complete.
            assert!(tasks.iter().all(|task| run(dir.path(), task) == (0, true)));
            assert_eq!(StageReader::<LabelRow>::open(dir.path()).unwrap().get(29).unwrap(), label(29));
        }
    }
}

#[test]
fn a_process_that_dies_costs_the_piece_in_its_hands() {
    let expected = whole();
    let dir = tempdir().unwrap();
    let pieces = open(dir.path(), "0/1").unwrap();
    assert_eq!((make(&pieces, 0).unwrap(), make(&pieces, 2).unwrap()), (8, 8));
    // It has rows of piece 1 on disk, under a temporary name, and says who it is.
    let Claimed::Free(piece) = pieces.claim(1).unwrap() else { panic!() };
    piece.touch();
    let left = dir.path().join("pieces/labels-00001.parquet.4711-1.tmp");
    fs::write(&left, "half of a shard").unwrap();
    let state = PiecesState::read(dir.path()).unwrap().unwrap();
    assert_eq!((state.missing(), state.done_rows(), state.begun.len()), (vec![1, 3], 16, 1));
    assert_eq!(state.begun[0].by.as_ref().unwrap().pid, std::process::id());
    assert_eq!((state.begun[0].shard, state.task_of(1).unwrap()), (1, Task::ALL));
    // While it lives, another process of the same task makes the rest.
    let other = open(dir.path(), "0/1").unwrap();
    assert!(matches!(other.claim(1).unwrap(), Claimed::Elsewhere));
    assert!(matches!(other.claim(2).unwrap(), Claimed::Ended(marker) if marker.shard == 2));
    assert_eq!(make(&other, 3).unwrap(), 6);
    assert!(matches!(other.seal().unwrap(), Seal::Missing(m) if m.what.ends_with("missing: 1")));
    drop(piece);
    assert_eq!(make(&other, 1).unwrap(), 8);
    assert!(!left.exists(), "what was left of the piece is removed");
    let Seal::Done(Some(totals)) = other.seal().unwrap() else { panic!() };
    assert_eq!((totals.pieces, totals.tokens), (PIECES, 10 * ROWS));
    assert!(sealed(&dir) == expected);
    // The first process finds the stage complete.
    assert!(matches!(pieces.claim(1).unwrap(), Claimed::Sealed));
    assert!(matches!(pieces.seal().unwrap(), Seal::Done(None)));
}

#[test]
fn a_process_that_is_stopped_keeps_the_rows_of_its_piece() {
    let expected = whole();
    let read = StoreDtype::F16;
    for damage in ["", "cut", "other bytes", "no record"] {
        let dir = tempdir().unwrap();
        let pieces = open(dir.path(), "0/1").unwrap();
        let Claimed::Free(piece) = pieces.claim(1).unwrap() else { panic!() };
        assert!(pieces.kept::<LabelRow>(&piece).is_empty());
        let mut writer = pieces.writer::<LabelRow>(&piece, read);
        (8..13).for_each(|i| writer.push(label(i)).unwrap());
        writer.keep().unwrap();
        drop((piece, pieces));
        let (file, record) =
            (dir.path().join("labels-00001.parquet"), dir.path().join("pieces/00001.rest.json"));
        let mut bytes = fs::read(&file).unwrap();
        match damage {
            "cut" => fs::write(&file, &bytes[..bytes.len() / 2]).unwrap(),
            "other bytes" => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&file, &bytes).unwrap();
            }
            "no record" => fs::remove_file(&record).unwrap(),
            _ => {}
        }
        let state = PiecesState::read(dir.path()).unwrap().unwrap();
        assert_eq!((state.missing().len() as u64, state.done_rows()), (PIECES, 0), "a rest is no piece");
        let pieces = open(dir.path(), "0/1").unwrap();
        let Claimed::Free(piece) = pieces.claim(1).unwrap() else { panic!() };
        let kept = pieces.kept::<LabelRow>(&piece);
        assert_eq!(kept.len(), if damage.is_empty() { 5 } else { 0 }, "{damage}");
        let mut writer = pieces.writer::<LabelRow>(&piece, read);
        let first = 8 + kept.len();
        kept.into_iter().chain((first..16).map(label)).for_each(|row| writer.push(row).unwrap());
        let ended = Ended { done: 8, file: writer.publish().unwrap(), tokens: 80, ..Ended::default() };
        pieces.end(piece, ended).unwrap();
        assert!(!record.exists());
        [0, 2, 3].iter().for_each(|&shard| assert!(make(&pieces, shard).unwrap() > 0));
        assert!(matches!(pieces.seal().unwrap(), Seal::Done(_)));
        assert!(sealed(&dir) == expected, "{damage}");
    }
}

#[test]
fn a_shard_without_its_marker_is_made_again() {
    let dir = tempdir().unwrap();
    run(dir.path(), "0/2");
    fs::remove_file(dir.path().join("pieces/00002.json")).unwrap();
    assert_eq!(run(dir.path(), "1/2"), (14, false));
    assert_eq!(run(dir.path(), "0/2"), (8, true));
    assert!(sealed(&dir) == whole());
}

#[test]
fn several_processes_may_seal_at_once() {
    let expected = whole();
    for _ in 0..20 {
        let dir = tempdir().unwrap();
        let all: Vec<Pieces> = (0..6).map(|_| open(dir.path(), "0/1").unwrap()).collect();
        for shard in 0..PIECES {
            make(&all[0], shard).unwrap();
        }
        std::thread::scope(|s| {
            for pieces in &all {
                s.spawn(|| assert!(matches!(pieces.seal().unwrap(), Seal::Done(_))));
            }
        });
        assert!(sealed(&dir) == expected);
    }
}

/// The disk fills up at every point in turn: inside a shard, in a marker, in the index.
#[test]
fn of_processes_that_end_at_once_one_or_more_seal() {
    let expected = whole();
    for _ in 0..50 {
        let dir = tempdir().unwrap();
        let all: Vec<Pieces> =
            (0..PIECES).map(|k| open(dir.path(), &format!("{k}/{PIECES}")).unwrap()).collect();
        let (start, sealed_by) = (Barrier::new(all.len()), AtomicU64::new(0));
        std::thread::scope(|s| {
            for (shard, pieces) in (0..).zip(&all) {
                let (start, sealed_by) = (&start, &sealed_by);
                s.spawn(move || {
                    start.wait();
                    make(pieces, shard).unwrap();
                    if let Seal::Done(_) = pieces.seal().unwrap() {
                        sealed_by.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(sealed_by.load(Ordering::SeqCst) > 0, "no process found all pieces");
        assert!(sealed(&dir) == expected);
    }
}

#[test]
fn markers_are_read_a_few_times_each_however_many_processes_there_are() {
    const TASKS: u64 = 40;
    const PIECES: u64 = 3 * TASKS;
    let dir = tempdir().unwrap();
    let plan = PiecesPlan::new("label", &choices(), PIECES, 1).unwrap();
    let mut reads = Vec::new();
    for k in 0..TASKS {
        let pieces =
            Pieces::open(dir.path(), plan.clone(), worker(&format!("{k}/{TASKS}"))).unwrap().unwrap();
        pieces.plan().of_task(pieces.task()).for_each(|shard| assert_eq!(make(&pieces, shard).unwrap(), 1));
        match pieces.seal().unwrap() {
            Seal::Done(_) => assert_eq!(k, TASKS - 1),
            Seal::Missing(missing) => {
                let next = 2 * TASKS + k + 1;
                assert_eq!(missing.what, format!("not all of 120 pieces are there: piece {next} is missing"));
                assert!(missing.command.contains(&format!("--task {}/{TASKS}", k + 1)), "{missing:?}");
            }
        }
        reads.push(pieces.markers_read());
    }
    // Of its own three pieces: once when it begins, twice when it claims; then its neighbour's last one. The
    // one that ends last looks for the last one of each and reads all.
    assert!(reads.iter().all(|n| *n <= 10 + TASKS + PIECES), "{reads:?}");
    assert!(reads[..39].iter().all(|n| *n <= 10), "{reads:?}");
    assert_eq!(StageReader::<LabelRow>::open(dir.path()).unwrap().len(), PIECES);
}

#[test]
fn a_full_disk_at_any_point_is_an_error_and_the_next_run_continues() {
    let expected = whole();
    let total: usize = expected.values().map(Vec::len).sum();
    let (mut failed, mut kept) = (0, 0);
    for budget in (0..2 * total as u64).step_by(1499) {
        let dir = tempdir().unwrap();
        let pieces = open(dir.path(), "0/1").unwrap().with_write_budget(WriteBudget::bytes(budget));
        let all = (0..PIECES).try_for_each(|shard| make(&pieces, shard).map(drop));
        if let Err(error) = all.and_then(|()| pieces.seal().map(drop)) {
            failed += 1;
            let (said, hint) = text_and_hint(&error);
            assert!(said.starts_with(&format!("cannot write `{}/", dir.path().display())), "{said}");
            assert!(hint.contains("free some space"), "{hint}");
        }
        drop(pieces);
        let (made, complete) = run(dir.path(), "0/1");
        kept += u64::from(made < ROWS);
        assert!(complete && sealed(&dir) == expected, "after {budget} bytes");
    }
    assert!(failed > 8 && kept > 5, "{failed} failed, {kept} kept something");
}

#[test]
fn a_failed_piece_is_tried_again_by_the_next_process_alone() {
    let dir = tempdir().unwrap();
    let fail = |pieces: &Pieces| {
        let Claimed::Free(piece) = pieces.claim(1).unwrap() else { panic!("it is tried") };
        let failed = vec![FailedRow { row: 9, id: "doc-9-0".to_owned(), error: "no memory".to_owned() }];
        pieces.end(piece, Ended { failed, ..Ended::default() }).unwrap()
    };
    let first = open(dir.path(), "0/1").unwrap();
    let marker = fail(&first);
    assert_eq!((marker.rows, marker.done, marker.skipped, marker.failed[0].row), (8, 0, 7, 9));
    assert!(matches!(first.claim(1).unwrap(), Claimed::Ended(marker) if !marker.is_done()));
    for shard in [0, 2, 3] {
        make(&first, shard).unwrap();
    }
    let Seal::Missing(missing) = first.seal().unwrap() else { panic!("a row is lost") };
    assert!(missing.what.ends_with("missing: 1"), "{missing:?}");
    drop(first);
    let second = open(dir.path(), "0/1").unwrap();
    fail(&second);
    assert!(matches!(second.claim(1).unwrap(), Claimed::Ended(_)), "once in each process");
    drop(second);
    assert_eq!(run(dir.path(), "0/1"), (8, true));
    assert!(sealed(&dir) == whole());
}

#[test]
fn damaged_markers_and_lost_shards_count_as_missing() {
    for damage in ["marker cut", "digit", "of another piece", "shard gone", "shard cut", "plan"] {
        let dir = tempdir().unwrap();
        run(dir.path(), "0/2");
        let (marker, shard) = (dir.path().join("pieces/00002.json"), dir.path().join("labels-00002.parquet"));
        let text = fs::read_to_string(&marker).unwrap();
        let lost = match damage {
            "marker cut" => fs::write(&marker, &text[..text.len() / 2]).map(|()| 1),
            "digit" => fs::write(&marker, text.replace("\"done\":8", "\"done\":7")).map(|()| 1),
            "of another piece" => fs::copy(dir.path().join("pieces/00000.json"), &marker).map(|_| 1),
            "shard gone" => fs::remove_file(&shard).map(|()| 1),
            "shard cut" => fs::write(&shard, "cut").map(|()| 1),
            _ => fs::write(dir.path().join("pieces/plan.json"), "{").map(|()| 0),
        };
        assert_eq!(run(dir.path(), "1/2"), (14, lost.unwrap() == 0), "{damage}");
        let again = if damage == "plan" { 0 } else { 8 };
        assert_eq!(run(dir.path(), "0/2"), (again, true), "{damage}");
        assert!(sealed(&dir) == whole(), "{damage}");
    }
}

#[test]
fn what_was_written_as_a_whole_is_taken_over() {
    for rows in [8, 11, 29] {
        let dir = tempdir().unwrap();
        let stage = StageDir::open(dir.path(), "label", &choices()).unwrap();
        let mut writer = pkv_shard::StageWriter::new(stage, SHARD_ROWS, StoreDtype::F16, Some(ROWS)).unwrap();
        (0..rows).for_each(|i| writer.push(label(i)).unwrap());
        writer.keep().unwrap();
        // What a process that is killed leaves.
        fs::write(dir.path().join("labels-00007.parquet.tmp"), "half a shard").unwrap();
        fs::write(dir.path().join("labels-00007.parquet"), "a shard that no index names").unwrap();
        let made: Vec<(u64, bool)> = ["0/2", "1/2"].map(|task| run(dir.path(), task)).into();
        let whole_shards = rows / SHARD_ROWS * SHARD_ROWS;
        assert_eq!(made.iter().map(|m| m.0).sum::<u64>(), ROWS - whole_shards as u64);
        assert!(made[1].1 && sealed(&dir) == whole(), "{rows}");
    }
}

#[test]
fn a_stage_is_written_as_a_whole_or_in_pieces_and_not_in_both_ways_at_once() {
    let dir = tempdir().unwrap();
    let stage = StageDir::open(dir.path(), "label", &choices()).unwrap();
    let (said, _) = text_and_hint(&Pieces::open(dir.path(), plan(), worker("0/3")).unwrap_err());
    assert!(said.contains("another process writes"), "{said}");
    drop(stage);
    let pieces = open(dir.path(), "1/3").unwrap();
    let (said, _) = text_and_hint(&StageDir::open(dir.path(), "label", &choices()).unwrap_err());
    assert!(said.contains("another process writes"), "{said}");
    assert!(StageDir::clear(dir.path()).is_err(), "nothing is removed that is being made");
    make(&pieces, 1).unwrap();
    drop(pieces);
    // Not at work any more, but begun: which pieces are missing, and what makes them.
    for refused in [
        StageDir::open(dir.path(), "label", &choices()).unwrap_err(),
        StageDir::read(dir.path()).map(drop).unwrap_err(),
    ] {
        let (said, hint) = text_and_hint(&refused);
        assert!(said.contains("1 of 4 shards are there; missing: 0, 2, 3"), "{said}");
        assert!(
            hint.contains("`proxykv-train label --task 0/3`, `proxykv-train label --task 2/3`"),
            "{hint}"
        );
    }
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Partial(8));
    assert!(StageDir::is_in_pieces(dir.path()));
    StageDir::clear(dir.path()).unwrap();
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Absent);
    assert!(files(dir.path()).is_empty() && !dir.path().join("pieces").exists());
}

#[test]
fn pieces_of_other_choices_are_never_mixed() {
    let other = choices().with("other", 1);
    let others = PiecesPlan::new("label", &other, ROWS, SHARD_ROWS as u64).unwrap();
    let dir = tempdir().unwrap();
    // Nothing is there to be lost yet.
    drop(Pieces::open(dir.path(), others.clone(), worker("0/1")).unwrap());
    run(dir.path(), "0/2");
    let refused = Pieces::open(dir.path(), others.clone(), worker("0/1")).unwrap_err();
    assert!(refused.downcast_ref::<StaleError>().is_some(), "{refused:#}");
    assert!(matches!(StageDir::state(dir.path(), &other).unwrap(), StageState::Stale(_)));
    run(dir.path(), "1/2");
    let refused = Pieces::open(dir.path(), others, worker("0/1")).unwrap_err();
    assert!(refused.downcast_ref::<StaleError>().is_some(), "{refused:#}");
    assert!(sealed(&dir) == whole());
}

#[test]
fn a_stage_without_rows_is_complete_at_once() {
    let dir = tempdir().unwrap();
    let plan = PiecesPlan::new("label", &choices(), 0, 8).unwrap();
    let pieces = Pieces::open(dir.path(), plan, worker("2/3")).unwrap().unwrap();
    assert!(matches!(pieces.seal().unwrap(), Seal::Done(Some(totals)) if totals.pieces == 0));
    assert_eq!(StageDir::state(dir.path(), &choices()).unwrap(), StageState::Complete(0));
}
