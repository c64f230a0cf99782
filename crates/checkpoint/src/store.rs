//! The folder of checkpoints: saving, rotation, the latest, the best.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::{Fingerprint, hinted};
use pkv_files::{Held, TEMPORARY, WriteBudget, lock_dir, push, remove_whole, sync_dir, write_error};
use pkv_shard::StaleError;
use tch::Device;

use crate::state::{self, CheckpointInfo, LR_CUTS, TrainingState};

/// Checkpoints of one training run, `step-001000/` and so on.
///
/// A folder with that name is whole: it is written as `step-001000.tmp/`, fsynced and renamed. The
/// last `keep` are kept, and the best.
#[derive(Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    fingerprint: Fingerprint,
    keep: usize,
    budget: WriteBudget,
    /// Held while training; readers have none.
    _lock: Option<Held>,
}

impl CheckpointStore {
    /// Open `dir` for training; create it if absent. Removes what an interrupted save left.
    ///
    /// # Errors
    /// - [`StaleError`] (with a hint) if a checkpoint was made with other choices;
    /// - another process trains here; the folder cannot be written.
    pub fn open(dir: &Path, fingerprint: &Fingerprint, keep: usize) -> Result<Self> {
        ensure!(keep > 0, "at least one checkpoint must be kept");
        fs::create_dir_all(dir).with_context(|| format!("cannot create folder `{}`", dir.display()))?;
        let lock = lock_dir(dir)?;
        let this = Self {
            dir: dir.to_path_buf(),
            fingerprint: fingerprint.clone(),
            keep,
            budget: WriteBudget::from_env(),
            _lock: Some(lock),
        };
        for folder in this.folders()? {
            if folder.to_string_lossy().ends_with(TEMPORARY) {
                tracing::info!(folder = %folder.display(), "removing what an interrupted run left");
                remove(&folder)?;
            }
        }
        for (_, folder) in this.steps()? {
            // A damaged one is passed over here; `latest` warns of it.
            if let Ok(info) = CheckpointInfo::read(&folder) {
                this.check_fresh(&info)?;
            }
        }
        Ok(this)
    }

    /// Open `dir` for reading, whatever its choices were.
    ///
    /// # Errors
    /// There is no such folder.
    pub fn read_only(dir: &Path) -> Result<Self> {
        ensure!(
            dir.is_dir(),
            hinted(
                format!("there are no checkpoints: `{}` does not exist", dir.display()),
                "train first: `proxykv-train train`"
            )
        );
        let (fingerprint, budget) = (Fingerprint::new(), WriteBudget::unlimited());
        Ok(Self { dir: dir.to_path_buf(), fingerprint, keep: usize::MAX, budget, _lock: None })
    }

