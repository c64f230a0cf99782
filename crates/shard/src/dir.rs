//! A stage's output folder: open, resume, check, clear.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Fingerprint, hinted};
use serde_json::Value;

use crate::index::{INDEX_FILE, Index, ShardEntry};
use crate::pieces::{self, PiecesState};
use pkv_files::{Held, TEMPORARY, WriteBudget, file_len, lock_dir, remove_there};
use pkv_files::{sha256_file, sync_dir, write_file};

/// A stage's folder and its index.
///
/// Opened for writing it holds a lock, so that two processes never write the same folder.
#[derive(Debug)]
pub struct StageDir {
    dir: PathBuf,
    index: Index,
    /// Released when dropped, or by the kernel when the process dies.
    lock: Option<Held>,
    budget: WriteBudget,
}

/// State of a stage's folder, compared with the settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum StageState {
    /// No index: nothing has been written.
    Absent,
    /// Made with other choices: dotted key, value there, value wanted.
    Stale(Vec<(String, Value, Value)>),
    /// Whole shards with this many rows; more are to come.
    Partial(u64),
    /// All of its rows.
    Complete(u64),
}

/// A stage's folder was made with other choices than this run's.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", describe(.differences))]
pub struct StaleError {
    /// `prepare`, `label`, `extract`.
    pub stage: String,
    pub dir: PathBuf,
    /// Dotted key, value in the folder, value of this run.
    pub differences: Vec<(String, Value, Value)>,
}

/// The first few differences in words.
fn describe(differences: &[(String, Value, Value)]) -> String {
    const SHOWN: usize = 4;
    let one = |(key, there, here): &(String, Value, Value)| {
        format!("`{key}` was {} when it was written and is {} now", short(there), short(here))
    };
    let mut text = differences.iter().take(SHOWN).map(one).collect::<Vec<_>>().join("; ");
    if differences.len() > SHOWN {
        text += &format!("; and {} more", differences.len() - SHOWN);
    }
    text
}

