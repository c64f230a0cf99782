//! Pieces at work: claimed, written, and at the end sealed by the process that finds all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use pkv_core::{StoreDtype, Task, hinted};
use pkv_files::{Claim, Held, TEMPORARY, WriteBudget, is_changed, pull, refresh};
use pkv_files::{remove_there, share_dir, write_file_among};
use serde::{Deserialize, Serialize};

use super::join::{Listed, join};
use super::{FailedRow, Marker, Missing, PiecesPlan, Signature, VERSION};
use super::{exist, folder, marker_path, piece_of, read_marker, read_marker_here, read_plan};
use super::{read_sealed, write_sealed};
use crate::StageReader;
use crate::dir::{StageDir, check_fresh, check_size, check_stage, sweep};
use crate::index::{INDEX_FILE, Index, ShardEntry};
use crate::row::Row;
use crate::writer::{ShardPlace, ShardWriter};

/// Most pieces whose names every process lists that ends.
const LISTED: u64 = 100;

/// A process's part in a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    pub task: Task,
    /// For the markers.
    pub device: String,
}

/// A stage's folder that is filled piece by piece.
///
/// While it is open the folder is held against processes that write a stage as a whole; each piece has a lock
/// of its own.
#[derive(Debug)]
pub struct Pieces {
    dir: PathBuf,
    plan: PiecesPlan,
    worker: Worker,
    /// Whole shards of a process that wrote the stage as a whole and was interrupted.
    named: Vec<ShardEntry>,
    /// As this process began.
    listed: Listed,
    /// Pieces that had failed before: they are tried again.
    failed_before: Mutex<BTreeSet<u64>>,
    markers_read: AtomicU64,
    budget: WriteBudget,
    _held: Held,
}

/// The answer to a claim.
#[derive(Debug)]
pub enum Claimed {
    /// The piece is the caller's.
    Free(Piece),
    /// It has ended.
    Ended(Marker),
    /// Another process has it.
    Elsewhere,
    /// The stage is complete.
    Sealed,
}

/// A piece in the caller's hands; others may have it when it is dropped.
#[derive(Debug)]
pub struct Piece {
    pub shard: u64,
    pub rows: Range<u64>,
    claim: Claim,
    by: Signature,
    start: Instant,
}

/// How a piece ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ended {
    pub done: u64,
    pub failed: Vec<FailedRow>,
    pub file: Option<ShardEntry>,
    pub tokens: u64,
}

/// All pieces together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    pub pieces: u64,
    pub tokens: u64,
    /// Of all processes.
    pub secs: f64,
}

/// The outcome of [`Pieces::seal`].
#[derive(Debug)]
pub enum Seal {
    /// The stage is complete; `None` if another process sealed it.
    Done(Option<Totals>),
    /// Pieces are missing: which, and the commands that make them.
    Missing(Missing),
}

impl Pieces {
    /// Open the folder `dir` of a stage of `rows` rows, made or continued; `None` if it is complete.
    ///
    /// # Errors
    /// - [`crate::StaleError`] (with a hint) if it was made with other choices;
    /// - a process writes it as a whole; index or plan cannot be read or written.
    pub fn open(dir: &Path, plan: PiecesPlan, worker: Worker) -> Result<Option<Self>> {
        let make = |folder: &Path| {
            fs::create_dir_all(folder).with_context(|| format!("cannot create folder `{}`", folder.display()))
        };
        make(dir)?;
        if is_complete(dir, &plan)? {
            return Ok(None);
        }
        let held = share_dir(dir)?;
        let budget = WriteBudget::from_env();
        let index = Index::read(dir)?;
        if let Some(index) = index.as_ref().filter(|index| !index.shards.is_empty()) {
            check_fresh(dir, &index.stage, &index.fingerprint, &plan.fingerprint)?;
        }
        make(&folder(dir))?;
        let listed = Listed::of(dir, &plan, worker.task)?;
        let failed_before = join(dir, &plan, worker.task, &listed, &budget)?;
        // The last piece may have ended just before the folder was made.
        if is_complete(dir, &plan)? {
            return Ok(None);
        }
        let named = index.map(|index| index.shards).unwrap_or_default();
        let failed_before = Mutex::new(failed_before);
        let looked_for = plan.of_task(worker.task).filter(|shard| listed.may_hold(*shard)).count();
        let (dir, markers_read) = (dir.to_path_buf(), AtomicU64::new(looked_for as u64));
        Ok(Some(Self { dir, plan, worker, named, listed, failed_before, markers_read, budget, _held: held }))
    }

