//! Decoding from full and pruned caches: tokens per second, and the share of attention.
//!
//! Caches hold random numbers, because a step's time does not depend on them. The scores that decide what is
//! kept are random too, with differences between heads, so that KV heads keep different numbers of pairs, as
//! in real use.

use std::fmt::Write;

use anyhow::{Context, Result};
use pkv_core::{ModelShape, Policy, RetentionRatio};
use pkv_gpu::unless_exhausted;
use pkv_infer::{Budget, Keep};
use pkv_lm::{LanguageModel, NoTap, RaggedCache};
use pkv_recipe::plan::human_bytes;
use serde::Serialize;
use tch::{Kind, Tensor};

use super::Job;
use super::clock::{Clock, Row};
use super::models::Subject;
use super::roofline::{self, Roofline};
use crate::pair::Role;
use crate::session::device_name;

/// Steps of one run.
const STEPS: usize = 32;
/// Retention ratios; 1 is the full cache in the form of pruned ones.
const RATIOS: [f64; 5] = [1.0, 0.5, 0.2, 0.1, 0.05];
/// Heads of different lengths, and of one: what a server with paged caches holds. Where all is kept they are
/// the same.
const POLICIES: [Policy; 2] = [Policy::Pair, Policy::PairUniform];

#[derive(Debug, Serialize)]
struct Report {
    stage: &'static str,
    recipe: String,
    device: String,
    dtype: &'static str,
    random_weights: bool,
    shape: ModelShape,
    steps: usize,
    roofline: Roofline,
    rows: Vec<DecodeRow>,
}

/// One cache, one batch.
#[derive(Clone, Debug, Serialize)]
struct DecodeRow {
    /// `full cache`: the cache of the prefill, as it is. `kept`: a ragged one.
    what: &'static str,
    context: usize,
    batch: usize,
    retain: f64,
    /// Distribution of the kept pairs over heads.
    policy: Policy,
    /// Absent if it does not fit.
    tokens_per_s: Option<f64>,
    step_s: Option<f64>,
    /// Time of attention in all layers per step, by the device's clock.
    attention_s: Option<f64>,
    /// Bytes allocated for keys and values: `kept_bytes + room_bytes`.
    cache_bytes: Option<usize>,
    /// Of the KV pairs that are held.
    kept_bytes: Option<usize>,
    /// For the tokens that follow.
    room_bytes: Option<usize>,
    /// Against the ragged cache that keeps all, same context and batch.
    speed_up: Option<f64>,
    attention_speed_up: Option<f64>,
    /// Of `kept_bytes`.
    cache_share: Option<f64>,
}

/// # Errors
/// The target is not available, or fails for a reason other than memory.
pub(super) fn run(job: &Job) -> Result<()> {
    let Job { args, recipe, contexts, device, stop, .. } = *job;
    let target = Subject::new(recipe, Role::Target, device, args.random_weights)?;
    let roofline = roofline::measure(device, target.kind)?;
    let clock = Clock::new(device, args, &roofline, stop);
    let model = target.model()?.context("the target alone does not fit into the device's memory")?;
    let bench = Bench { model: &model, clock: &clock };
    let mut rows = Vec::new();
    for &t in contexts {
        for &batch in &args.batch {
            if batch == 1 {
                rows.push(bench.full(t)?);
            }
            for policy in POLICIES {
                for ratio in RATIOS.into_iter().filter(|r| *r < 1.0 || policy == Policy::Pair) {
                    rows.push(bench.kept(t, batch, policy, ratio)?);
                }
            }
        }
    }
    compare(&mut rows);
    let report = Report {
        stage: args.what.name(),
        recipe: recipe.name.clone(),
        device: device_name(device),
        dtype: super::dtype_name(target.kind),
        random_weights: args.random_weights,
        shape: target.section.shape,
        steps: STEPS,
        roofline,
        rows,
    };
    job.print(&report, text)
}

struct Bench<'a> {
    model: &'a LanguageModel,
    clock: &'a Clock<'a>,
}

