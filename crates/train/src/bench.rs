//! Time of a training step on synthetic data: through the loader, and on batches already on the device.
//!
//! The data are real shards, so that reading, decoding, pooling, assembling and copying are all part of the
//! first figure. The host waits for the device only at the end of a round of steps.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use pkv_core::{Fingerprint, Seed, Split, StoreDtype};
use pkv_mapper::{MapperDims, Standardization};
use pkv_recipe::{LossSection, MapperSection, TrainSection};
use pkv_shard::{Example, FeatureFolders, FeatureRow, LabelRow, Row, StageDir, StageWriter};
use rand::Rng;
use serde::Serialize;
use tch::Device;

use crate::batches::Batches;
use crate::dataset::{Dataset, Samples};
use crate::learner::Learner;
use crate::loader::{Loaded, Loader};
use crate::optimizer::Optimizer;
use crate::step::{Stepper, Tf32, number_format};

/// Rounds whose median counts.
const ROUNDS: usize = 5;
/// Batches of one pass over the synthetic contexts.
const PER_EPOCH: usize = 4;
/// Numbers that features and labels are cut from.
const NOISE: usize = 1 << 20;

/// Options of the measurement.
#[derive(Clone, Copy, Debug)]
pub struct BenchOptions<'a> {
    pub mapper: &'a MapperSection,
    pub loss: &'a LossSection,
    pub train: &'a TrainSection,
    pub dims: MapperDims,
    /// Positions of the longest context.
    pub positions: usize,
    /// Positions of the shortest, as a share: 1 for batches of one length, less for one length after another.
    pub shortest: f64,
    /// Steps of a round; there are five, after a warm-up.
    pub steps: usize,
    /// A folder for the synthetic shards, which are removed at the end.
    pub scratch: &'a Path,
    pub seed: Seed,
    pub device: Device,
}

/// The measurements; medians over rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    pub parameters: usize,
    /// Contexts per step.
    pub batch: usize,
    pub proxy_heads: usize,
    pub channels: usize,
    pub target_heads: usize,
    pub positions: usize,
    /// `f32`, `tf32` or `bf16`.
    pub dtype: String,
    pub loader_threads: usize,
    /// Steps that each figure is of.
    pub steps: usize,
    /// Milliseconds per step from shards to weights.
    pub step_ms: f64,
    /// Positions per second.
    pub tokens_per_s: f64,
    /// The same on batches that were on the device before.
    pub resident_step_ms: f64,
    pub resident_tokens_per_s: f64,
    /// `tokens_per_s` over `resident_tokens_per_s`: 1 is a loader that costs nothing.
    pub ratio: f64,
    /// Most device memory in tensors while training through the loader, bytes; nothing on a CPU.
    pub peak_bytes: Option<i64>,
}

/// Time training steps on synthetic shards of the given sizes.
///
/// # Errors
/// A size is 0, `scratch` cannot be written, or the device runs out of memory.
pub fn bench(o: &BenchOptions) -> Result<BenchReport> {
    ensure!(
        o.positions > 0 && o.steps > 0 && o.train.batch > 0,
        "a bench of no positions, steps or contexts"
    );
    ensure!(o.shortest > 0.0 && o.shortest <= 1.0, "the shortest context is a share, found {}", o.shortest);
    let contexts = PER_EPOCH * o.train.batch;
    let folder = Folder::new(o.scratch)?;
    write_stages(&folder.0, o, contexts)?;
    let at = |name: &str| folder.0.join(name);
    let dataset = Dataset::open(&at("examples"), &at("labels"), &FeatureFolders::one(&at("features")))?;

    let format = number_format(o.train.dtype, o.dims, o.device);
    let _tf32 = Tf32::set(format)?;
    let stats = Standardization { label_mean: -4.0, label_std: 2.0, ..Standardization::identity(&o.dims) };
    let learner = Learner::new(o.mapper, o.loss, o.dims, stats, o.seed, o.device)?;
    let mut optimizer = Optimizer::new(&learner.parameters(), o.train)?;
    let mut stepper = Stepper::new(o.train, o.dims, o.seed, o.device);

    let rows = dataset.rows(Split::Train);
    let lengths: Vec<usize> = rows.iter().map(|&r| dataset.positions(r)).collect();
    let batches = Batches::new(&rows, &lengths, o.train.batch, o.train.window_tokens, o.train.crop, o.seed);
    let samples = Samples::new(&dataset, o.train.target_pool, o.train.cache_gb);
    let loader = Loader::new(&samples, &batches, o.loss, o.seed, o.device);
    let threads = loader.threads(o.train.loader_threads, batches.largest());
    // A pass over all contexts, and what a first step of every length costs.
    let warm_up = batches.per_epoch().max(3) as usize;
    let total = (warm_up + ROUNDS * o.steps) as u64;

    let cuda = if let Device::Cuda(i) = o.device { Some(i) } else { None };
    cuda.map_or(Ok(()), pkv_gpu::reset_peak)?;
    let mut step = 0;
    let mut learn = |batch: &Loaded| -> Result<u64> {
        let _ = stepper.step(&learner, &mut optimizer, batch, step, o.train.lr)?;
        step += 1;
        Ok(batch.tokens())
    };
    let through = std::thread::scope(|scope| {
        let mut feed = loader.start(scope, threads, 0, total);
        // As in training: the next batch is on its way while the device works.
        let mut ahead = Some(feed.take()?);
        let mut taken = 1;
        rounds(o.device, warm_up, o.steps, || {
            let tokens = learn(&ahead.take().context("no batch is left")?)?;
            if taken < total {
                ahead = Some(feed.take()?);
                taken += 1;
            }
            Ok(tokens)
        })
    })?;
    let peak_bytes = cuda.map(pkv_gpu::cuda_memory).transpose()?.map(|m| m.allocated_peak);

    let resident: Vec<Loaded> =
        (0..batches.per_epoch()).map(|step| loader.one(step)).collect::<Result<_>>()?;
    let mut next = resident.iter().cycle();
    let there = rounds(o.device, warm_up, o.steps, || learn(next.next().context("there are no batches")?))?;
    Ok(BenchReport {
        parameters: learner.parameter_count(),
        batch: o.train.batch,
        proxy_heads: o.dims.proxy_heads,
        channels: o.dims.channels,
        target_heads: o.dims.outputs,
        positions: o.positions,
        dtype: format!("{format:?}").to_lowercase(),
        loader_threads: threads,
        steps: ROUNDS * o.steps,
        step_ms: through.0,
        tokens_per_s: through.1,
        resident_step_ms: there.0,
        resident_tokens_per_s: there.1,
        ratio: through.1 / there.1,
        peak_bytes,
    })
}

