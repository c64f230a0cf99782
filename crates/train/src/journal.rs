//! `train/metrics.jsonl`: one JSON object per log line and validation, each step once.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_files::{WriteBudget, write_error, write_file};
use serde_json::Value;

/// The file's name in the run's `train` folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The metrics file, open at its end.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Open the metrics of a run that continues after `step`: lines of later steps, and a line that
    /// a killed process left unfinished, are dropped, since they will be written again.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(dir: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create folder `{}`", dir.display()))?;
        let path = dir.join(METRICS_FILE);
        let kept = if pkv_core::look_for(&path)?.is_some() {
            let bytes =
                pkv_core::read_small(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
            keep(&String::from_utf8_lossy(&bytes), step)
        } else {
            if step > 0 {
                tracing::warn!(
                    "`{}` is gone: the metrics up to step {step} are lost, those of later steps are written",
                    path.display()
                );
            }
            String::new()
        };
        write_file(&path, kept.as_bytes(), &WriteBudget::from_env())?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open `{}`", path.display()))?;
        Ok(Self { path, file })
    }

    /// Append a line.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        // One write, so that a kill leaves at most one unfinished line.
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(|e| write_error(&self.path, e))
    }

    /// Wait until the lines are on disk: a checkpoint must not know of steps that the metrics lack.
    ///
    /// # Errors
    /// The disk fails.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| write_error(&self.path, e))?;
        // Lines of a file that was removed or replaced meanwhile go nowhere.
        let is_there = || -> std::io::Result<bool> {
            let (open, named) = (self.file.metadata()?, fs::metadata(&self.path)?);
            Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
        };
        ensure!(
            matches!(is_there(), Ok(true)),
            hinted(
                format!("`{}` was removed or replaced while it was written", self.path.display()),
                "keep other programs out of the run folder, and run the same command again: it goes on from the last checkpoint"
            )
        );
        Ok(())
    }
}

/// Whole lines of steps up to `step`.
fn keep(text: &str, step: u64) -> String {
    let of = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
    let lines = text.lines().filter(|line| of(line).is_some_and(|s| s <= step));
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_that_go_nowhere_are_an_error() {
        for replaced in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut journal = Journal::open(dir.path(), 0).unwrap();
            let file = dir.path().join(METRICS_FILE);
            fs::remove_file(&file).unwrap();
            if replaced {
                fs::write(&file, "").unwrap();
            }
            journal.write(&json!({"step": 10})).unwrap();
            let error = journal.sync().unwrap_err();
            assert!(error.to_string().contains("was removed or replaced"), "{error}");
            assert!(error.downcast_ref::<pkv_core::Hinted>().is_some());
        }
    }

    #[test]
    fn later_and_unfinished_lines_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let read = || fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
        let mut journal = Journal::open(dir.path(), 0).unwrap();
        for step in [10, 20, 30] {
            journal.write(&json!({"step": step, "loss": 0.5})).unwrap();
        }
        journal.sync().unwrap();
        let whole = read();
        fs::write(dir.path().join(METRICS_FILE), format!("{whole}{{\"step\":40,\"lo")).unwrap();
        journal.sync().unwrap();
        drop(Journal::open(dir.path(), 40).unwrap());
        assert_eq!(read(), whole);
        let mut journal = Journal::open(dir.path(), 20).unwrap();
        journal.write(&json!({"step": 30, "loss": 0.4})).unwrap();
        assert_eq!(
            read(),
            "{\"step\":10,\"loss\":0.5}\n{\"step\":20,\"loss\":0.5}\n{\"step\":30,\"loss\":0.4}\n"
        );
    }
}