impl Bench<'_> {
    /// The prefill's own cache, batch 1.
    fn full(&self, t: usize) -> Result<DecodeRow> {
        let row = DecodeRow::new("full cache", t, 1, Policy::Pair, 1.0);
        let Some(mut cache) = unless_exhausted(|| Ok(self.model.noise_cache(t, STEPS)))? else {
            return Ok(row);
        };
        let keys = cache.keys(0);
        // Caches are allocated in blocks of rows: a view's stride tells.
        let rows = keys.stride()[0] / keys.size()[2];
        let row_bytes = self.pair_bytes() * cache.layers() * keys.size()[0] as usize;
        let bytes = [t, rows as usize - t].map(|n| n * row_bytes);
        let timed = self.clock.time(Row::new("full cache", t, 0.0), || {
            cache.truncate(t);
            let mut id_s = self.first(1).squeeze_dim(0);
            for _ in 0..STEPS {
                let hidden_sm = self.model.forward(&id_s, &mut cache, &mut NoTap)?;
                id_s = self.model.logits(&hidden_sm).argmax(-1, false);
            }
            Ok(id_s)
        })?;
        cache.truncate(t);
        let shape = self.model.shape();
        let q_sqd = self.noise(&[1, shape.query_heads as i64, shape.head_dim as i64]);
        let attention = self.clock.device_seconds(|| {
            for _ in 0..STEPS {
                self.model.attend_full(&q_sqd, &cache)?;
            }
            Ok(())
        })?;
        Ok(row.timed(&timed, attention, bytes))
    }

    /// A ragged cache of `batch` contexts.
    fn kept(&self, t: usize, batch: usize, policy: Policy, ratio: f64) -> Result<DecodeRow> {
        let row = DecodeRow::new("kept", t, batch, policy, ratio);
        let Some(mut cache) = unless_exhausted(|| self.ragged(t, batch, policy, ratio))? else {
            return Ok(row);
        };
        let timed = self.clock.time(Row::new("kept", t, 0.0), || {
            cache.rewind();
            let mut id_b1 = self.first(batch);
            for _ in 0..STEPS {
                let hidden_bsm = self.model.forward_ragged(&id_b1, &mut cache)?;
                id_b1 = self.model.logits(&hidden_bsm.squeeze_dim(1)).argmax(-1, true);
            }
            Ok(id_b1)
        })?;
        cache.rewind();
        let shape = self.model.shape();
        let q_bsqd = self.noise(&[batch as i64, 1, shape.query_heads as i64, shape.head_dim as i64]);
        let attention = self.clock.device_seconds(|| {
            for _ in 0..STEPS {
                self.model.attend_ragged(&q_bsqd, &mut cache)?;
            }
            Ok(())
        })?;
        let pairs: usize = (0..cache.layers()).map(|l| cache.kept(l).iter().sum::<usize>()).sum();
        let held = pairs * self.pair_bytes();
        Ok(row.timed(&timed, attention, [held, cache.bytes() - held]))
    }

    fn ragged(&self, t: usize, batch: usize, policy: Policy, ratio: f64) -> Result<RaggedCache> {
        let keep =
            Keep { budget: Budget::Ratio(RetentionRatio::new(ratio)?), policy, budgets: None, recent: 0 };
        let shape = self.model.shape();
        let options = (Kind::Float, self.model.device());
        let one = |index: usize| -> Result<RaggedCache> {
            tch::manual_seed(index as i64);
            let size = [shape.layers as i64, shape.kv_heads as i64];
            let heads = Tensor::randn([size[0], size[1], 1], options) * 0.5;
            let scores_lht = Tensor::randn([size[0], size[1], t as i64], options) + heads;
            let cache = self.model.noise_cache(t, 0);
            let keep_lht = keep.mask(&scores_lht, &cache, 0)?;
            RaggedCache::prune(cache, &keep_lht, STEPS)
        };
        RaggedCache::join((0..batch).map(one).collect::<Result<_>>()?)
    }

    /// Key and value of one position in one KV head.
    fn pair_bytes(&self) -> usize {
        2 * self.model.shape().head_dim * self.model.kind().elt_size_in_bytes()
    }

    /// Queries.
    fn noise(&self, size: &[i64]) -> Tensor {
        Tensor::randn(size, (self.model.kind(), self.model.device()))
    }

    /// A first token for every sequence: i64 `[batch, 1]`, on the device.
    fn first(&self, batch: usize) -> Tensor {
        Tensor::ones([batch as i64, 1], (Kind::Int64, self.model.device()))
    }
}

