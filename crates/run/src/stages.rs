//! The stages of a run, one file each, and what they have in common.

mod beside;
pub mod eval;
pub mod export;
pub mod extract;
mod generated;
pub mod hidden;
pub mod label;
mod lanes;
mod pieces;
pub mod prepare;
mod pump;
mod redo;
pub mod report;
mod start_from;
mod to_host;
pub mod train;

pub use self::generated::answer_stdin;
pub use self::pieces::Part;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pkv_core::{Fingerprint, hinted};
use pkv_files::{Held, lock_work};
use pkv_shard::{Missing, PiecesState, Row, Stage, StageDir, StageState, StageWriter, Totals, in_words};
use serde_json::{Value, json};

use self::eval::EvalOptions;
use self::pieces::Reached;
use crate::session::Session;
use crate::sweep::SharedOutput;

/// A stage. Its file holds its only entry, which everything that goes through the stages reads.
pub struct Entry {
    pub stage: Stage,
    /// Help of its command: a sentence, and further paragraphs after empty lines.
    pub about: &'static str,
    /// Stages whose outputs it reads.
    pub reads: &'static [Stage],
    /// Its outputs that depend on the models, the documents and the recipe alone, each with all the settings
    /// that change it: runs may share them. Nothing is written.
    pub outputs: fn(&Session) -> Result<Vec<SharedOutput>>,
    /// Its output, where that is no folder of shards, to be held against other processes; shards have a lock
    /// of their own.
    pub held: Option<fn(&Session, &EvalOptions) -> PathBuf>,
    /// Several processes may write that output together.
    pub adds_up: bool,
    /// Several processes may make it piece by piece.
    pub in_pieces: bool,
    /// What else may be done where its output is absent, for the hint of who needs it.
    pub instead: &'static str,
    pub run: fn(&Session, &EvalOptions) -> Result<Outcome>,
}

/// All stages, in order.
pub static REGISTRY: [Entry; Stage::ALL.len()] =
    [prepare::ENTRY, label::ENTRY, extract::ENTRY, train::ENTRY, eval::ENTRY, export::ENTRY, report::ENTRY];

impl Entry {
    /// A stage that reads `reads` and writes shards, or a file that is replaced at once.
    const fn new(
        stage: Stage,
        about: &'static str,
        reads: &'static [Stage],
        run: fn(&Session, &EvalOptions) -> Result<Outcome>,
    ) -> Self {
        Self {
            stage,
            about,
            reads,
            outputs: |_| Ok(Vec::new()),
            held: None,
            adds_up: false,
            in_pieces: false,
            instead: "",
            run,
        }
    }
}

/// The entry of a stage.
pub fn entry(stage: Stage) -> &'static Entry {
    REGISTRY.iter().find(|entry| entry.stage == stage).expect("the registry has every stage")
}

/// Outcome of a stage.
pub enum Outcome {
    /// It worked; key numbers for `run.json` and the log.
    Done(Value),
    /// Its output was complete already.
    Skipped(String),
    /// This process's part is done; what its output lacks, or nothing if others made it complete.
    Piece(Option<Missing>),
}

impl Outcome {
    /// Of a stage of `rows` rows that is made in pieces.
    fn of_pieces(reached: Reached, rows: u64) -> Self {
        match reached {
            Reached::Whole(Some(Totals { pieces, tokens, secs })) => {
                let (rounded, all) =
                    ((secs * 100.0).round() / 100.0, json!({"examples": rows, "tokens": tokens}));
                let mut summary = all;
                (summary["pieces"], summary["pieces_s"]) = (json!(pieces), json!(rounded));
                Self::Done(summary)
            }
            Reached::Whole(None) => Self::Piece(None),
            Reached::Part(missing) => Self::Piece(Some(missing)),
        }
    }
}