/// Milliseconds per step and tokens per second, medians over rounds of `steps` calls of `step`.
fn rounds(
    device: Device,
    warm_up: usize,
    steps: usize,
    mut step: impl FnMut() -> Result<u64>,
) -> Result<(f64, f64)> {
    for _ in 0..warm_up {
        step()?;
    }
    pkv_gpu::synchronize(device)?;
    let (mut ms, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let mut tokens = 0;
        for _ in 0..steps {
            tokens += step()?;
        }
        pkv_gpu::synchronize(device)?;
        let secs = begin.elapsed().as_secs_f64();
        ms.push(secs * 1e3 / steps as f64);
        rates.push(tokens as f64 / secs);
    }
    Ok((median(ms), median(rates)))
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(scratch: &Path) -> Result<Self> {
        let path = scratch.join(format!("bench-train-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot create folder `{}`", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove `{}`: {e}", self.0.display());
        }
    }
}

/// Shards of `contexts` synthetic examples: features around 0, scores whose log-odds are around -4.
fn write_stages(dir: &Path, o: &BenchOptions, contexts: usize) -> Result<()> {
    let mut rng = o.seed.stream("bench.noise", 0);
    let noise: Vec<f32> = (0..NOISE).map(|_| rng.random_range(-1.7f32..1.7)).collect();
    let cut = |at: usize, n: usize| (0..n).map(move |i| (at + i) % NOISE);
    let MapperDims { proxy_heads, channels, globals, outputs } = o.dims;
    let length = |i: usize| {
        let share = 1.0 - (1.0 - o.shortest) * i as f64 / contexts.max(2).saturating_sub(1) as f64;
        ((o.positions as f64 * share) as usize).max(1)
    };
    let id = |i: usize| format!("made-up-{i}");
    let one = |n: usize| n as u32;
    write(&dir.join("examples"), contexts, |i| Example {
        id: id(i),
        document: id(i),
        source: "made up".into(),
        split: Split::Train,
        window: 0,
        start: 0,
        tokens: vec![1; length(i)],
        facts: Vec::new(),
    })?;
    write(&dir.join("labels"), contexts, |i| {
        let t = length(i);
        let score = |k: usize| 1.0 / (1.0 + (4.0 - 2.0 * noise[k]).exp());
        let scores = cut(i * 7919, outputs * t).map(score).collect();
        LabelRow { id: id(i), layers: 1, kv_heads: one(outputs), positions: one(t), scores }
    })?;
    write(&dir.join("features"), contexts, |i| {
        let t = length(i);
        FeatureRow {
            id: id(i),
            layers: 1,
            kv_heads: one(proxy_heads),
            channels: one(channels),
            positions: one(t),
            heads: cut(i * 104_729, proxy_heads * channels * t).map(|k| noise[k]).collect(),
            globals: cut(i * 1_299_709, globals * t).map(|k| noise[k]).collect(),
        }
    })
}

fn write<R: Row>(dir: &Path, rows: usize, row: impl Fn(usize) -> R) -> Result<()> {
    let stage = StageDir::open(dir, "bench", &Fingerprint::new().with("bench", "made up"))?;
    let mut writer = StageWriter::new(stage, 16, StoreDtype::F16, Some(rows as u64))?;
    (0..rows).try_for_each(|i| writer.push(row(i)))?;
    writer.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_bench_reports_both_rates_and_leaves_nothing() {
        tch::set_num_threads(1);
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Auto).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mapper =
            MapperSection { head_width: 8, width: 16, dilations: vec![1], ..MapperSection::default() };
        let loss = LossSection { fine: 0.3, ..LossSection::default() };
        let train = TrainSection { batch: 3, loader_threads: Some(2), ema: 0.9, ..TrainSection::default() };
        let report = bench(&BenchOptions {
            mapper: &mapper,
            loss: &loss,
            train: &train,
            dims: MapperDims { proxy_heads: 3, channels: 2, globals: 1, outputs: 5 },
            positions: 64,
            shortest: 0.8,
            steps: 2,
            scratch: dir.path(),
            seed: Seed(1),
            device,
        })
        .unwrap();
        assert!(report.step_ms > 0.0 && report.resident_step_ms > 0.0, "{report:?}");
        let ratio = report.tokens_per_s / report.resident_tokens_per_s;
        assert!((report.ratio - ratio).abs() < 1e-12, "{report:?}");
        assert_eq!((report.batch, report.loader_threads, report.steps), (3, 2, 10));
        assert_eq!(report.peak_bytes.is_some(), device.is_cuda());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