    /// As [`Pieces::open`], for work whose outcomes are stored elsewhere: its pieces are marked for those who
    /// look on, and those of another plan are removed.
    ///
    /// # Errors
    /// The plan cannot be read or written.
    pub fn open_to_mark(dir: &Path, plan: PiecesPlan, worker: Worker) -> Result<Option<Self>> {
        if read_plan(dir)?.is_some_and(|found| found != plan) {
            remove_folder(dir);
        }
        Self::open(dir, plan, worker)
    }

    pub fn plan(&self) -> &PiecesPlan {
        &self.plan
    }

    pub const fn task(&self) -> Task {
        self.worker.task
    }

    /// Pieces of this process's task that are done, in order.
    pub fn done(&self) -> Vec<u64> {
        let marked = |&shard: &u64| self.listed.may_hold(shard) && self.is_marked(shard);
        self.plan.of_task(self.task()).filter(marked).collect()
    }

    /// Let writes fail once `budget` is spent, as on a full disk.
    pub fn with_write_budget(self, budget: WriteBudget) -> Self {
        Self { budget, ..self }
    }

    /// Claim a piece.
    ///
    /// # Errors
    /// Its lock file cannot be made, or the marker of a shard that is there cannot be written.
    pub fn claim(&self, shard: u64) -> Result<Claimed> {
        // One that ended since this process began is found once it is claimed.
        if self.listed.may_hold(shard)
            && let Some(marker) = self.ended(shard)
        {
            return Ok(Claimed::Ended(marker));
        }
        let path = folder(&self.dir).join(format!("{shard:05}.lock"));
        let mut claim = match Claim::take(&path) {
            Ok(Some(claim)) => claim,
            Ok(None) => return Ok(Claimed::Elsewhere),
            // Its folder has gone.
            Err(_) if is_sealed(&self.dir)? => return Ok(Claimed::Sealed),
            Err(e) => return Err(e),
        };
        // Who had the claim before may have ended the piece.
        if let Some(marker) = self.ended(shard) {
            return Ok(Claimed::Ended(marker));
        }
        if is_sealed(&self.dir)? {
            // The lock file was made while the folder was removed.
            remove_folder(&self.dir);
            return Ok(Claimed::Sealed);
        }
        self.failed_before.lock().unwrap_or_else(PoisonError::into_inner).remove(&shard);
        // Of a folder with many pieces, a list is long: only what was begun has left something.
        if claim.is_exclusive() && claim.was_signed() {
            self.sweep(shard);
        }
        let by = self.signature();
        // For readers elsewhere alone.
        let _ = claim.sign(&serde_json::to_string(&by)?);
        let piece = Piece { shard, rows: self.plan.rows_of(shard), claim, by, start: Instant::now() };
        let named = usize::try_from(shard).ok().and_then(|shard| self.named.get(shard));
        match named.filter(|file| check_size(&self.dir, &self.plan.stage, file).is_ok()) {
            Some(file) => {
                let ended = Ended { done: file.rows, file: Some(file.clone()), ..Ended::default() };
                self.end(piece, ended).map(Claimed::Ended)
            }
            None => Ok(Claimed::Free(piece)),
        }
    }