fn short(value: &Value) -> String {
    let text = if value.is_null() { "absent".to_owned() } else { value.to_string() };
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

impl StageDir {
    /// Open `dir` for writing; create it if absent, continue it if it was made with the same choices.
    ///
    /// Removes what an interrupted process left: temporary files and shards that the index does not
    /// name, and an index that names none. A stage that is complete is not written any more: any number
    /// of processes may open it, as runs that share their labels do.
    ///
    /// # Errors
    /// - [`StaleError`] (with a hint) if it was made with other choices;
    /// - another process writes it; the index is damaged or of another version; a shard that it
    ///   names is absent or has another size; the folder cannot be written.
    pub fn open(dir: &Path, stage: &str, fingerprint: &Fingerprint) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create folder `{}`", dir.display()))?;
        let budget = WriteBudget::from_env();
        let complete = Index::read(dir)?.filter(|index| index.complete);
        if let Some(index) = complete {
            check_stage(dir, &index, stage)?;
            check_fresh(dir, stage, &index.fingerprint, fingerprint)?;
            let this = Self { dir: dir.to_path_buf(), index, lock: None, budget };
            this.check_files()?;
            return Ok(this);
        }
        let lock = lock_dir(dir)?;
        if let Some(state) = PiecesState::read(dir)? {
            check_fresh(dir, stage, &state.plan.fingerprint, fingerprint)?;
            let missing = state.what_is_missing();
            bail!(hinted(
                format!("`{}` is made in pieces: {}", dir.display(), missing.what),
                missing.command
            ));
        }
        // A process that died before it wrote the plan leaves an empty folder.
        let _ = fs::remove_dir_all(pieces::folder(dir));
        let mut found = Index::read(dir)?;
        if let Some(index) = &found {
            check_stage(dir, index, stage)?;
        }
        // An index that names nothing has nothing to lose: a stage that failed before its first shard
        // starts anew, whatever the choices were.
        found.take_if(|index| {
            let kept = index.rest.is_some() && index.fingerprint.difference(fingerprint).is_empty();
            index.shards.is_empty() && !index.complete && !kept
        });
        if let Some(index) = &found {
            check_fresh(dir, stage, &index.fingerprint, fingerprint)?;
        }
        let is_new = found.is_none();
        let index = found.unwrap_or_else(|| Index::new(stage, fingerprint));
        let this = Self { dir: dir.to_path_buf(), index, lock: Some(lock), budget };
        this.check_files()?;
        sweep(dir, this.index.shards.iter().chain(&this.index.rest))?;
        if is_new {
            write_index(&this.dir, &this.index, &this.budget)?;
        }
        Ok(this)
    }

    /// Read the index of `dir`; nothing is changed.
    ///
    /// # Errors
    /// There is no index, or it is damaged or of another version.
    pub fn read(dir: &Path) -> Result<Self> {
        let index = Index::read(dir)?;
        if index.as_ref().is_none_or(|index| !index.complete)
            && let Some(state) = PiecesState::read(dir)?
        {
            let missing = state.what_is_missing();
            bail!(hinted(format!("`{}` is not complete: {}", dir.display(), missing.what), missing.command));
        }
        let index = index.with_context(|| {
            hinted(
                format!("there is no `{INDEX_FILE}` in `{}`", dir.display()),
                "run the stage that writes this folder first; `proxykv-train run` runs all of them",
            )
        })?;
        Ok(Self { dir: dir.to_path_buf(), index, lock: None, budget: WriteBudget::from_env() })
    }

    /// State of `dir`, compared with the settings of this run; nothing is changed.
    ///
    /// # Errors
    /// The index is damaged or of another version.
    pub fn state(dir: &Path, fingerprint: &Fingerprint) -> Result<StageState> {
        let index = Index::read(dir)?;
        if index.as_ref().is_none_or(|index| !index.complete)
            && let Some(state) = PiecesState::read(dir)?
        {
            let differences = state.plan.fingerprint.difference(fingerprint);
            return Ok(match differences.is_empty() {
                true => StageState::Partial(state.done_rows()),
                false => StageState::Stale(differences),
            });
        }
        let Some(index) = index else { return Ok(StageState::Absent) };
        let differences = index.fingerprint.difference(fingerprint);
        Ok(if !differences.is_empty() {
            StageState::Stale(differences)
        } else if index.complete {
            StageState::Complete(index.rows())
        } else {
            StageState::Partial(index.rows())
        })
    }

    /// Remove a stage's output, so that it is made again. Files that are not a stage's stay.
    ///
    /// # Errors
    /// Another process writes the folder, or a file cannot be removed.
    pub fn clear(dir: &Path) -> Result<()> {
        if !dir.exists() {
            return Ok(());
        }
        let _lock = lock_dir(dir)?;
        // The index first: shards without it are swept by the next `open`, an index without them is damage.
        let index = dir.join(INDEX_FILE);
        remove_there(&index)?;
        // In a working copy, shards and pieces that are not here as well.
        remove_there(dir)?;
        if index.exists() {
            fs::remove_file(&index).with_context(|| format!("cannot remove `{}`", index.display()))?;
            sync_dir(dir).with_context(|| format!("cannot sync `{}`", dir.display()))?;
        }
        let pieces = pieces::folder(dir);
        if pieces.exists() {
            fs::remove_dir_all(&pieces).with_context(|| format!("cannot remove `{}`", pieces.display()))?;
        }
        for name in stage_files(dir)? {
            remove(&dir.join(name))?;
        }
        Ok(())
    }

    /// Whether the stage is made in pieces, and not complete.
    pub fn is_in_pieces(dir: &Path) -> bool {
        pieces::exist(dir) && !Index::read(dir).is_ok_and(|index| index.is_some_and(|index| index.complete))
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    pub fn index(&self) -> &Index {
        &self.index
    }

    pub fn fingerprint(&self) -> &Fingerprint {
        &self.index.fingerprint
    }

    /// Rows in whole shards: where an interrupted stage continues.
    pub fn rows(&self) -> u64 {
        self.index.rows()
    }

    pub fn is_complete(&self) -> bool {
        self.index.complete
    }

    /// A complete stage of the rows alone that an orderly stop kept beside the whole shards.
    pub(crate) fn rest(&self) -> Option<Self> {
        let shards = vec![self.index.rest.clone()?];
        let index = Index { shards, rest: None, complete: true, ..self.index.clone() };
        Some(Self::of_index(&self.dir, index))
    }

    /// The shards that `index` names, for reading.
    pub(crate) fn of_index(dir: &Path, index: Index) -> Self {
        Self { dir: dir.to_path_buf(), index, lock: None, budget: WriteBudget::unlimited() }
    }

    /// Compare every shard with the hash in the index.
    ///
    /// # Errors
    /// A shard is absent or differs; the error names it.
    pub fn verify(&self) -> Result<()> {
        self.check_files()?;
        self.index.shards.iter().try_for_each(|s| check_hash(&self.dir, &self.index.stage, s))
    }

    /// Let writes fail once `budget` is spent, as on a full disk.
    pub fn with_write_budget(mut self, budget: WriteBudget) -> Self {
        self.budget = budget;
        self
    }

    pub(crate) fn write_budget(&self) -> &WriteBudget {
        &self.budget
    }

    /// Change the index, on disk first: memory never knows more than the disk.
    pub(crate) fn update(&mut self, change: impl FnOnce(&mut Index)) -> Result<()> {
        ensure!(self.lock.is_some(), "`{}` was opened for reading", self.dir.display());
        let mut next = self.index.clone();
        change(&mut next);
        write_index(&self.dir, &next, &self.budget)?;
        self.index = next;
        Ok(())
    }

    /// Every shard is there and has its size.
    pub(crate) fn check_files(&self) -> Result<()> {
        self.index.shards.iter().try_for_each(|s| check_size(&self.dir, &self.index.stage, s).map(drop))
    }
}

/// Remove a stage's files in `dir` that are not among `named`.
pub(crate) fn sweep<'a>(dir: &Path, named: impl Iterator<Item = &'a ShardEntry> + Clone) -> Result<()> {
    for name in stage_files(dir)? {
        if !named.clone().any(|shard| shard.file == name) {
            tracing::info!(file = %dir.join(&name).display(), "removing what an interrupted run left");
            remove(&dir.join(name))?;
        }
    }
    Ok(())
}

