//! A stage in pieces, which any number of processes make: the folder `pieces/` in the stage's folder.
//!
//! A piece is one shard. `plan.json` says how many there are and what they are made with; `00003.json`, the
//! marker of piece 3, is written when it has ended; `00003.lock` without a marker is a piece that was begun,
//! and `00003.rest.json` says that a process which was stopped over it kept its first rows in the shard's
//! file. All but the locks hold their own hash. When every piece is done, the index is written and the folder
//! goes.
//!
//! This file reads; `join` begins, and `work` claims, writes and seals. An evaluation keeps the same folder,
//! with one piece for each context and no shards: what it measured is stored elsewhere.

mod join;
mod tally;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use pkv_core::{Fingerprint, Task, seal, unseal};
use pkv_files::{WriteBudget, write_file_among};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::tally::{MAX_FAILURES, Tally};
pub use self::work::{Claimed, Ended, Piece, PieceWriter, Pieces, Seal, Totals, Worker};

use crate::dir::check_size;
use crate::index::ShardEntry;

/// Version of plan and markers. Raise it when either changes meaning.
const VERSION: u32 = 1;

const FOLDER: &str = "pieces";
const PLAN_FILE: &str = "plan.json";

/// What the pieces of a stage are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PiecesPlan {
    version: u32,
    /// The command: `label`, `extract`, `eval`.
    pub stage: String,
    /// Of the whole stage.
    pub rows: u64,
    pub shard_rows: u64,
    /// Number of pieces.
    pub shards: u64,
    /// Every choice that the rows depend on.
    pub fingerprint: Fingerprint,
}

/// A process at work on a piece.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Signature {
    /// `1/3`.
    pub task: String,
    pub device: String,
    pub host: String,
    pub pid: u32,
    /// Seconds since 1970.
    pub begun: u64,
}

/// The end of a piece.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Marker {
    version: u32,
    /// Hash of the plan's fingerprint: markers of other choices count as absent.
    made: String,
    pub shard: u64,
    /// First row, and number of rows: `done`, `skipped` and the failed ones together.
    pub first: u64,
    pub rows: u64,
    pub done: u64,
    /// Not stored, because a row of their shard failed.
    pub skipped: u64,
    pub failed: Vec<FailedRow>,
    /// The shard; absent if a row failed, and where there are no shards.
    pub file: Option<ShardEntry>,
    pub tokens: u64,
    #[serde(flatten)]
    pub by: Signature,
    /// Wall-clock time.
    pub secs: f64,
}

/// A row that could not be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailedRow {
    pub row: u64,
    /// Of its example.
    pub id: String,
    /// The error and its causes.
    pub error: String,
}

/// A piece that was begun and has not ended: its process is at work or has died.
#[derive(Clone, Debug, PartialEq)]
pub struct Begun {
    pub shard: u64,
    /// Absent if it cannot be read.
    pub by: Option<Signature>,
    /// When its process last gave a sign of life.
    pub alive: Option<SystemTime>,
}

/// What the folder says of a stage that is not sealed.
#[derive(Clone, Debug)]
pub struct PiecesState {
    pub plan: PiecesPlan,
    /// Of pieces that have ended, in order.
    pub markers: Vec<Marker>,
    pub begun: Vec<Begun>,
}

impl PiecesPlan {
    /// `rows` in pieces of `shard_rows`.
    ///
    /// # Errors
    /// `shard_rows` is 0.
    pub fn new(stage: &str, fingerprint: &Fingerprint, rows: u64, shard_rows: u64) -> Result<Self> {
        ensure!(shard_rows > 0, "a shard must have at least one row");
        let (stage, shards) = (stage.to_owned(), rows.div_ceil(shard_rows));
        Ok(Self { version: VERSION, stage, rows, shard_rows, shards, fingerprint: fingerprint.clone() })
    }

    /// Rows of a piece.
    pub fn rows_of(&self, shard: u64) -> std::ops::Range<u64> {
        let first = (shard * self.shard_rows).min(self.rows);
        first..(first + self.shard_rows).min(self.rows)
    }

    /// Pieces of a task.
    pub fn of_task(&self, task: Task) -> impl Iterator<Item = u64> + use<> {
        (0..self.shards).filter(move |&shard| task.has(shard))
    }

    fn made(&self) -> String {
        self.fingerprint.hash()
    }
}

impl Marker {
    /// Whether all of its rows are there.
    pub fn is_done(&self) -> bool {
        self.done == self.rows
    }

