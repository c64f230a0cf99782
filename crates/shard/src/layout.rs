//! Where a run's files are: every path of a run folder, for the crates that write them and those that read
//! them.

use std::path::{Path, PathBuf};

use pkv_core::Source;

/// Paths of the run folder `root`. Nothing is made or read here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunLayout {
    root: PathBuf,
}

impl RunLayout {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    /// The record of how the run was made; a folder that has it is a run folder.
    pub fn run_json(&self) -> PathBuf {
        self.root.join("run.json")
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
    /// Folders of shards, in the order in which they are made.
    pub fn shard_folders(&self) -> [PathBuf; 4] {
        [self.examples(), self.labels(), self.features(Source::Proxy), self.features(Source::Target)]
    }
    /// Maps of the target's hidden states, each named by its fingerprint.
    pub fn hidden(&self) -> PathBuf {
        self.root.join("hidden")
    }
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }
    /// What training logs by step.
    pub fn train(&self) -> PathBuf {
        self.root.join("train")
    }
    /// The same for TensorBoard.
    pub fn events(&self) -> PathBuf {
        self.root.join("tb")
    }
    /// What `train --redo train` keeps of the mapper that it replaces, until the new one is whole.
    pub fn before_redo(&self) -> PathBuf {
        self.root.join("before-redo")
    }
    pub fn eval(&self) -> PathBuf {
        self.root.join("eval")
    }
    /// Results of an export, beside those of the checkpoint.
    pub fn eval_of_export(&self) -> PathBuf {
        self.root.join("eval-export")
    }
    pub fn export(&self) -> PathBuf {
        self.root.join("export")
    }
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// What `launch` submitted, and the logs of its jobs.
    pub fn launch(&self) -> PathBuf {
        self.root.join("launch")
    }

    /// The lock of the work on `output`, which is beside it: outputs are removed while it is held.
    pub fn lock(&self, output: &Path) -> PathBuf {
        let name = output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        self.root.join(format!("{name}.lock"))
    }
}