fn write_index(dir: &Path, index: &Index, budget: &WriteBudget) -> Result<()> {
    write_file(&dir.join(INDEX_FILE), &index.text()?, budget).map(drop)
}

pub(crate) fn check_stage(dir: &Path, index: &Index, stage: &str) -> Result<()> {
    ensure!(
        index.stage == stage,
        hinted(
            format!("`{}` was written by `{}`, not by `{stage}`", dir.display(), index.stage),
            "use another folder for this stage"
        )
    );
    Ok(())
}

pub(crate) fn check_fresh(dir: &Path, stage: &str, there: &Fingerprint, here: &Fingerprint) -> Result<()> {
    let differences = there.difference(here);
    if differences.is_empty() {
        return Ok(());
    }
    let stage = stage.to_owned();
    let context = hinted(
        format!("`{}` was made with other choices than this run's", dir.display()),
        format!(
            "give the same `--set` and `--data` as then, make it again with `--redo {stage}`, or keep it and set \
             another `name` in the recipe"
        ),
    );
    Err(anyhow::Error::new(StaleError { stage, dir: dir.to_path_buf(), differences }).context(context))
}

/// The shard's path, if the file is there and as long as the index says.
pub(crate) fn check_size(dir: &Path, stage: &str, shard: &ShardEntry) -> Result<PathBuf> {
    let path = dir.join(&shard.file);
    let damaged = || redo(format!("cannot use shard `{}`", path.display()), stage);
    let found =
        file_len(&path).context("it is named by the index, but is not there").with_context(damaged)?;
    ensure!(
        found == shard.bytes,
        anyhow::anyhow!("expected {} bytes, found {found}", shard.bytes).context(damaged())
    );
    Ok(path)
}

/// The shard is bit for bit what was written.
pub(crate) fn check_hash(dir: &Path, stage: &str, shard: &ShardEntry) -> Result<()> {
    let path = dir.join(&shard.file);
    let found = sha256_file(&path)?;
    ensure!(
        found == shard.sha256,
        anyhow::anyhow!("expected SHA-256 {}, found {found}: its bytes have changed", shard.sha256)
            .context(redo(format!("cannot use shard `{}`", path.display()), stage))
    );
    Ok(())
}

/// `message` with the hint to make the stage again.
pub(crate) fn redo(message: String, stage: &str) -> pkv_core::Hinted {
    hinted(message, format!("make the stage again with `--redo {stage}`, or put the file back from a copy"))
}

/// Names of files that only a stage writes: temporary ones and `<rows>-<5 digits>.parquet`.
fn stage_files(dir: &Path) -> Result<Vec<String>> {
    let context = || format!("cannot list folder `{}`", dir.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(context)? {
        let name = entry.with_context(context)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(TEMPORARY) || is_shard(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn is_shard(name: &str) -> bool {
    let Some((_, number)) = name.strip_suffix(".parquet").and_then(|n| n.rsplit_once('-')) else {
        return false;
    };
    number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit())
}

/// Remove a file, unless another process has.
fn remove(path: &Path) -> Result<()> {
    remove_there(path)?;
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove `{}`", path.display()))
        }
        _ => Ok(()),
    }
}
