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
use pkv_eval::compare::Answers;
use pkv_eval::{ANSWERS_FILE, Results, Sample, fact_samples};
use pkv_recipe::Recipe;
use serde_json::Value;

use crate::metrics::Metrics;

/// Data read from a run folder.
pub struct RunData {
    pub name: String,
    /// `run.json`; null if absent.
    pub run: Value,
    /// The resolved recipe of `run.json`.
    pub recipe: Option<Recipe>,
    /// `train/metrics.jsonl`.
    pub metrics: Option<Metrics>,
    /// `eval/results.json`.
    pub results: Option<Results>,
    /// `eval/answers.parquet`, summed up by context.
    pub answers: Option<Answers>,
    /// Single answers to planted facts, of the same file.
    pub samples: Vec<Sample>,
    /// Bytes below each folder of the run that exists, by its name.
    pub sizes: Vec<(&'static str, u64)>,
    /// `YYYY-MM-DD` of the youngest of `run.json` and `eval/results.json`, UTC.
    pub date: Option<String>,
    /// Files that exist and cannot be read.
    pub problems: Vec<String>,
}

const FOLDERS: [&str; 7] = ["examples", "labels", "features", "checkpoints", "train", "eval", "export"];

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
        let run_path = root.join("run.json");
        let run = if run_path.exists() {
            read_json(&run_path).unwrap_or_else(|why| {
                problems.push(format!("`run.json` could not be read: {why}"));
                Value::Null
            })
        } else {
            Value::Null
        };
        let recipe = run.get("recipe").and_then(|r| {
            serde_json::from_value::<Recipe>(r.clone())
                .map_err(|e| problems.push(format!("The recipe in `run.json` could not be read: {e}.")))
                .ok()
        });
        let metrics = optional(&root.join("train/metrics.jsonl"), Metrics::read, &mut problems);
        let results_path = root.join("eval/results.json");
        let results = optional(&results_path, Results::read, &mut problems);
        let answers = optional(&root.join("eval").join(ANSWERS_FILE), Answers::read, &mut problems);
        let samples = root.join("eval").join(ANSWERS_FILE);
        // What cannot be read was noted above.
        let samples = if answers.is_some() { fact_samples(&samples).unwrap_or_default() } else { Vec::new() };
        let folder_name = root.file_name().map(|n| n.to_string_lossy().into_owned());
        let name =
            run["name"].as_str().map(str::to_owned).or(folder_name).unwrap_or_else(|| "run".to_owned());
        let sizes = FOLDERS
            .into_iter()
            .map(|f| (f, root.join(f)))
            .filter(|(_, path)| path.is_dir())
            .map(|(f, path)| (f, bytes_below(&path)))
            .collect();
        let date = [run_path, results_path].iter().filter_map(|p| modified(p)).max().map(date_of);
        Ok(Self { name, run, recipe, metrics, results, answers, samples, sizes, date, problems })
    }

    /// Bytes of one of the run's folders, if it exists.
    pub fn size(&self, folder: &str) -> Option<u64> {
        self.sizes.iter().find(|(f, _)| *f == folder).map(|(_, bytes)| *bytes)
    }

    /// A string of `run.json` by its dotted path.
    pub fn text(&self, path: &str) -> Option<&str> {
        path.split('.').try_fold(&self.run, |v, key| v.get(key)).and_then(Value::as_str)
    }
}

fn optional<T>(path: &Path, read: impl Fn(&Path) -> Result<T>, problems: &mut Vec<String>) -> Option<T> {
    if !path.exists() {
        return None;
    }
    read(path).map_err(|e| problems.push(format!("A part of the run could not be read: {e:#}."))).ok()
}

fn read_json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&pkv_core::read_small_text(path)?)?)
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
        assert_eq!(data.size("eval"), Some(22));
    }
}