impl DecodeRow {
    fn new(what: &'static str, context: usize, batch: usize, policy: Policy, retain: f64) -> Self {
        Self {
            what,
            context,
            batch,
            retain,
            policy,
            tokens_per_s: None,
            step_s: None,
            attention_s: None,
            cache_bytes: None,
            kept_bytes: None,
            room_bytes: None,
            speed_up: None,
            attention_speed_up: None,
            cache_share: None,
        }
    }

    /// `steps` and `attention` (seconds) are of [`STEPS`] steps; bytes of kept pairs, and of the room beside
    /// them.
    fn timed(mut self, steps: &Row, attention: Option<f64>, [kept, room]: [usize; 2]) -> Self {
        self.step_s = steps.measured.as_ref().map(|m| m.median_s / STEPS as f64);
        self.tokens_per_s = self.step_s.map(|s| self.batch as f64 / s);
        self.attention_s = attention.map(|s| s / STEPS as f64);
        (self.kept_bytes, self.room_bytes) = (Some(kept), Some(room));
        self.cache_bytes = Some(kept + room);
        self
    }
}

/// Set every row beside the ragged cache that keeps all; where that does not fit, beside nothing.
fn compare(rows: &mut [DecodeRow]) {
    let all: Vec<DecodeRow> = rows.iter().filter(|r| r.what == "kept" && r.retain == 1.0).cloned().collect();
    for row in rows {
        let whole = all.iter().find(|a| a.context == row.context && a.batch == row.batch);
        let Some(whole) = whole else { continue };
        let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
        row.speed_up = ratio(whole.step_s, row.step_s);
        row.attention_speed_up = ratio(whole.attention_s, row.attention_s);
        row.cache_share = ratio(row.kept_bytes.map(|b| b as f64), whole.kept_bytes.map(|b| b as f64));
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let weights = if report.random_weights { "random weights" } else { "its own weights" };
    let _ = writeln!(
        out,
        "decoding, `{}` on {}, {}, {weights}: {}\n",
        report.recipe, report.device, report.dtype, report.shape
    );
    let _ = writeln!(
        out,
        "  {:<11} {:<12} {:>8} {:>6} {:>6} {:>11} {:>11} {:>8} {:>11} {:>8} {:>11} {:>6} {:>11}",
        "",
        "policy",
        "context",
        "batch",
        "kept",
        "tokens/s",
        "step",
        "faster",
        "attention",
        "faster",
        "cache",
        "share",
        "room"
    );
    for r in &report.rows {
        let dash = || "-".to_owned();
        let ms = |x: Option<f64>| x.map_or_else(dash, |x| format!("{:.3} ms", 1e3 * x));
        let bytes = |n: Option<usize>| n.map_or_else(dash, |n| human_bytes(n as u64));
        let times = |x: Option<f64>| x.map_or_else(dash, |x| format!("{x:.2}"));
        let _ = writeln!(
            out,
            "  {:<11} {:<12} {:>8} {:>6} {:>6} {:>11} {:>11} {:>8} {:>11} {:>8} {:>11} {:>6} {:>11}",
            r.what,
            if r.retain < 1.0 { r.policy.name() } else { "" },
            r.context,
            r.batch,
            r.retain,
            r.tokens_per_s.map_or_else(|| Row::OUT_OF_MEMORY.to_owned(), |x| format!("{x:.1}")),
            ms(r.step_s),
            times(r.speed_up),
            ms(r.attention_s),
            times(r.attention_speed_up),
            bytes(r.kept_bytes),
            times(r.cache_share),
            bytes(r.room_bytes),
        );
    }
    out
}