/// Run all stages in order, each after `begin`; those of `redo` make their outputs again.
///
/// # Errors
/// Those of a stage.
pub fn run_all(s: &Session, redo: &[Stage], options: &EvalOptions, begin: &dyn Fn(Stage)) -> Result<()> {
    let mut redo = redo.to_vec();
    for stage in Stage::ALL {
        begin(stage);
        // Labels may bring features along: those that are made again go before that.
        if stage == Stage::Label && redo.contains(&Stage::Extract) {
            throw_away(s, Stage::Extract, options)?;
            redo.retain(|&stage| stage != Stage::Extract);
        }
        run(s, stage, &redo, options)?;
    }
    Ok(())
}

/// Run one stage: throw its output away if asked to, do it, say what was done, record time and numbers.
/// Whether its output is complete: not where other tasks have parts of it.
///
/// # Errors
/// The stage's own errors.
pub fn run(s: &Session, stage: Stage, redo: &[Stage], options: &EvalOptions) -> Result<bool> {
    s.stop.check()?;
    let entry = entry(stage);
    if entry.reads.contains(&Stage::Extract) && extract::is_due(s) {
        // A stage of its own, so that its time is not counted as this one's.
        run(s, Stage::Extract, &[], options)?;
    }
    let (start, again) = (Instant::now(), redo.contains(&stage));
    let verb = if stage == Stage::Eval { "evaluate" } else { stage.name() };
    let doing = || format!("cannot {verb} `{}`", s.recipe.name);
    bring(s, entry, options).with_context(doing)?;
    // From before the output is thrown away until its record is written.
    let held = entry.held.map(|output| hold(s, stage, entry.adds_up && !again, &output(s, options)));
    let mut held = held.transpose().with_context(doing)?;
    if again {
        throw_away(s, stage, options)?;
    }
    if let Some(held) = held.as_mut().filter(|_| entry.adds_up) {
        // From here on, others may work beside this process.
        held.share().with_context(doing)?;
    }
    let outcome = (entry.run)(s, options).with_context(doing);
    if stage == Stage::Train {
        redo::after_train(s, outcome.is_ok())?;
    }
    // After a failure too: what a stage logs says how far it came.
    put(s, entry, options, outcome.is_ok()).with_context(doing)?;
    match outcome? {
        Outcome::Done(summary) => {
            let secs = start.elapsed().as_secs_f64();
            tracing::info!("{}: done in {secs:.1} s: {}", stage.name(), in_words(&summary));
            s.run.record_stage(stage.name(), secs, Some(summary), s.devices_of(stage))?;
        }
        Outcome::Skipped(why) => tracing::info!("{}: skipped: {why}", stage.name()),
        Outcome::Piece(missing) => {
            let secs = start.elapsed().as_secs_f64();
            s.run.record_stage(stage.name(), secs, None, s.devices_of(stage))?;
            let Some(Missing { what, command }) = missing else {
                tracing::info!("{}: done in {secs:.1} s, with the pieces of other processes", stage.name());
                return Ok(true);
            };
            tracing::info!("{}: this part is done in {secs:.1} s; {what}\nhint: {command}", stage.name());
            return Ok(false);
        }
    }
    Ok(true)
}

/// In a working copy, bring what other machines made of a stage's inputs and of its output.
fn bring(s: &Session, entry: &Entry, options: &EvalOptions) -> Result<()> {
    let inputs = entry.reads.iter().flat_map(|stage| stage.writes(&s.run));
    let page = (entry.stage == Stage::Report).then(|| s.run.eval_of_export());
    let all = inputs.chain(entry.stage.writes(&s.run)).chain(folders(s, entry.stage, options)).chain(page);
    let mut all: Vec<PathBuf> = all.collect();
    all.sort();
    all.dedup();
    all.iter().try_for_each(|path| pkv_files::pull(path).and_then(|()| pkv_files::refresh(path)))
}