    /// Whether it is about a piece of `plan`, and what it counts adds up.
    fn check(&self, plan: &PiecesPlan, shard: u64) -> Result<()> {
        ensure!(self.version == VERSION, "expected version {VERSION}, found {}", self.version);
        ensure!(self.made == plan.made(), "it was made with other choices");
        let (rows, failed) = (plan.rows_of(shard), self.failed.len() as u64);
        ensure!(
            (self.shard, self.first, self.rows) == (shard, rows.start, rows.end - rows.start),
            "it is of another piece"
        );
        ensure!(
            self.done.checked_add(self.skipped).and_then(|n| n.checked_add(failed)) == Some(self.rows),
            "{} done, {} skipped and {failed} failed rows are not {}",
            self.done,
            self.skipped,
            self.rows
        );
        Ok(())
    }
}

impl PiecesState {
    /// The state of a stage's folder; `None` if it has no pieces.
    ///
    /// A marker that is damaged, of other choices, or whose shard is not there counts as absent.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn read(stage_folder: &Path) -> Result<Option<Self>> {
        let folder = folder(stage_folder);
        // One listing says all of a bucket's: markers, and the sizes of shards.
        pkv_files::pull(stage_folder)?;
        let plan: Option<PiecesPlan> = read_sealed_here(&folder.join(PLAN_FILE))?;
        let Some(plan) = plan.filter(|plan| plan.version == VERSION) else { return Ok(None) };
        let context = || format!("cannot list folder `{}`", folder.display());
        let (mut markers, mut locks) = (BTreeMap::new(), BTreeMap::new());
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // Sealed meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(context),
        };
        for entry in entries {
            let name = entry.with_context(context)?.file_name();
            let Some((number, kind)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
            let Some(shard) = number.parse::<u64>().ok().filter(|shard| *shard < plan.shards) else {
                continue;
            };
            match kind {
                "json" => markers.extend(read_marker_here(stage_folder, &plan, shard).map(|m| (shard, m))),
                // The second one is a claim of another machine, in a working copy.
                "lock" | "lock.lease" => drop(locks.insert(shard, folder.join(&name))),
                _ => {}
            }
        }
        let begun = locks.iter().filter(|(shard, _)| !markers.contains_key(*shard));
        let begun = begun.map(|(&shard, path)| Begun {
            shard,
            by: pkv_core::read_small_text(path).ok().and_then(|text| serde_json::from_str(&text).ok()),
            alive: fs::metadata(path).and_then(|m| m.modified()).ok(),
        });
        let begun = begun.collect();
        Ok(Some(Self { plan, markers: markers.into_values().collect(), begun }))
    }

    /// Rows that are there.
    pub fn done_rows(&self) -> u64 {
        self.markers.iter().map(|m| m.done).sum()
    }

    /// Pieces that are not done, in order.
    pub fn missing(&self) -> Vec<u64> {
        let done: Vec<u64> = self.markers.iter().filter(|m| m.is_done()).map(|m| m.shard).collect();
        (0..self.plan.shards).filter(|shard| done.binary_search(shard).is_err()).collect()
    }

    /// The task that piece `shard` was dealt to, as far as its process or those of other pieces tell.
    pub fn task_of(&self, shard: u64) -> Option<Task> {
        let signatures = self.markers.iter().map(|m| &m.by).chain(self.begun.iter().flat_map(|b| &b.by));
        let tasks = signatures.filter_map(|by| by.task.parse::<Task>().ok());
        tasks.max_by_key(|task| task.count()).map(|task| task.that_has(shard))
    }

    /// Which pieces are not done, and the command that makes them.
    pub fn what_is_missing(&self) -> Missing {
        let missing = self.missing();
        let tasks = missing.iter().filter_map(|&shard| self.task_of(shard)).collect();
        self.plan.missing(&missing, tasks)
    }
}

impl PiecesPlan {
    /// Piece `absent` of `task` is missing, and perhaps others.
    fn not_all(&self, absent: u64, task: Task) -> Missing {
        Missing {
            what: format!("not all of {} pieces are there: piece {absent} is missing", self.shards),
            command: format!(
                "the process that makes the last one completes the stage; `proxykv-train {} --task {task}` makes that piece, \
                 and `proxykv-train launch status` counts them",
                self.stage
            ),
        }
    }