    /// A writer of the shard of `piece`.
    pub fn writer<R: Row>(&self, piece: &Piece, store: StoreDtype) -> PieceWriter<'_, R> {
        PieceWriter { pieces: self, shard: piece.shard, writer: ShardWriter::new(store) }
    }

    /// Rows of `piece` that a process kept which was asked to stop over it, from its first row on. They are
    /// to be written again, so that the shard has the bytes that it has without a stop.
    pub fn kept<R: Row>(&self, piece: &Piece) -> Vec<R> {
        let read = || -> Result<Vec<R>> {
            let Some(Rest { made, file }) = read_sealed(&rest_path(&self.dir, piece.shard))? else {
                return Ok(Vec::new());
            };
            ensure!(made == self.plan.made(), "they were made with other choices");
            check_size(&self.dir, &self.plan.stage, &file)?;
            let mut index = Index::new(&self.plan.stage, &self.plan.fingerprint);
            (index.complete, index.shards) = (true, vec![file]);
            StageReader::of(StageDir::of_index(&self.dir, index))?.iter().collect()
        };
        let rows = read().unwrap_or_else(|e| {
            tracing::warn!(
                "rows of piece {} that an earlier process kept are made again: {e:#}",
                piece.shard
            );
            Vec::new()
        });
        if !rows.is_empty() {
            tracing::info!("{}, piece {}: {} rows were there", self.plan.stage, piece.shard, rows.len());
        }
        rows
    }

    /// Mark a piece that was begun at `start` and needs no claim; see [`Pieces::open_to_mark`].
    ///
    /// # Errors
    /// As of [`Pieces::end`].
    pub fn mark(&self, shard: u64, start: Instant, ended: Ended) -> Result<()> {
        let marker = self.marker(shard, self.signature(), start, ended)?;
        match write_sealed(&marker_path(&self.dir, shard), &marker, &self.budget) {
            // Another process found all of them.
            Err(_) if !exist(&self.dir) => Ok(()),
            // On another machine.
            Err(e) if is_changed(&e) => Ok(()),
            written => written,
        }
    }

    /// Whether a piece has a marker that says it is done.
    pub fn is_marked(&self, shard: u64) -> bool {
        self.read(shard).is_some_and(|marker| marker.is_done())
    }

    /// Markers that this process has looked for and, where they were there, read.
    pub fn markers_read(&self) -> u64 {
        self.markers_read.load(Ordering::Relaxed)
    }

    fn read(&self, shard: u64) -> Option<Marker> {
        self.markers_read.fetch_add(1, Ordering::Relaxed);
        read_marker(&self.dir, &self.plan, shard)
    }

    /// Pieces `missing` in words, and the commands of as many tasks as this one is of that make them.
    pub fn missing(&self, missing: &[u64]) -> Missing {
        let tasks = missing.iter().map(|&shard| self.task().that_has(shard)).collect();
        self.plan.missing(missing, tasks)
    }

    /// Remove the pieces in `dir`, whose outcomes are stored elsewhere: all of them are done.
    pub fn discard(dir: &Path) {
        remove_folder(dir);
    }

    /// Write the marker of a piece. Rows that are neither done nor failed were skipped.
    ///
    /// # Errors
    /// There are more rows than the piece has, or the disk is full or fails.
    pub fn end(&self, piece: Piece, ended: Ended) -> Result<Marker> {
        let marker = self.marker(piece.shard, piece.by.clone(), piece.start, ended)?;
        let made = match write_sealed(&marker_path(&self.dir, piece.shard), &marker, &self.budget) {
            // A process elsewhere took this one for dead, and has made the same shard.
            Err(e) if is_changed(&e) => {
                let theirs = read_marker(&self.dir, &self.plan, piece.shard);
                theirs.filter(|theirs| theirs.is_done() || !marker.is_done()).ok_or(e)?
            }
            written => written.map(|()| marker)?,
        };
        // It goes with the folder, too.
        let _ = fs::remove_file(rest_path(&self.dir, piece.shard));
        Ok(made)
    }

    fn marker(&self, shard: u64, by: Signature, start: Instant, ended: Ended) -> Result<Marker> {
        let (Ended { done, failed, file, tokens }, of) = (ended, self.plan.rows_of(shard));
        let rows = of.end - of.start;
        let skipped = rows.checked_sub(done + failed.len() as u64).with_context(|| {
            format!("piece {shard} has {rows} rows, {done} done and {} failed", failed.len())
        })?;
        let secs = (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let (version, made, first) = (VERSION, self.plan.made(), of.start);
        Ok(Marker { version, made, shard, first, rows, done, skipped, failed, file, tokens, by, secs })
    }

    /// Make the stage complete, if every piece is done: write the index and remove the pieces' folder. Any
    /// number of processes may do so at once; all write the same bytes.
    ///
    /// Markers are read only where none of them is absent by name, which of a thousand processes that end one
    /// after another one or two find. Who writes the last marker looks after that, and finds all: a marker
    /// counts as absent only if it is looked for by its name after this process wrote its own.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn seal(&self) -> Result<Seal> {
        // Of many pieces the list is long, and the last piece of another task mostly says enough.
        let mut last_pieces = self.task().others().filter_map(|task| task.last_of(self.plan.shards));
        if self.plan.shards > LISTED
            && exist(&self.dir)
            && let Some(absent) = last_pieces.find(|&shard| self.is_absent(shard))
        {
            let missing = self.plan.not_all(absent, self.task().that_has(absent));
            return Ok(if is_sealed(&self.dir)? { Seal::Done(None) } else { Seal::Missing(missing) });
        }
        let Some(listed) = self.listed()? else {
            ensure!(
                is_sealed(&self.dir)?,
                hinted(
                    format!("`{}` was removed meanwhile", folder(&self.dir).display()),
                    "keep other programs out of it, and run the same command again"
                )
                .environment()
            );
            return Ok(Seal::Done(None));
        };
        let missing: Vec<u64> = (0..self.plan.shards).filter(|shard| !listed.contains(shard)).collect();
        // A list that is made while others write may lack what was there.
        if missing.iter().any(|&shard| self.is_absent(shard)) {
            return self.unless_sealed(&missing);
        }
        let read = |shard| {
            self.markers_read.fetch_add(1, Ordering::Relaxed);
            // The listing brought them.
            read_marker_here(&self.dir, &self.plan, shard).filter(Marker::is_done)
        };
        let markers: BTreeMap<u64, Marker> =
            (0..self.plan.shards).filter_map(|shard| Some((shard, read(shard)?))).collect();
        let shards: Vec<ShardEntry> = markers.values().flat_map(|m| m.file.clone()).collect();
        if shards.len() as u64 != self.plan.shards {
            let is_done = |shard: &u64| markers.get(shard).is_some_and(|m| m.file.is_some());
            let missing: Vec<u64> = (0..self.plan.shards).filter(|shard| !is_done(shard)).collect();
            return self.unless_sealed(&missing);
        }
        let totals = Totals {
            pieces: self.plan.shards,
            tokens: markers.values().map(|m| m.tokens).sum(),
            secs: markers.values().map(|m| m.secs).sum(),
        };
        // Before the index: a process that comes after it may write anew. One that wrote the stage as a whole
        // and died may have left a file without a name.
        sweep(&self.dir, shards.iter())?;
        let mut index = Index::new(&self.plan.stage, &self.plan.fingerprint);
        (index.rows_expected, index.complete, index.shards) = (Some(self.plan.rows), true, shards);
        let written =
            write_file_among(&self.dir.join(INDEX_FILE), &folder(&self.dir), &index.text()?, &self.budget);
        // Another process may have sealed it and removed the folder that the index is written in.
        if let Err(e) = written
            && !is_sealed(&self.dir)?
        {
            return Err(e);
        }
        remove_folder(&self.dir);
        Ok(Seal::Done(Some(totals)))
    }

    /// Whether a piece has no marker, by its name.
    fn is_absent(&self, shard: u64) -> bool {
        self.markers_read.fetch_add(1, Ordering::Relaxed);
        let path = marker_path(&self.dir, shard);
        if let Err(e) = refresh(&path) {
            tracing::debug!("{e:#}");
        }
        !path.exists()
    }

    /// Pieces whose markers are there, by the names in the folder; `None` if it has gone.
    fn listed(&self) -> Result<Option<BTreeSet<u64>>> {
        let folder = folder(&self.dir);
        // With the sizes of shards.
        pull(&self.dir)?;
        let context = || format!("cannot list folder `{}`", folder.display());
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(context),
        };
        let mut listed = BTreeSet::new();
        for entry in entries {
            let name = entry.with_context(context)?.file_name();
            listed.extend(name.to_str().and_then(piece_of));
        }
        // The folder's other record tells that it is being removed.
        Ok((exist(&self.dir) || !listed.is_empty()).then_some(listed))
    }

    /// The stage lacks `missing`, unless another process has just completed it.
    fn unless_sealed(&self, missing: &[u64]) -> Result<Seal> {
        Ok(if is_sealed(&self.dir)? { Seal::Done(None) } else { Seal::Missing(self.missing(missing)) })
    }

    /// The marker of a piece that has ended. One that failed before this process began has not.
    fn ended(&self, shard: u64) -> Option<Marker> {
        let marker = self.read(shard)?;
        let again = || self.failed_before.lock().unwrap_or_else(PoisonError::into_inner).contains(&shard);
        (marker.is_done() || !again()).then_some(marker)
    }

    /// Remove what a process left that died over a piece.
    fn sweep(&self, shard: u64) {
        let ours = [format!("{shard:05}."), format!("-{shard:05}.")];
        for entry in fs::read_dir(folder(&self.dir)).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_of_it = name.starts_with(&ours[0]) || name.contains(&ours[1]);
            if is_of_it && name.ends_with(TEMPORARY) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn signature(&self) -> Signature {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Signature {
            task: self.worker.task.to_string(),
            device: self.worker.device.clone(),
            host: host.trim().to_owned(),
            pid: std::process::id(),
            begun: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        }
    }
}