    /// Let writes fail once `budget` is spent, as on a full disk.
    pub fn with_write_budget(mut self, budget: WriteBudget) -> Self {
        self.budget = budget;
        self
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Save `state`, then remove what is neither among the last nor the best.
    ///
    /// # Errors
    /// The disk is full or fails: the checkpoints that were there are still there.
    pub fn save(&self, state: &TrainingState) -> Result<PathBuf> {
        ensure!(self._lock.is_some(), "`{}` was opened for reading", self.dir.display());
        let folder = self.dir.join(format!("step-{:06}", state.step));
        let temporary = self.dir.join(format!("step-{:06}{TEMPORARY}", state.step));
        let result = self.write(state, &temporary, &folder);
        if result.is_err() {
            // Its bytes may be what the disk lacks; if it cannot go, the next run removes it.
            let _ = remove_whole(&temporary);
        }
        result.with_context(|| format!("cannot save checkpoint `{}`", folder.display()))?;
        // In a working copy, the new one is put before old ones go.
        push(&folder)?;
        self.rotate()?;
        push(&self.dir)?;
        Ok(folder)
    }

    fn write(&self, state: &TrainingState, temporary: &Path, folder: &Path) -> Result<()> {
        let io = |e: io::Error| write_error(folder, e);
        remove_whole(temporary).map_err(io)?;
        fs::create_dir(temporary).map_err(io)?;
        state::write(temporary, state, &self.fingerprint, &self.budget)?;
        if folder.exists() {
            // A damaged one that training passed a second time.
            retire(folder)?;
        }
        fs::rename(temporary, folder).map_err(io)?;
        sync_dir(&self.dir).map_err(io)
    }

    /// The newest checkpoint that is whole; damaged ones are warned of and passed over.
    ///
    /// # Errors
    /// The folder cannot be listed, or the checkpoint was made with other choices.
    pub fn latest(&self, device: Device) -> Result<Option<TrainingState>> {
        let newest_first = self.steps()?.into_iter().rev().map(|(_, folder)| folder);
        self.first_whole(newest_first, device, false)
    }

    /// The checkpoint whose validation was best (the earliest of equals), or the latest if none
    /// was validated; damaged ones are warned of and passed over.
    ///
    /// # Errors
    /// As [`CheckpointStore::latest`]; or a checkpoint cannot be read now: it may be whole, and the best.
    pub fn best(&self, device: Device) -> Result<Option<TrainingState>> {
        let readable = |(folder, info): (PathBuf, Result<CheckpointInfo>)| match info {
            Err(e) if may_be_whole(&e) => Err(unreadable(e, &folder)),
            info => Ok((folder, info)),
        };
        let all = self.folders_and_infos()?.into_iter().map(readable).collect::<Result<_>>()?;
        let latest = self.steps()?.into_iter().rev().map(|(_, folder)| folder);
        let best_first = validated(all).into_iter().map(|(folder, _)| folder);
        self.first_whole(best_first.chain(latest), device, true)
    }

    /// The best validation so far: its step and value.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn best_validation(&self) -> Result<Option<(u64, f64)>> {
        let best = validated(self.folders_and_infos()?).into_iter().next();
        Ok(best.map(|(_, info)| (info.step, info.validation.unwrap_or(f64::NEG_INFINITY))))
    }

    /// Remove checkpoints of steps after `step`: they were damaged, and training comes by again.
    ///
    /// # Errors
    /// A folder cannot be removed.
    pub fn discard_after(&self, step: u64) -> Result<()> {
        let mut later = self.steps()?.into_iter().filter(|(s, _)| *s > step);
        later.try_for_each(|(_, folder)| retire(&folder))
    }

