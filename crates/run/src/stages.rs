//! The stages of a run, one file each, and what they have in common.

mod beside;
pub mod eval;
pub mod export;
pub mod extract;
mod generated;
pub mod hidden;
pub mod label;
mod lanes;
pub mod prepare;
mod pump;
pub mod report;
mod start_from;
mod to_host;
pub mod train;

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pkv_core::{Fingerprint, hinted};
use pkv_shard::durable::lock_work;
use pkv_shard::{Row, Stage, StageDir, StageState, StageWriter};
use serde_json::Value;

use crate::pair;
use crate::session::Session;
use crate::sweep::Output;

/// Outcome of a stage.
pub enum Outcome {
    /// It worked; key numbers for `run.json` and the log.
    Done(Value),
    /// Its output was complete already.
    Skipped(String),
}

/// Run one stage: throw its output away if asked to, do it, say what was done, record time and numbers.
///
/// # Errors
/// The stage's own errors.
pub fn run(s: &Session, stage: Stage, redo: &[Stage], options: &eval::EvalOptions) -> Result<()> {
    s.check_stop()?;
    if matches!(stage, Stage::Train | Stage::Eval | Stage::Export) && extract::is_due(s) {
        // A stage of its own, so that its time is not counted as this one's.
        run(s, Stage::Extract, &[], options)?;
    }
    let start = Instant::now();
    let again = redo.contains(&stage);
    let held = hold(s, stage, again, options)
        .with_context(|| format!("cannot {} `{}`", stage.name(), s.recipe.name))?;
    if again {
        throw_away(s, stage, options)?;
    }
    if let (Stage::Eval, Some(held)) = (stage, &held) {
        // From here on, others may evaluate beside this process.
        let _ = held.lock_shared();
    }
    let result = match stage {
        Stage::Prepare => prepare::run(s),
        Stage::Label => label::run(s),
        Stage::Extract => extract::run(s),
        Stage::Train => train::run(s),
        Stage::Eval => eval::run(s, options),
        Stage::Export => export::run(s),
        Stage::Report => report::run(s),
    };
    let outcome = result.with_context(|| format!("cannot {} `{}`", stage.name(), s.recipe.name))?;
    match outcome {
        Outcome::Done(summary) => {
            let secs = start.elapsed().as_secs_f64();
            tracing::info!("{}: done in {secs:.1} s: {}", stage.name(), brief(&summary));
            s.run.record_stage(stage.name(), secs, summary, s.device)
        }
        Outcome::Skipped(why) => {
            tracing::info!("{}: skipped: {why}", stage.name());
            Ok(())
        }
    }
}

/// A stage whose output is no folder of shards (those have a lock of their own), held against other
/// processes: from before its output is thrown away until its record is written. Evaluations add up, and hold
/// theirs together.
fn hold(s: &Session, stage: Stage, again: bool, options: &eval::EvalOptions) -> Result<Option<File>> {
    let (output, shared) = match stage {
        Stage::Train => (s.run.train(), false),
        Stage::Export => (s.run.export(), false),
        Stage::Eval => (eval::folder(s, options), !again),
        _ => return Ok(None),
    };
    let doing = format!("runs `{}` in `{}`", stage.name(), s.run.root().display());
    lock_work(&s.run.lock(&output), shared, &doing).map(Some)
}

/// Keep what a stage that ends early has computed of the shard at work. Why it ends is the error that the
/// user sees; a disk that fails here as well is a warning.
fn keep<R: Row>(writer: StageWriter<R>) {
    if let Err(e) = writer.keep() {
        tracing::warn!("the {} of the shard at work are lost: {e:#}", R::FILES);
    }
}

