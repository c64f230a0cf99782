//! How far a run is, from the files of its folder alone: indexes, markers of pieces, `run.json`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use pkv_core::{Source, hinted};
use pkv_recipe::plan::human_secs;
use pkv_shard::{PiecesState, RunJson, RunLayout, Stage, StageDir};
use serde::Serialize;

use crate::slurm::{self, Submitted};

/// A worker that gave no sign of life for so long counts as gone.
const SILENT: Duration = Duration::from_secs(600);
/// The rate is that of the newest part of the work, so that a pause of a night does not count.
const RATE_SECS: f64 = 3600.0;

/// Where a run is.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub run: PathBuf,
    pub stages: Vec<StageStatus>,
    /// Jobs of the last launch on Slurm.
    pub jobs: Vec<Submitted>,
}

/// Where a stage is, or one of the folders that it writes.
#[derive(Clone, Debug, Serialize)]
pub struct StageStatus {
    pub stage: &'static str,
    /// Of the run folder, where the stage is one of those that workers share.
    pub folder: Option<String>,
    pub state: State,
    /// While workers share it.
    pub pieces: Option<Pieces>,
}

pkv_core::named! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
    #[serde(rename_all = "snake_case")]
    pub enum State {
        Done = "done";
        AtWork = "at work";
        NotBegun = "not begun";
    }
}

/// Pieces of a stage. Those that are neither done nor failed nor begun are still to be done.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Pieces {
    pub all: u64,
    pub done: u64,
    /// Ended with rows that could not be made; their task tries them again when it is started again.
    pub failed: u64,
    pub running: u64,
    /// Begun by workers that gave no sign of life since.
    pub silent: u64,
    pub rows: u64,
    pub rows_done: u64,
    /// Pieces that ended, in the last hour of work.
    pub per_hour: Option<f64>,
    pub remaining_secs: Option<f64>,
    /// Of rows that could not be made, with their rows and examples.
    pub errors: Vec<String>,
}

impl Status {
    /// Of the run folder `run`, at the time `now`.
    ///
    /// # Errors
    /// There is no such folder, or a file of it cannot be read.
    pub fn read(run: &RunLayout, now: SystemTime) -> Result<Self> {
        let root = run.root();
        let record = RunJson::read(run)?.with_context(|| {
            hinted(
                format!("`{}` is no run folder, or no stage has begun", root.display()),
                "name a folder below `runs/` with a `run.json`",
            )
        })?;
        let sources: Option<Vec<Source>> =
            serde_json::from_value(record.recipe["extract"]["from"].clone()).unwrap_or_default();
        let sources = sources.unwrap_or_else(|| vec![Source::Proxy]);
        let mut stages = Vec::new();
        for stage in Stage::ALL {
            let folders: Vec<PathBuf> = match stage {
                Stage::Label => vec![run.labels()],
                Stage::Extract => sources.iter().map(|&source| run.features(source)).collect(),
                Stage::Eval => vec![run.eval()],
                _ => {
                    let state =
                        if record.stages.contains_key(stage.name()) { State::Done } else { State::NotBegun };
                    stages.push(StageStatus { stage: stage.name(), folder: None, state, pieces: None });
                    continue;
                }
            };
            for folder in folders {
                let (state, pieces) = part(stage, &folder, now)?;
                let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
                stages.push(StageStatus { stage: stage.name(), folder: name, state, pieces });
            }
        }
        Ok(Self { run: root.to_path_buf(), stages, jobs: slurm::submitted(run)? })
    }
}

/// State of one folder that a stage writes, and its pieces.
fn part(stage: Stage, folder: &Path, now: SystemTime) -> Result<(State, Option<Pieces>)> {
    let index = stage != Stage::Eval && folder.join(pkv_shard::INDEX_FILE).exists();
    if index && StageDir::read(folder)?.is_complete() {
        return Ok((State::Done, None));
    }
    if let Some(state) = PiecesState::read(folder)? {
        return Ok((State::AtWork, Some(Pieces::of(&state, now))));
    }
    // An evaluation by one process has results as soon as it has any.
    let results = stage == Stage::Eval && folder.join("results.json").exists();
    Ok((
        if results {
            State::Done
        } else if folder.exists() {
            State::AtWork
        } else {
            State::NotBegun
        },
        None,
    ))
}

