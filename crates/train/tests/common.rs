//! Stage folders of a small synthetic pair whose labels can be learned from its features.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use pkv_core::{Fingerprint, Progress, Seed, Split, Stop, StoreDtype};
use pkv_recipe::{LossSection, MapperSection, TrainSection, Variant};
use pkv_shard::{Example, FeatureFolders, FeatureRow, LabelRow, StageDir, StageWriter};
use pkv_train::{TrainInputs, TrainSummary};
use rand::Rng;
use serde_json::Value;
use tempfile::TempDir;

pub use pkv_test_support::errors::text_and_hint;

/// Proxy: 2 layers x 1 KV head, 3 channels, 2 globals. Target: 2 layers x 2 KV heads.
const PROXY: (u32, u32, u32, u32) = (2, 1, 3, 2);
const TARGET: (u32, u32) = (2, 2);

/// A run folder and its sections.
pub struct Setup {
    pub dir: TempDir,
    pub mapper: MapperSection,
    pub loss: LossSection,
    pub train: TrainSection,
    /// Parameters that training starts from.
    pub start_from: Option<Vec<(String, tch::Tensor)>>,
    pub fingerprint: Fingerprint,
}

impl Setup {
    /// Stages of `train` training and `validation` validation examples, and a recipe of 24 small steps
    /// whose logs, validations and checkpoints fall on different steps.
    pub fn new(train: usize, validation: usize) -> Self {
        pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        // Tensors this small cost more to share between threads than to compute.
        tch::set_num_threads(1);
        let dir = tempfile::tempdir().unwrap();
        write_stages(dir.path(), train, validation);
        Self {
            dir,
            mapper: MapperSection {
                variant: Variant::HybridAxial,
                head_width: 8,
                width: 16,
                attention_heads: 2,
                cross_width: 8,
                cross_heads: 2,
                dilations: vec![1, 2],
                ..MapperSection::default()
            },
            loss: LossSection { fine: 0.3, global: 0.1, cosine: 0.3, ..LossSection::default() },
            train: TrainSection {
                steps: 24.into(),
                batch: 4,
                warmup_steps: 3,
                lr: 5e-3,
                ema: 0.9,
                log_every: 5,
                validate_every: 7,
                checkpoint_every: 4,
                keep_checkpoints: 2,
                best_by: vec![0.1, 0.07],
                ..TrainSection::default()
            },
            start_from: None,
            fingerprint: Fingerprint::new().with("train", "as in this test"),
        }
    }

    pub fn stage(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Train in the folder `run` until done, stopped or failed.
    pub fn run(&self, run: &str, progress: &dyn Progress, stop: &Stop) -> Result<TrainSummary> {
        let (run, examples, labels, features) =
            (self.stage(run), self.stage("examples"), self.stage("labels"), self.stage("features"));
        let inputs = self.inputs(&run, &examples, &labels, &features);
        pkv_train::train(&inputs, tch::Device::Cpu, progress, stop)
    }

    pub fn finish(&self, run: &str) -> Result<TrainSummary> {
        self.run(run, &pkv_core::NoProgress, &Stop::default())
    }

    pub fn is_complete(&self, run: &str) -> Result<Option<u64>> {
        let (run, examples, labels, features) =
            (self.stage(run), self.stage("examples"), self.stage("labels"), self.stage("features"));
        pkv_train::is_complete(&self.inputs(&run, &examples, &labels, &features))
    }

    fn inputs<'a>(
        &'a self,
        run: &'a Path,
        examples: &'a Path,
        labels: &'a Path,
        features: &'a Path,
    ) -> TrainInputs<'a> {
        TrainInputs {
            run,
            examples,
            labels,
            features: FeatureFolders::one(features),
            mapper: &self.mapper,
            loss: &self.loss,
            train: &self.train,
            seed: Seed(11),
            start_from: self.start_from.as_deref(),
            fingerprint: &self.fingerprint,
        }
    }

    /// Every checkpoint file by path, and the metrics without their times.
    pub fn outcome(&self, run: &str) -> (BTreeMap<String, Vec<u8>>, Vec<Value>) {
        let mut files = BTreeMap::new();
        for folder in fs::read_dir(self.stage(run).join("checkpoints")).unwrap() {
            let folder = folder.unwrap().path();
            for file in fs::read_dir(&folder).unwrap() {
                let file = file.unwrap().path();
                let name = format!("{}/{}", name(&folder), name(&file));
                files.insert(name, fs::read(file).unwrap());
            }
        }
        (files, self.metrics(run))
    }

    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.stage(run).join("train/metrics.jsonl")).unwrap();
        let line = |line: &str| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            let object = value.as_object_mut().unwrap();
            for key in ["ms_per_step", "tokens_per_s"] {
                object.remove(key);
            }
            value
        };
        text.lines().map(line).collect()
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Counts steps, and does something at one of them.
pub struct At<F: Fn() + Sync> {
    pub step: u64,
    pub then: F,
    pub seen: AtomicU64,
}