impl Piece {
    /// Give a sign of life.
    pub fn touch(&self) {
        self.claim.touch();
    }
}

/// Writes the rows of a piece, in order.
pub struct PieceWriter<'a, R: Row> {
    pieces: &'a Pieces,
    shard: u64,
    writer: ShardWriter<R>,
}

impl<R: Row> PieceWriter<'_, R> {
    /// Add a row that [`crate::check_row`] accepts.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn push(&mut self, row: R) -> Result<()> {
        self.writer.push(row, &place(self.pieces, self.shard, &folder(&self.pieces.dir)))
    }

    /// Keep the rows that were given for the next process that has the piece: [`Pieces::kept`]. For one that
    /// ends before the piece does.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn keep(mut self) -> Result<()> {
        let Pieces { dir, plan, budget, .. } = self.pieces;
        // Under the shard's own name, which the whole shard takes later: without a marker it is none.
        let temporary = folder(dir);
        let published = self.writer.publish(&place(self.pieces, self.shard, &temporary))?;
        let Some(file) = published else { return Ok(()) };
        write_sealed(&rest_path(dir, self.shard), &Rest { made: plan.made(), file }, budget)
    }

    /// Make the shard whole, with all of its rows; `None` if no row was given.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn publish(mut self) -> Result<Option<ShardEntry>> {
        self.writer.publish(&place(self.pieces, self.shard, &folder(&self.pieces.dir)))
    }
}