    /// Every readable checkpoint, by step.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn list(&self) -> Result<Vec<CheckpointInfo>> {
        Ok(self.folders_and_infos()?.into_iter().filter_map(|(_, info)| info.ok()).collect())
    }

    /// Every checkpoint by step, and what its `state.json` says, or why it cannot be read.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn folders_and_infos(&self) -> Result<Vec<(PathBuf, Result<CheckpointInfo>)>> {
        let read = |(_, folder): (u64, PathBuf)| {
            let info = CheckpointInfo::read(&folder);
            (folder, info)
        };
        Ok(self.steps()?.into_iter().map(read).collect())
    }

    fn first_whole(
        &self,
        folders: impl Iterator<Item = PathBuf>,
        device: Device,
        none_unreadable: bool,
    ) -> Result<Option<TrainingState>> {
        for folder in folders {
            match state::read(&folder, device) {
                Ok((info, state)) => {
                    if self._lock.is_some() {
                        self.check_fresh(&info)?;
                    }
                    return Ok(Some(state));
                }
                Err(e) if none_unreadable && may_be_whole(&e) => return Err(unreadable(e, &folder)),
                Err(e) => pass_over(&folder, &e),
            }
        }
        Ok(None)
    }

    fn check_fresh(&self, info: &CheckpointInfo) -> Result<()> {
        let differences = info.differences(&self.fingerprint);
        if differences.is_empty() {
            return Ok(());
        }
        let anew = "train again with `--redo train`, or keep them and set another `name` in the recipe";
        let hint = if differences.iter().all(|(key, ..)| key == LR_CUTS) {
            let step = info.step;
            format!(
                "cut at step {step} or later, or remove `step-{step:06}` to go on from what is older; or {anew}"
            )
        } else {
            anew.to_owned()
        };
        let context = hinted(
            format!(
                "the checkpoints in `{}` were trained with other choices than this run's",
                self.dir.display()
            ),
            hint,
        );
        let stale = StaleError { stage: "train".to_owned(), dir: self.dir.clone(), differences };
        Err(anyhow::Error::new(stale).context(context))
    }

    fn rotate(&self) -> Result<()> {
        let all = self.folders_and_infos()?;
        let old: Vec<PathBuf> = all[..all.len().saturating_sub(self.keep)]
            .iter()
            .filter(|(_, info)| !info.as_ref().is_err_and(may_be_whole))
            .map(|(folder, _)| folder.clone())
            .collect();
        let best = validated(all).into_iter().next().map(|(folder, _)| folder);
        old.iter().filter(|folder| best.as_ref() != Some(folder)).try_for_each(|folder| retire(folder))
    }

    /// Whole checkpoints in the order of their steps.
    fn steps(&self) -> Result<Vec<(u64, PathBuf)>> {
        let step = |folder: &Path| folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        let mut out: Vec<(u64, PathBuf)> =
            self.folders()?.into_iter().filter_map(|f| Some((step(&f)?, f))).collect();
        out.sort();
        Ok(out)
    }

    fn folders(&self) -> Result<Vec<PathBuf>> {
        let context = || format!("cannot list folder `{}`", self.dir.display());
        let mut out = Vec::new();
        for entry in fs::read_dir(&self.dir).with_context(context)? {
            let path = entry.with_context(context)?.path();
            match fs::metadata(&path) {
                Ok(found) if found.is_dir() => out.push(path),
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(context),
                _ => {}
            }
        }
        Ok(out)
    }
}

/// Validated checkpoints, best first; those that cannot be read are warned of.
fn validated(all: Vec<(PathBuf, Result<CheckpointInfo>)>) -> Vec<(PathBuf, CheckpointInfo)> {
    let mut out: Vec<_> = all
        .into_iter()
        .filter_map(|(folder, info)| match info {
            Ok(info) => Some((folder, info)),
            Err(e) => {
                pass_over(&folder, &e);
                None
            }
        })
        .filter(|(_, info)| info.validation.is_some_and(|v| !v.is_nan()))
        .collect();
    // Stable, and in the order of the steps before: of equals the earliest comes first.
    out.sort_by(|(_, a), (_, b)| {
        let value = |i: &CheckpointInfo| i.validation.unwrap_or(f64::NEG_INFINITY);
        value(b).total_cmp(&value(a))
    });
    out
}

fn pass_over(folder: &Path, why: &anyhow::Error) {
    tracing::warn!("passing over checkpoint `{}`: {why:#}", folder.display());
}

fn unreadable(why: anyhow::Error, folder: &Path) -> anyhow::Error {
    why.context(hinted(
        format!("checkpoint `{}` cannot be read, and may be the best", folder.display()),
        "run the same command again; if it stays unreadable, remove that folder, and the best of the others is read",
    ))
}

/// Whether a checkpoint may be whole, and the best: it cannot be read now, and nothing says that it is
/// damaged.
fn may_be_whole(e: &anyhow::Error) -> bool {
    let mut causes = e.chain().filter_map(|c| c.downcast_ref::<io::Error>());
    causes.any(|e| e.raw_os_error().is_some() && e.kind() != io::ErrorKind::NotFound)
}

/// Remove a checkpoint so that a process killed meanwhile leaves no half of it under its name.
fn retire(folder: &Path) -> Result<()> {
    let mut name = folder.as_os_str().to_owned();
    name.push(".old");
    name.push(TEMPORARY);
    let retired = PathBuf::from(name);
    remove(&retired)?;
    fs::rename(folder, &retired).with_context(|| format!("cannot rename `{}`", folder.display()))?;
    remove(&retired)
}

fn remove(folder: &Path) -> Result<()> {
    remove_whole(folder).with_context(|| format!("cannot remove `{}`", folder.display()))
}