impl<F: Fn() + Sync> At<F> {
    pub fn new(step: u64, then: F) -> Self {
        Self { step, then, seen: AtomicU64::new(0) }
    }
}

impl<F: Fn() + Sync> Progress for At<F> {
    fn start(&self, what: &str, _: u64, done: u64) {
        // The phases before training never come so far.
        self.seen.store(if what == "train" { done } else { 1 << 32 }, Ordering::Relaxed);
    }
    fn advance(&self, units: u64) {
        if self.seen.fetch_add(units, Ordering::Relaxed) + units == self.step {
            (self.then)();
        }
    }
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

pub fn stage(dir: &Path, name: &str, command: &str) -> StageDir {
    StageDir::open(&dir.join(name), command, &Fingerprint::new().with("stage", command)).unwrap()
}

pub fn write<R: pkv_shard::Row>(stage: StageDir, rows: Vec<R>) {
    let mut writer = StageWriter::new(stage, 5, StoreDtype::F32, None).unwrap();
    rows.into_iter().for_each(|row| writer.push(row).unwrap());
    writer.finish().unwrap();
}

pub fn write_stages(dir: &Path, train: usize, validation: usize) {
    let rows: Vec<_> = (0..train + validation)
        .map(|i| row(i, if i < train { Split::Train } else { Split::Validation }))
        .collect();
    write(stage(dir, "examples", "prepare"), rows.iter().map(|r| r.0.clone()).collect());
    write(stage(dir, "labels", "label"), rows.iter().map(|r| r.1.clone()).collect());
    write(stage(dir, "features", "extract"), rows.into_iter().map(|r| r.2).collect());
}

/// An example whose scores follow from its features: partly linear, partly not, partly from neighbours.
pub fn row(i: usize, split: Split) -> (Example, LabelRow, FeatureRow) {
    let mut rng = Seed(77).stream("rows", i as u64);
    let positions = 40 + (i * 7) % 25;
    let (layers, kv_heads, channels, globals) = PROXY;
    let p = (layers * kv_heads) as usize;
    let mut noise = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    let heads = noise(p * channels as usize * positions);
    let global = noise(globals as usize * positions);
    let at = |c: usize, t: usize| heads[c * positions + t.min(positions - 1)];
    let outputs = (TARGET.0 * TARGET.1) as usize;
    let scores = (0..outputs * positions)
        .map(|k| {
            let (o, t) = (k / positions, k % positions);
            let x = at(o, t) + 3.0 * at(5 - o, t) * at(o, t + 1) + global[t] - 2.5 - 0.5 * o as f32;
            1.0 / (1.0 + (-x).exp())
        })
        .collect();
    let id = format!("doc-{i}");
    let example = Example {
        id: id.clone(),
        document: id.clone(),
        source: "made up".into(),
        split,
        window: 0,
        start: 0,
        tokens: vec![1; positions],
        facts: Vec::new(),
    };
    let positions = positions as u32;
    let label = LabelRow { id: id.clone(), layers: TARGET.0, kv_heads: TARGET.1, positions, scores };
    let feature = FeatureRow { id, layers, kv_heads, channels, positions, heads, globals: global };
    (example, label, feature)
}