/// The first rows of a piece, in a file with the name of its shard.
#[derive(Debug, Serialize, Deserialize)]
struct Rest {
    /// Hash of the plan's fingerprint.
    made: String,
    file: ShardEntry,
}

fn rest_path(dir: &Path, shard: u64) -> PathBuf {
    folder(dir).join(format!("{shard:05}.rest.json"))
}

fn place<'a>(pieces: &'a Pieces, number: u64, temporary: &'a Path) -> ShardPlace<'a> {
    ShardPlace {
        dir: &pieces.dir,
        number,
        stage: &pieces.plan.stage,
        fingerprint: &pieces.plan.fingerprint,
        budget: &pieces.budget,
        temporary: Some(temporary),
    }
}

/// Whether the stage is complete, as `plan` has it; leftovers of its pieces are then removed.
fn is_complete(dir: &Path, plan: &PiecesPlan) -> Result<bool> {
    let Some(index) = Index::read(dir)? else { return Ok(false) };
    check_stage(dir, &index, &plan.stage)?;
    if !index.complete {
        return Ok(false);
    }
    check_fresh(dir, &index.stage, &index.fingerprint, &plan.fingerprint)?;
    index.shards.iter().try_for_each(|shard| check_size(dir, &index.stage, shard).map(drop))?;
    remove_folder(dir);
    Ok(true)
}

fn is_sealed(dir: &Path) -> Result<bool> {
    Ok(Index::read(dir)?.is_some_and(|index| index.complete))
}

/// Remove the pieces of a stage that is complete; a process that comes later finds the index first.
fn remove_folder(dir: &Path) {
    if let Err(e) = remove_there(&folder(dir)) {
        tracing::debug!("left `{}` to the next process: {e:#}", folder(dir).display());
    }
    match fs::remove_dir_all(folder(dir)) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            tracing::debug!("left `{}` to the next process: {e}", folder(dir).display());
        }
        _ => {}
    }
}