/// In a working copy, put what a stage wrote beside whole files.
fn put(s: &Session, entry: &Entry, options: &EvalOptions, is_done: bool) -> Result<()> {
    // What is made in pieces was put piece by piece, and others work beside it.
    if entry.held.is_none() && entry.stage != Stage::Report {
        return Ok(());
    }
    let all = entry.stage.writes(&s.run).into_iter().chain(folders(s, entry.stage, options));
    let result = all.into_iter().try_for_each(|path| pkv_files::push(&path));
    if is_done {
        return result;
    }
    result.unwrap_or_else(|e| tracing::warn!("{e:#}"));
    Ok(())
}

/// Hold `output` of a stage against other processes.
fn hold(s: &Session, stage: Stage, shared: bool, output: &Path) -> Result<Held> {
    let doing = format!("runs `{}` in `{}`", stage.name(), s.run.root().display());
    lock_work(&s.run.lock(output), shared, &doing)
}

/// Keep what a stage that ends early has computed of the shard at work. Why it ends is the error that the
/// user sees; a disk that fails here as well is a warning.
fn keep<R: Row>(writer: StageWriter<R>) {
    if let Err(e) = writer.keep() {
        tracing::warn!("the {} of the shard at work are lost: {e:#}", R::FILES);
    }
}

/// All outputs that runs may share ([`Entry::outputs`]), in order.
///
/// # Errors
/// A model or a document is absent or cannot be read.
pub fn outputs(s: &Session) -> Result<Vec<SharedOutput>> {
    let of_each = REGISTRY.iter().map(|entry| (entry.outputs)(s)).collect::<Result<Vec<_>>>()?;
    Ok(of_each.into_iter().flatten().collect())
}

/// Throw a stage's output away, so that it is made again.
///
/// # Errors
/// A file cannot be removed, or another process writes the folder.
pub fn throw_away(s: &Session, stage: Stage, options: &EvalOptions) -> Result<()> {
    redo::clear(s, stage, options)?;
    s.run.forget_stage(stage.name())
}

/// A stage's output must be complete and made with the choices of this run.
///
/// # Errors
/// It is absent, unfinished or stale; the hint names the command that makes it.
pub fn require(dir: &Path, stage: Stage, fingerprint: &Fingerprint) -> Result<()> {
    let (stage, instead) = (stage.name(), entry(stage).instead);
    let run = format!("run `proxykv-train {stage}` first, or `proxykv-train run` for all stages{instead}");
    match StageDir::state(dir, fingerprint)? {
        StageState::Complete(_) => Ok(()),
        StageState::Absent => {
            bail!(hinted(format!("`{}` is absent: `{stage}` has not run", dir.display()), run))
        }
        StageState::Partial(rows) if StageDir::is_in_pieces(dir) => {
            let missing = PiecesState::read(dir)?.map(|state| state.what_is_missing());
            let Missing { what, command } = missing.unwrap_or_default();
            bail!(hinted(
                format!("`{}` holds {rows} examples and is not finished: {what}", dir.display()),
                command
            ))
        }
        StageState::Partial(rows) => {
            bail!(hinted(format!("`{}` holds {rows} examples and is not finished", dir.display()), run))
        }
        // Opening it, as its own stage does, says which settings differ, and how to continue.
        StageState::Stale(_) => StageDir::open(dir, stage, fingerprint).map(|_| ()),
    }
}

/// Folders of a stage's output that may be made in pieces.
pub fn folders(s: &Session, stage: Stage, options: &EvalOptions) -> Vec<PathBuf> {
    match entry(stage).held {
        Some(output) => vec![output(s, options)],
        None => stage.writes(&s.run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_an_entry_in_order_and_reads_only_earlier_ones() {
        assert!(REGISTRY.iter().map(|entry| entry.stage).eq(Stage::ALL));
        for entry in &REGISTRY {
            assert!(entry.reads.iter().all(|read| *read < entry.stage), "{:?}", entry.stage);
            assert!(!entry.about.is_empty() && (!entry.adds_up || entry.held.is_some()));
        }
    }
}
