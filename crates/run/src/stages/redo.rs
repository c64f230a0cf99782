//! What `--redo` does with a stage's old output: it is removed, but the mapper of `train` stays until there
//! is a new one.

use std::fs;

use anyhow::{Context, Result};
use pkv_shard::{Stage, StageDir};

use super::entry;
use super::eval::EvalOptions;
use crate::session::Session;

/// Remove a stage's output.
pub fn clear(s: &Session, stage: Stage, options: &EvalOptions) -> Result<()> {
    // An evaluation of an export has a folder of its own.
    let own = entry(stage).held.filter(|_| entry(stage).adds_up).map(|output| vec![output(s, options)]);
    let keeps = stage == Stage::Train && keep_old_mapper(s)?;
    for path in own.unwrap_or_else(|| stage.writes(&s.run)) {
        if keeps && path.exists() {
            let kept = s.run.before_redo().join(path.file_name().unwrap_or_default());
            fs::rename(&path, kept).with_context(|| format!("cannot move `{}`", path.display()))?;
            continue;
        }
        if path.is_symlink() || !s.run.shard_folders().contains(&path) {
            pkv_files::remove_there(&path)?;
        }
        if s.run.shard_folders().contains(&path) && !path.is_symlink() {
            StageDir::clear(&path)?;
            continue;
        }
        // A link leads to what several runs share: the others keep it.
        pkv_files::remove_whole(&path).with_context(|| format!("cannot remove `{}`", path.display()))?;
    }
    Ok(())
}

/// Make the folder for a mapper that is replaced. Whether it is to be kept: not where there is none, and not
/// where an older one is kept and this one is what an interrupted training left. A bucket keeps none.
fn keep_old_mapper(s: &Session) -> Result<bool> {
    let kept = s.run.before_redo();
    if kept.exists() || !s.run.checkpoints().is_dir() || pkv_files::is_mounted(&kept) {
        return Ok(false);
    }
    fs::create_dir(&kept).with_context(|| format!("cannot make the folder `{}`", kept.display()))?;
    Ok(true)
}

/// After a training: remove the mapper that it replaced, or say how to have it back.
pub fn after_train(s: &Session, is_trained: bool) -> Result<()> {
    let kept = s.run.before_redo();
    if is_trained {
        return pkv_files::remove_whole(&kept).with_context(|| format!("cannot remove `{}`", kept.display()));
    }
    if kept.exists() {
        tracing::info!(
            "the mapper from before `--redo train` is in `{}` until the new one is trained\nhint: go on without \
             `--redo train`; or to have the old one back: `cd {} && rm -rf checkpoints train tb && \
             mv before-redo/* . && rmdir before-redo`",
            kept.display(),
            s.run.root().display()
        );
    }
    Ok(())
}
