//! A run folder as far as a report reads it: every part may be missing.
//!
//! A part that is missing is `None`; a part that is there and cannot be read is `None` as well and
//! leaves a sentence in `problems`, which the page shows. Only a folder that does not exist is an
//! error.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use pkv_core::hinted;
use pkv_recipe::Recipe;
use pkv_results::compare::Answers;
use pkv_results::{ANSWERS_FILE, FactAnswer, RESULTS_FILE, Results, fact_answers};
use pkv_shard::{RunJson, RunLayout, Stage};

use crate::metrics::Metrics;

/// Data read from a run folder.
pub struct RunData {
    pub name: String,
    /// `run.json`; empty if absent.
    pub run: RunJson,
    /// The resolved recipe of `run.json`.
    pub recipe: Option<Recipe>,
    /// `train/metrics.jsonl`.
    pub metrics: Option<Metrics>,
    /// `eval/results.json`.
    pub results: Option<Results>,
    /// `eval/answers.parquet`, summed up by context.
    pub answers: Option<Answers>,
    /// Single answers to planted facts, of the same file.
    pub samples: Vec<FactAnswer>,
    /// Bytes in the folders of each stage that has one.
    pub sizes: Vec<(Stage, u64)>,
    /// `YYYY-MM-DD` of the youngest of `run.json` and `eval/results.json`, UTC.
    pub date: Option<String>,
    /// Files that exist and cannot be read.
    pub problems: Vec<String>,
}

impl RunData {
    /// # Errors
    /// `root` is no folder.
    pub fn read(root: &Path) -> Result<Self> {
        ensure!(
            root.is_dir(),
            hinted(
                format!("there is no run folder `{}`", root.display()),
                "a run makes it: `proxykv-train run --recipe <recipe>`"
            )
        );
        let mut problems = Vec::new();
        let layout = RunLayout::new(root);
        let run = RunJson::read(&layout).unwrap_or_else(|why| {
            problems.push(format!("`run.json` could not be read: {why:#}"));
            None
        });
        let run = run.unwrap_or_default();
        let recipe = Some(&run.recipe).filter(|r| !r.is_null()).and_then(|r| {
            serde_json::from_value::<Recipe>(r.clone())
                .map_err(anyhow::Error::from)
                .and_then(|recipe| recipe.check().map(|()| recipe))
                .map_err(|e| problems.push(format!("The recipe in `run.json` could not be read: {e:#}.")))
                .ok()
        });
        let metrics = optional(&layout.train().join("metrics.jsonl"), Metrics::read, &mut problems);
        let results_path = layout.eval().join(RESULTS_FILE);
        let results = optional(&results_path, Results::read, &mut problems);
        let answers_path = layout.eval().join(ANSWERS_FILE);
        let answers = optional(&answers_path, Answers::read, &mut problems);
        // What cannot be read was noted above, but for a disk that fails between.
        let samples = answers.as_ref().and_then(|_| optional(&answers_path, fact_answers, &mut problems));
        let samples = samples.unwrap_or_default();
        let folder_name = root.file_name().map(|n| n.to_string_lossy().into_owned());
        let name = run.name.clone().or(folder_name).unwrap_or_else(|| "run".to_owned());
        let size = |stage: Stage| {
            let folders = stage.writes(&layout).into_iter().filter(|path| path.is_dir());
            let bytes = folders.map(|path| bytes_below(&path)).reduce(|a, b| a + b)?;
            Some((stage, bytes))
        };
        let sizes = Stage::ALL.into_iter().filter_map(size).collect();
        let date = [layout.run_json(), results_path].iter().filter_map(|p| modified(p)).max().map(date_of);
        Ok(Self { name, run, recipe, metrics, results, answers, samples, sizes, date, problems })
    }

    /// Bytes of a stage's folders, if it has any.
    pub fn size(&self, stage: Stage) -> Option<u64> {
        self.sizes.iter().find(|(s, _)| *s == stage).map(|(_, bytes)| *bytes)
    }
}

fn optional<T>(path: &Path, read: impl Fn(&Path) -> Result<T>, problems: &mut Vec<String>) -> Option<T> {
    let found = pkv_core::look_for(path).and_then(|found| found.map(|_| read(path)).transpose());
    found.map_err(|e| problems.push(format!("{e:#}."))).ok().flatten()
}

/// Sum of the files' sizes; what cannot be looked at counts as nothing.
fn bytes_below(folder: &Path) -> u64 {
    let mut total = 0;
    let mut open: Vec<PathBuf> = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(m) if m.is_dir() => open.push(entry.path()),
                Ok(m) if m.is_file() => total += m.len(),
                _ => {}
            }
        }
    }
    total
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// The civil date in UTC; algorithm `civil_from_days` of Howard Hinnant's "chrono-compatible
/// low-level date algorithms".
fn date_of(time: SystemTime) -> String {
    let secs = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let z = secs / 86_400 + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_civil() {
        for (secs, date) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_709_164_799, "2024-02-28"),
            (1_735_689_599, "2024-12-31"),
            (1_795_478_400, "2026-11-24"),
        ] {
            assert_eq!(date_of(UNIX_EPOCH + Duration::from_secs(secs)), date);
        }
    }

    #[test]
    fn an_absent_folder_is_an_error_and_an_empty_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let absent = RunData::read(&dir.path().join("nowhere")).err().unwrap();
        assert!(absent.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("proxykv-train run"));
        let empty = RunData::read(dir.path()).unwrap();
        assert!(empty.problems.is_empty() && empty.recipe.is_none() && empty.date.is_none());
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("eval")).unwrap();
        fs::write(dir.path().join("run.json"), "{").unwrap();
        fs::write(dir.path().join("eval/results.json"), "{\"schema_version\": 99}").unwrap();
        let data = RunData::read(dir.path()).unwrap();
        assert_eq!(data.problems.len(), 2, "{:?}", data.problems);
        assert!(data.problems[1].contains("schema version 99"));
        assert_eq!(data.size(Stage::Eval), Some(22));
    }
}
