//! A run folder that is written: its paths, and the record of what stages did in it.

use std::fs;
use std::ops::Deref;
use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_files::Claim;
use pkv_gpu::{device_in_words, devices_name};
use pkv_recipe::{ExtractSection, Recipe};
use pkv_shard::{FeatureFolders, FeaturesFrom, RunJson, RunLayout, StageRecord, Tool};
use serde_json::{Value, json};
use tch::Device;

/// A run folder, made by [`RunFolder::make`].
#[derive(Clone, Debug)]
pub struct RunFolder(RunLayout);

impl Deref for RunFolder {
    type Target = RunLayout;

    fn deref(&self) -> &RunLayout {
        &self.0
    }
}

impl RunFolder {
    /// The folder `root`, which may be absent.
    pub fn new(root: &Path) -> Self {
        Self(RunLayout::new(root))
    }

    /// Make the folder if it is absent.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(&self) -> Result<()> {
        fs::create_dir_all(self.root()).with_context(|| {
            hinted(
                format!("cannot make run folder `{}`", self.root().display()),
                "choose another place with `--runs`",
            )
        })
    }

    /// Whether it holds nothing that a stage made: the record of the run, logs, locks that no process has,
    /// and folders of shards without a shard.
    pub fn is_bare(&self) -> bool {
        is_bare(self.root(), 1)
    }

    /// Features of all sources of a recipe.
    pub fn feature_folders(&self, extract: &ExtractSection) -> FeatureFolders {
        FeatureFolders::of(
            extract.from.iter().map(|&source| FeaturesFrom::Folder(self.features(source))).collect(),
            extract.layout(),
        )
    }

    /// Write the resolved recipe, versions and device to `run.json`; what stages said before is kept.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record_start(&self, recipe: &Recipe, devices: &[Device]) -> Result<()> {
        self.record(|run| {
            run.name = Some(recipe.name.clone());
            run.recipe = json!(recipe);
            if recipe.read_proxy().is_none() {
                // What an earlier recipe of this run read.
                run.proxy = None;
            }
            run.recipe_path = Some(recipe.path.display().to_string());
            run.seed = Some(recipe.seed.0);
            run.tool = Some(Tool {
                name: "proxykv-train".to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                commit: env!("PKV_COMMIT").to_owned(),
            });
            run.libtorch = Some(pkv_gpu::LIBTORCH.to_owned());
            run.device = Some(devices_name(devices));
            run.threads = u32::try_from(tch::get_num_threads()).ok();
        })
    }

    /// Change `run.json`, such as to add a model's revision.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record(&self, change: impl Fn(&mut RunJson)) -> Result<()> {
        RunJson::update(self, change)
    }

    /// Add `secs` to the stage's time and, unless others sum it up, replace its summary.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record_stage(
        &self,
        stage: &str,
        secs: f64,
        summary: Option<Value>,
        devices: &[Device],
    ) -> Result<()> {
        let gpus = devices.iter().filter(|device| device.is_cuda()).count() as u32;
        let device = device_in_words(devices.last().copied().unwrap_or(Device::Cpu));
        self.record(|run| {
            let record = run.stages.entry(stage.to_owned()).or_default();
            let summary = summary.clone().unwrap_or_else(|| std::mem::take(&mut record.summary));
            let device = device.clone();
            *record = StageRecord { secs: record.secs + secs, summary, device, gpus };
        })
    }

    /// Record of a stage, if it ran.
    pub fn stage(&self, stage: &str) -> Option<StageRecord> {
        RunJson::read(self).ok()??.stages.remove(stage)
    }

    /// Forget a stage's record, because its output is made anew.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn forget_stage(&self, stage: &str) -> Result<()> {
        self.record(|run| drop(run.stages.remove(stage)))
    }
}

/// Whether a folder, and its folders `depth` levels down, hold nothing that a stage made.
fn is_bare(folder: &Path, depth: usize) -> bool {
    let of_none = |path: &Path| match path.file_name().and_then(|name| name.to_str()) {
        Some("run.json" | "log.jsonl" | "index.json") => true,
        name => name.is_some_and(|n| n.ends_with(".lock")) && matches!(Claim::take(path), Ok(Some(_))),
    };
    let holds_none = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => depth > 0 && is_bare(&entry.path(), depth - 1),
        Ok(kind) => kind.is_file() && of_none(&entry.path()),
        Err(_) => false,
    };
    fs::read_dir(folder).is_ok_and(|mut all| all.all(|entry| entry.is_ok_and(holds_none)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_which_a_process_works_is_not_bare() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::new(dir.path());
        for name in ["run.json", "log.jsonl", "run.lock"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert!(run.is_bare());
        let claim = Claim::take(&dir.path().join("run.lock")).unwrap();
        assert!(!run.is_bare());
        drop(claim);
        assert!(run.is_bare());
        fs::create_dir(dir.path().join("labels")).unwrap();
        fs::write(dir.path().join("labels/index.json"), "").unwrap();
        assert!(run.is_bare());
        fs::write(dir.path().join("labels/00000.parquet"), "").unwrap();
        assert!(!run.is_bare());
    }
}