    /// Pieces `missing` in words, of `tasks`.
    fn missing(&self, missing: &[u64], mut tasks: Vec<Task>) -> Missing {
        tasks.sort_unstable();
        tasks.dedup();
        let command = |task: &Task| format!("`proxykv-train {} --task {task}`", self.stage);
        let mut commands: Vec<String> = tasks.iter().take(SHOWN).map(command).collect();
        if tasks.len() > SHOWN {
            commands.push(format!("{} more tasks", tasks.len() - SHOWN));
        }
        let noun = if self.shard_rows == 1 { "contexts" } else { "shards" };
        let mut shards: Vec<String> = missing.iter().take(SHOWN).map(u64::to_string).collect();
        if missing.len() > SHOWN {
            shards.push(format!("{} more", missing.len() - SHOWN));
        }
        let done = self.shards - missing.len() as u64;
        Missing {
            what: match missing.is_empty() {
                true => format!("all {done} {noun} are there, and the stage is not sealed"),
                false => {
                    format!("{done} of {} {noun} are there; missing: {}", self.shards, shards.join(", "))
                }
            },
            command: match tasks.is_empty() {
                true => format!("`proxykv-train {}` makes what is missing", self.stage),
                false => format!(
                    "run {} with the same recipe, or `proxykv-train {}` to make all of it here",
                    commands.join(", "),
                    self.stage
                ),
            },
        }
    }
}

/// Numbers that a sentence lists.
const SHOWN: usize = 6;

/// What a stage in pieces lacks, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    pub what: String,
    /// For a hint.
    pub command: String,
}

/// The pieces of a stage's folder.
pub(crate) fn folder(stage_folder: &Path) -> PathBuf {
    stage_folder.join(FOLDER)
}

/// Whether a stage's folder holds pieces.
pub(crate) fn exist(stage_folder: &Path) -> bool {
    let plan = folder(stage_folder).join(PLAN_FILE);
    if let Err(e) = pkv_files::refresh(&plan) {
        tracing::debug!("{e:#}");
    }
    plan.exists()
}

fn marker_path(stage_folder: &Path, shard: u64) -> PathBuf {
    folder(stage_folder).join(format!("{shard:05}.json"))
}

fn read_plan(stage_folder: &Path) -> Result<Option<PiecesPlan>> {
    let path = folder(stage_folder).join(PLAN_FILE);
    let plan: Option<PiecesPlan> = read_sealed(&path)?;
    Ok(plan.filter(|plan| plan.version == VERSION))
}

/// The marker of a piece, if it is one, and its shard is there.
fn read_marker(stage_folder: &Path, plan: &PiecesPlan, shard: u64) -> Option<Marker> {
    if let Err(e) = pkv_files::refresh(&marker_path(stage_folder, shard)) {
        tracing::warn!("piece {shard} counts as missing: {e:#}");
        return None;
    }
    read_marker_here(stage_folder, plan, shard)
}

/// As [`read_marker`], as it is on this machine.
fn read_marker_here(stage_folder: &Path, plan: &PiecesPlan, shard: u64) -> Option<Marker> {
    let path = marker_path(stage_folder, shard);
    let read = || -> Result<Option<Marker>> {
        let Some(marker) = read_sealed_here::<Marker>(&path)? else { return Ok(None) };
        marker.check(plan, shard)?;
        if let Some(file) = &marker.file {
            check_size(stage_folder, &plan.stage, file)?;
        }
        Ok(Some(marker))
    };
    read().unwrap_or_else(|e| {
        tracing::warn!("piece {shard} counts as missing: cannot use `{}`: {e:#}", path.display());
        None
    })
}

/// A record with its own hash; `None` if it is absent or, with a warning, damaged.
fn read_sealed<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    pkv_files::refresh(path)?;
    read_sealed_here(path)
}

fn read_sealed_here<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match pkv_core::read_small_text(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read `{}`", path.display())),
    };
    let parse = || -> Result<T> {
        let mut value: Value = serde_json::from_str(&text)?;
        unseal(&mut value)?;
        Ok(serde_json::from_value(value)?)
    };
    Ok(parse()
        .inspect_err(|e| tracing::warn!("`{}` is damaged and counts as absent: {e:#}", path.display()))
        .ok())
}

/// The piece of a marker's name.
fn piece_of(name: &str) -> Option<u64> {
    name.strip_suffix(".json")?.parse().ok()
}

/// Write a record into the folder of pieces, beside other processes.
fn write_sealed(path: &Path, record: &impl Serialize, budget: &WriteBudget) -> Result<()> {
    let text = seal(&serde_json::to_string(record).context("cannot write a record as JSON")?) + "\n";
    write_file_among(path, pkv_files::parent(path), text.as_bytes(), budget).map(drop)
}
