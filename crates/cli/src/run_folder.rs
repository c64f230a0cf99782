//! `runs/<name>/`: the folder of each stage's output, and `run.json`, the record of how it was made.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_core::{Source, hinted};
use pkv_recipe::{ExtractSection, Recipe};
use pkv_shard::durable::{TEMPORARY, WriteBudget, write_file};
use pkv_shard::{FeatureFolders, FeaturesFrom};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::Device;

use crate::session::{device_in_words, device_name};

/// Paths of a run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    root: PathBuf,
}

/// Record of a stage that ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StageRecord {
    /// Wall-clock time, all attempts together.
    pub secs: f64,
    /// Key numbers, such as examples and tokens.
    pub summary: Value,
    /// Device of its last run, in words; empty in runs of earlier versions.
    #[serde(default)]
    pub device: String,
    /// GPUs that it held.
    #[serde(default)]
    pub gpus: u32,
}

impl RunFolder {
    /// # Errors
    /// The folder cannot be made.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| {
            hinted(
                format!("cannot make run folder `{}`", root.display()),
                "choose another place with `--runs`",
            )
        })?;
        Ok(Self { root: root.to_path_buf() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn log(&self) -> PathBuf {
        self.root.join("log.jsonl")
    }
    pub fn examples(&self) -> PathBuf {
        self.root.join("examples")
    }
    pub fn labels(&self) -> PathBuf {
        self.root.join("labels")
    }
    /// Features of one source; those of the proxy have the name they had when there was no other.
    pub fn features(&self, source: Source) -> PathBuf {
        self.root.join(match source {
            Source::Proxy => "features",
            Source::Target => "features-target",
        })
    }
    /// Features of all sources of a recipe.
    pub fn feature_folders(&self, extract: &ExtractSection) -> FeatureFolders {
        FeatureFolders::of(
            extract.from.iter().map(|&source| FeaturesFrom::Folder(self.features(source))).collect(),
            extract.layout(),
        )
    }
    pub fn eval(&self) -> PathBuf {
        self.root.join("eval")
    }
    pub fn export(&self) -> PathBuf {
        self.root.join("export")
    }
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Write the resolved recipe, versions and device to `run.json`; what stages said before is kept.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record_start(&self, recipe: &Recipe, device: Device) -> Result<()> {
        self.update(|run| {
            run.insert("name".into(), json!(recipe.name));
            run.insert("recipe".into(), json!(recipe));
            if recipe.read_proxy().is_none() {
                // What an earlier recipe of this run read.
                run.remove("proxy");
            }
            run.insert("recipe_path".into(), json!(recipe.path));
            run.insert("seed".into(), json!(recipe.seed));
            run.insert(
                "tool".into(),
                json!({"name": "proxykv-train", "version": env!("CARGO_PKG_VERSION"), "commit": env!("PKV_COMMIT")}),
            );
            run.insert("libtorch".into(), json!("2.11.0"));
            run.insert("device".into(), json!(device_name(device)));
            run.insert("threads".into(), json!(tch::get_num_threads()));
        })
    }

    /// Add a value under `key` of `run.json`, such as a model's revision.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record(&self, key: &str, value: Value) -> Result<()> {
        self.update(|run| {
            run.insert(key.to_owned(), value);
        })
    }

    /// Add `secs` to the stage's time and replace its summary.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn record_stage(&self, stage: &str, secs: f64, summary: Value, device: Device) -> Result<()> {
        let gpus = u32::from(device.is_cuda());
        self.update(|run| {
            let stages = run.entry("stages").or_insert_with(|| json!({}));
            let before = stages[stage]["secs"].as_f64().unwrap_or(0.0);
            stages[stage] =
                json!(StageRecord { secs: before + secs, summary, device: device_in_words(device), gpus });
        })
    }

    /// Record of a stage, if it ran.
    pub fn stage(&self, stage: &str) -> Option<StageRecord> {
        serde_json::from_value(self.read().ok()?.get("stages")?.get(stage)?.clone()).ok()
    }

    /// Forget a stage's record, because its output is made anew.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub fn forget_stage(&self, stage: &str) -> Result<()> {
        self.update(|run| {
            if let Some(stages) = run.get_mut("stages").and_then(Value::as_object_mut) {
                stages.remove(stage);
            }
        })
    }

    fn read(&self) -> Result<Map<String, Value>> {
        let path = self.root.join("run.json");
        match pkv_core::read_small_text(&path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| {
                hinted(
                    format!("`{}` is no JSON object", path.display()),
                    "remove the file; it is written again",
                )
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
            Err(e) => Err(e).with_context(|| format!("cannot read `{}`", path.display())),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
        let path = self.root.join("run.json");
        let hint = || hinted(format!("cannot write `{}`", path.display()), "check the disk's free space");
        // Several processes may work in one folder: each adds to what the others wrote. Without locks (some
        // network folders have none) the last one counts.
        let folder = File::open(&self.root).with_context(hint)?;
        let _ = folder.lock();
        let mut run = self.read()?;
        change(&mut run);
        self.sweep();
        let text = serde_json::to_string_pretty(&run)? + "\n";
        write_file(&path, text.as_bytes(), &WriteBudget::from_env()).with_context(hint)?;
        Ok(())
    }

    /// Remove what processes of earlier versions left when they were killed; nothing depends on it.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_ours = |name: &str| name.starts_with("run.json.") && name.ends_with(TEMPORARY);
            if name.to_str().is_some_and(is_ours) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}