/// Outputs that depend on the models, the documents and the recipe alone, with all the choices that they
/// depend on; features that are not kept are none of them. Nothing is written.
///
/// # Errors
/// A model or a document is absent or cannot be read.
pub fn fingerprints(s: &Session) -> Result<Vec<Output>> {
    let (target, proxy) = pair::find_both(s)?;
    let examples = prepare::fingerprint(s, &target)?;
    let labels = label::fingerprint(s, &target, &examples);
    let one = |stage, folder, fingerprint| Output { stage, folder, fingerprint };
    let mut all = vec![
        one(Stage::Prepare, s.run.examples(), examples.clone()),
        one(Stage::Label, s.run.labels(), labels),
    ];
    for &source in s.recipe.extract.from.iter().filter(|_| !s.recipe.extract.is_transient()) {
        let found = extract::of_pair(source, &target, proxy.as_deref())?;
        let fingerprint = extract::fingerprint(s, source, found, &examples);
        all.push(one(Stage::Extract, s.run.features(source), fingerprint));
    }
    Ok(all)
}

/// Throw a stage's output away, so that it is made again.
///
/// # Errors
/// A file cannot be removed, or another process writes the folder.
pub fn throw_away(s: &Session, stage: Stage, options: &eval::EvalOptions) -> Result<()> {
    clear(s, stage, options)?;
    s.run.forget_stage(stage.name())
}

/// `key value, key value` of the single values in a JSON object; `run.json` has the lists as well.
fn brief(summary: &Value) -> String {
    let single = |(k, v): (&String, &Value)| {
        let value = match v {
            Value::Number(n) if n.is_f64() => three_digits(n.as_f64()?),
            Value::Number(_) | Value::Bool(_) => v.to_string(),
            Value::String(text) => text.clone(),
            _ => return None,
        };
        Some(format!("{} {value}", k.replace('_', " ")))
    };
    summary.as_object().into_iter().flatten().filter_map(single).collect::<Vec<_>>().join(", ")
}

/// `0.553`, `42.4`, `1370`: what a reader can use of a number.
fn three_digits(v: f64) -> String {
    let digits = if v == 0.0 { 0.0 } else { (2.0 - v.abs().log10().floor()).clamp(0.0, 9.0) };
    let text = format!("{v:.*}", digits as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A stage's output must be complete and made with the choices of this run.
///
/// # Errors
/// It is absent, unfinished or stale; the hint names the command that makes it.
pub fn require(dir: &Path, stage: &str, fingerprint: &Fingerprint) -> Result<()> {
    let or = match stage {
        "extract" => {
            "; with `extract.missing = \"generate\"` in the recipe, features are made where they are missing"
        }
        _ => "",
    };
    let run = format!("run `proxykv-train {stage}` first, or `proxykv-train run` for all stages{or}");
    match StageDir::state(dir, fingerprint)? {
        StageState::Complete(_) => Ok(()),
        StageState::Absent => {
            bail!(hinted(format!("`{}` is absent: `{stage}` has not run", dir.display()), run))
        }
        StageState::Partial(rows) => {
            bail!(hinted(format!("`{}` holds {rows} examples and is not finished", dir.display()), run))
        }
        // Opening it as its own stage would says which settings differ, and how to continue.
        StageState::Stale(_) => StageDir::open(dir, stage, fingerprint).map(|_| ()),
    }
}

/// Remove a stage's output.
fn clear(s: &Session, stage: Stage, options: &eval::EvalOptions) -> Result<()> {
    let remove = |path: std::path::PathBuf| -> Result<()> {
        let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match gone {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove `{}`", path.display()))
            }
            _ => Ok(()),
        }
    };
    for path in stage.writes(&s.run) {
        // A link to what several runs share: the others keep it.
        if path.is_symlink() {
            std::fs::remove_file(&path)
                .with_context(|| format!("cannot remove the link `{}`", path.display()))?;
            continue;
        }
        match stage {
            Stage::Prepare | Stage::Label => StageDir::clear(&path)?,
            Stage::Extract if path != s.run.hidden() => StageDir::clear(&path)?,
            Stage::Eval => remove(eval::folder(s, options))?,
            _ => remove(path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_stage_is_told_in_single_values_of_three_digits() {
        let summary = json!({"examples": 104_307, "best_score": 0.553_116_936_359_730_5, "secs": 1370.4, "of": "target",
            "idle_share": 0.0027, "sources": [{"name": "a"}], "none": null});
        let told = "examples 104307, best score 0.553, secs 1370, of target, idle share 0.0027";
        assert_eq!(brief(&summary), told);
        assert_eq!(three_digits(0.0), "0");
    }
}
