//! A stage as one of several processes makes it: the pieces of its task, one after another.
//!
//! A piece that another process has is waited for: if that process dies, the piece is made here. A row that
//! fails costs its shard, which is whole or absent, and the next pieces are tried; too many in a row end the
//! stage.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use pkv_core::{FailureKind, Fingerprint, StoreDtype, Task, hinted};
use pkv_gpu::{device_name, unless_exhausted};
use pkv_shard::{Claimed, Ended, MAX_FAILURES, Missing, Piece, PieceWriter, Pieces, PiecesPlan, Row};
use pkv_shard::{Seal, Stage, StageDir, Tally, Totals, Worker, check_row};

use super::pump::pump;
use crate::session::Session;

/// Interval between checks for other processes.
const PAUSE: Duration = Duration::from_millis(300);

/// How much of a stage is this process's, and when it gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// One of several tasks; `None` makes the stage as a whole, in order.
    pub task: Option<Task>,
    /// Failures in a row that end a stage.
    pub max_failures: usize,
}

impl Default for Part {
    fn default() -> Self {
        Self { task: None, max_failures: MAX_FAILURES }
    }
}

/// A stage's folder, opened to be filled.
pub(super) enum Opened {
    Complete,
    /// All rows in order.
    Whole(StageDir),
    Pieces(Pieces),
}

/// Open the folder of a stage of `rows` rows: in pieces if this process has a task, or others have begun so.
///
/// # Errors
/// Another process writes it in the other way, or it was made with other choices.
pub(super) fn open(
    s: &Session,
    stage: Stage,
    dir: &Path,
    fingerprint: &Fingerprint,
    rows: u64,
) -> Result<Opened> {
    if s.part.task.is_none() && !StageDir::is_in_pieces(dir) {
        let stage = StageDir::open(dir, stage.name(), fingerprint)?;
        return Ok(if stage.is_complete() { Opened::Complete } else { Opened::Whole(stage) });
    }
    Ok(open_part(s, stage, dir, fingerprint, rows)?.map_or(Opened::Complete, Opened::Pieces))
}

/// Open the folder of a stage of `rows` rows in pieces; `None` if it is complete.
///
/// # Errors
/// As of [`open`].
pub(super) fn open_part(
    s: &Session,
    stage: Stage,
    dir: &Path,
    fingerprint: &Fingerprint,
    rows: u64,
) -> Result<Option<Pieces>> {
    let plan = PiecesPlan::new(stage.name(), fingerprint, rows, s.recipe.data.shard_examples as u64)?;
    Pieces::open(dir, plan, worker(s, s.part.task.unwrap_or(Task::ALL)))
}

pub(super) fn worker(s: &Session, task: Task) -> Worker {
    Worker { task, device: device_name(s.device) }
}

/// How far a stage in pieces has come.
pub(super) enum Reached {
    /// It is complete; `None` if another process sealed it.
    Whole(Option<Totals>),
    /// What this task had to do is done.
    Part(Missing),
}

/// Have all pieces of this process's task: those that are there, those that others make, and the rest from
/// `make`. Then make the stage complete, if no piece of any task is missing.
///
/// # Errors
/// `make` fails, a row failed, or the disk.
pub(super) fn each(
    s: &Session,
    what: &str,
    pieces: &Pieces,
    mut make: impl FnMut(&Piece, &mut Tally) -> Result<Ended>,
) -> Result<Reached> {
    let (plan, task) = (pieces.plan(), pieces.task());
    let mut pending: Vec<u64> = plan.of_task(task).collect();
    let rows = |shard: u64| {
        let rows = plan.rows_of(shard);
        rows.end - rows.start
    };
    let there: Vec<u64> = pieces.done();
    let done = there.iter().map(|&shard| rows(shard)).sum();
    s.bar.start(what, pending.iter().map(|&shard| rows(shard)).sum(), done);
    let mut tally = Tally::new(s.part.max_failures);
    while !pending.is_empty() {
        let (mut elsewhere, mut worked) = (Vec::new(), false);
        for shard in pending {
            s.stop.check()?;
            match pieces.claim(shard)? {
                Claimed::Elsewhere => {
                    elsewhere.push(shard);
                    continue;
                }
                Claimed::Free(piece) => {
                    let ended = make(&piece, &mut tally)?;
                    tally.add(&pieces.end(piece, ended)?);
                    if tally.is_over() {
                        tally.finish(&plan.stage)?;
                    }
                }
                Claimed::Ended(marker) => {
                    tally.add_earlier(&marker);
                    if there.binary_search(&shard).is_err() {
                        s.bar.elsewhere(marker.rows);
                    }
                }
                Claimed::Sealed => {
                    tally.rows += rows(shard);
                    tally.skipped += rows(shard);
                }
            }
            worked = true;
        }
        if !worked && !elsewhere.is_empty() {
            s.stop.check()?;
            std::thread::sleep(PAUSE);
        }
        pending = elsewhere;
    }
    s.bar.finish();
    let sum = tally.finish(&plan.stage)?;
    tracing::info!("{what}, task {task}: {sum}");
    let sealed = pieces.seal()?;
    tracing::debug!("{what}: looked for {} markers", pieces.markers_read());
    Ok(match sealed {
        Seal::Done(totals) => Reached::Whole(totals),
        Seal::Missing(missing) => Reached::Part(missing),
    })
}