impl Pieces {
    fn of(state: &PiecesState, now: SystemTime) -> Self {
        let done: Vec<_> = state.markers.iter().filter(|m| m.is_done()).collect();
        let is_silent = |alive: Option<SystemTime>| {
            alive.is_none_or(|alive| now.duration_since(alive).is_ok_and(|since| since > SILENT))
        };
        let silent = state.begun.iter().filter(|begun| is_silent(begun.alive)).count() as u64;
        let errors = state.markers.iter().flat_map(|m| {
            m.failed
                .iter()
                .map(move |row| format!("piece {}, row {} ({}): {}", m.shard, row.row, row.id, row.error))
        });
        let mut out = Self {
            all: state.plan.shards,
            done: done.len() as u64,
            failed: (state.markers.len() - done.len()) as u64,
            running: state.begun.len() as u64 - silent,
            silent,
            rows: state.plan.rows,
            rows_done: state.done_rows(),
            per_hour: None,
            remaining_secs: None,
            errors: errors.collect(),
        };
        let now = now.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let spans: Vec<(f64, f64)> =
            done.iter().map(|m| (m.by.begun as f64, m.by.begun as f64 + m.secs)).collect();
        out.estimate(&spans, now);
        out
    }

    /// Rate and remaining time by the begin and end of the pieces that are done.
    fn estimate(&mut self, spans: &[(f64, f64)], now: f64) {
        let first = spans.iter().map(|span| span.0).fold(now, f64::min);
        let longest = spans.iter().map(|span| span.1 - span.0).fold(0.0, f64::max);
        // Several pieces long, so that few workers with long pieces have a rate.
        let window = (now - first).min(RATE_SECS.max(4.0 * longest));
        let recent = spans.iter().filter(|span| span.1 >= now - window).count();
        if recent > 0 && window > 0.0 {
            let recent = recent as f64;
            self.per_hour = Some(3600.0 * recent / window);
            self.remaining_secs = Some((self.all - self.done) as f64 * window / recent);
        }
    }
}

/// Errors that the table shows; JSON has all.
const SHOWN: usize = 5;

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.run.display())?;
        writeln!(
            f,
            "{:<9} {:<15} {:<10} {:>7} {:>7} {:>7} {:>7} {:>9} {:>14}",
            "stage", "folder", "state", "pieces", "done", "running", "failed", "per hour", "remaining"
        )?;
        for StageStatus { stage, folder, state, pieces } in &self.stages {
            let folder = folder.as_deref().unwrap_or_default();
            let Some(p) = pieces else {
                writeln!(f, "{stage:<9} {folder:<15} {}", state.name())?;
                continue;
            };
            let per_hour = p.per_hour.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
            let remaining = p.remaining_secs.map_or("-".to_owned(), human_secs);
            writeln!(
                f,
                "{stage:<9} {folder:<15} {:<10} {:>7} {:>7} {:>7} {:>7} {per_hour:>9} {remaining:>14}",
                state.name(),
                p.all,
                p.done,
                p.running,
                p.failed
            )?;
            if p.silent > 0 {
                let minutes = SILENT.as_secs() / 60;
                writeln!(f, "  {} begun and without a sign of life for {minutes} minutes", p.silent)?;
            }
            for error in p.errors.iter().take(SHOWN) {
                writeln!(f, "  {error}")?;
            }
            if p.errors.len() > SHOWN {
                writeln!(f, "  and {} more, which `--json` shows", p.errors.len() - SHOWN)?;
            }
        }
        if !self.jobs.is_empty() {
            let jobs: Vec<String> = self.jobs.iter().map(|job| format!("{} {}", job.stage, job.id)).collect();
            writeln!(f, "Slurm jobs of the last launch: {}", jobs.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimated(all: u64, spans: &[(f64, f64)], now: f64) -> Pieces {
        let mut pieces = Pieces { all, done: spans.len() as u64, ..Pieces::default() };
        pieces.estimate(spans, now);
        pieces
    }

    #[test]
    fn the_rate_is_that_of_the_newest_work() {
        // Two workers, 10 minutes a piece, since 20 minutes.
        let spans = [(0.0, 600.0), (0.0, 600.0), (600.0, 1200.0), (600.0, 1200.0)];
        let p = estimated(10, &spans, 1200.0);
        assert_eq!((p.per_hour, p.remaining_secs), (Some(12.0), Some(1800.0)));
        // A day before this hour's two pieces, as many again do not count.
        let day = 86_400.0;
        let spans = [(0.0, 600.0), (0.0, 600.0), (day, day + 600.0), (day, day + 600.0)];
        let p = estimated(6, &spans, day + 1800.0);
        assert_eq!((p.per_hour, p.remaining_secs), (Some(2.0), Some(3600.0)));
        // Nothing ended for long, or at all: no rate rather than a wrong one.
        for (spans, now) in [(&spans[..], 3.0 * day), (&[][..], 10.0)] {
            let p = estimated(6, spans, now);
            assert_eq!((p.per_hour, p.remaining_secs), (None, None));
        }
        // Longer than an hour each.
        let p = estimated(3, &[(0.0, 7200.0)], 10_000.0);
        assert_eq!(p.remaining_secs, Some(20_000.0));
    }
}