/// Keep the rows of a piece that ends early. Why it does is the error that the user sees.
pub(super) fn keep_piece<R: Row>(writer: PieceWriter<'_, R>) {
    if let Err(e) = writer.keep() {
        tracing::warn!("the {} of the piece in hand are lost: {e:#}", R::FILES);
    }
}

/// Make the shard of a piece: the rows `kept`, which are there, and after them those that pass through
/// `read`, one of `lanes` and `settle`, as [`pump`] does it. A process that ends early keeps its rows.
///
/// An error of a lane or of `settle`, or a row that cannot be stored, is the row's: it is recorded, and the
/// rest of the piece is passed over.
///
/// # Errors
/// `read` or the disk fails, or the user stopped.
pub(super) fn fill<I: Send, C: Send, R: Row>(
    s: &Session,
    (what, pieces, store): (&str, &Pieces, StoreDtype),
    (piece, kept, tally): (&Piece, Vec<R>, &mut Tally),
    read: impl Fn(u64) -> Result<(String, I)> + Send,
    lanes: Vec<impl FnMut(I) -> Result<C> + Send>,
    mut settle: impl FnMut(C) -> Result<R> + Send,
    positions: fn(&R) -> u32,
) -> Result<Ended> {
    let mut writer = pieces.writer::<R>(piece, store);
    let mut ended = Ended { done: kept.len() as u64, ..Ended::default() };
    let mut tokens = 0;
    for row in kept {
        tokens += u64::from(positions(&row));
        writer.push(row)?;
    }
    let first = piece.rows.start + ended.done;
    s.bar.advance(ended.done);
    let broken = AtomicBool::new(false);
    let is_stop = |e: &anyhow::Error| FailureKind::of(e) == FailureKind::Interrupted;
    let guarded = lanes.into_iter().map(|mut lane| {
        let broken = &broken;
        move |(row, id, item): (u64, String, I)| {
            s.stop.check()?;
            if broken.load(Ordering::Relaxed) {
                return Ok((row, id, None));
            }
            let outcome = unless_exhausted(|| lane(item))
                .and_then(|computed| computed.ok_or_else(|| exhausted().into()));
            match outcome {
                Err(e) if is_stop(&e) => Err(e),
                outcome => Ok((row, id, Some(outcome))),
            }
        }
    });
    let times = pump(
        s.device,
        first..piece.rows.end,
        move |row| read(row).map(|(id, item)| (row, id, item)),
        guarded.collect(),
        |(row, id, outcome): (u64, String, Option<Result<C>>)| {
            let Some(outcome) = outcome else { return Ok(()) };
            let made = outcome.and_then(&mut settle);
            match made.and_then(|row| check_row(&row, store).map(|()| row)) {
                Ok(row) => {
                    tally.succeeded();
                    if ended.failed.is_empty() {
                        tokens += u64::from(positions(&row));
                        writer.push(row)?;
                        ended.done += 1;
                        piece.touch();
                        s.bar.advance(1);
                    }
                    Ok(())
                }
                Err(e) if is_stop(&e) => Err(e),
                Err(e) => {
                    broken.store(true, Ordering::Relaxed);
                    ended.failed.push(tally.failed(row, &id, e));
                    Ok(())
                }
            }
        },
    );
    let times = match times {
        Ok(times) => times,
        Err(e) => {
            keep_piece(writer);
            return Err(e);
        }
    };
    tracing::debug!("{what}, piece {}: {times}", piece.shard);
    // A shard is whole or absent.
    match ended.failed.is_empty() {
        true => (ended.file, ended.tokens) = (writer.publish()?, tokens),
        false => ended.done = 0,
    }
    Ok(ended)
}

fn exhausted() -> pkv_core::Hinted {
    hinted(
        "memory ran out, of the GPU or of this machine",
        "smaller `label.prefill_chunk_tokens` or `extract.prefill_chunk_tokens` need less",
    )
    .environment()
}

/// Say what became of the rows of a stage that was made as a whole, where a failure ends it at once.
///
/// # Errors
/// Rows were lost.
pub(super) fn account(stage: Stage, rows: u64, done: u64, skipped: u64) -> Result<()> {
    let mut tally = Tally::new(1);
    (tally.rows, tally.done, tally.skipped) = (rows, done, skipped);
    let sum = tally.finish(stage.name())?;
    // Of a stage that was made at once, the next line says as much.
    if skipped > 0 {
        tracing::info!("{}: {sum}", stage.name());
    }
    Ok(())
}
