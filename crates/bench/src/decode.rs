//! Decoding from full and pruned caches: tokens per second, and the share of attention.
//!
//! Caches hold random numbers, because a step's time does not depend on them. The scores that decide what is
//! kept are random too, with differences between heads, so that KV heads keep different numbers of pairs, as
//! in real use.

use anyhow::Result;
use pkv_core::{ModelShape, Policy, RetentionRatio, Source};
use pkv_gpu::unless_exhausted;
use pkv_infer::{Budget, Keep};
use pkv_lm::{LanguageModel, NoTap, RaggedCache};
use pkv_recipe::plan::human_bytes;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::row::Row;
use crate::subject::Subject;
use crate::table::{aligned, cell, ratio};
use crate::timer::Timer;
use crate::{Bench, Head, Models, Report, Setting};

/// Steps of one run.
const STEPS: usize = 32;
/// Retention ratios; 1 is the full cache in the form of pruned ones.
const RATIOS: [f64; 5] = [1.0, 0.5, 0.2, 0.1, 0.05];
/// Heads of different lengths, and of one: what a server with paged caches holds. Where all is kept they are
/// the same.
const POLICIES: [Policy; 2] = [Policy::Pair, Policy::PairUniform];

/// Tokens per second of one model.
#[derive(Debug, Serialize)]
pub struct DecodeReport {
    #[serde(flatten)]
    head: Head,
    shape: ModelShape,
    steps: usize,
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
    /// Time of attention in all layers per step, by the device's timer.
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

/// The target: tokens per second from full and from pruned caches of each of `batches` sequences.
///
/// # Errors
/// The target is not available, or fails for a reason other than memory.
pub fn decode(setting: Setting, random_weights: bool, batches: &[usize]) -> Result<DecodeReport> {
    let models = Models { random_weights, peer: None };
    let target = Subject::new(&setting, Source::Target, models)?;
    let bench = Bench::new("decode", setting, models, &target)?;
    let decoding = Decoding { model: &target.needed_model()?, timer: &bench.timer };
    let mut rows = Vec::new();
    for &t in setting.contexts {
        for &batch in batches {
            if batch == 1 {
                rows.push(decoding.full(t)?);
            }
            for policy in POLICIES {
                for ratio in RATIOS.into_iter().filter(|r| *r < 1.0 || policy == Policy::Pair) {
                    rows.push(decoding.kept(t, batch, policy, ratio)?);
                }
            }
        }
    }
    compare(&mut rows);
    Ok(DecodeReport { head: bench.head, shape: target.section.shape, steps: STEPS, rows })
}

struct Decoding<'a> {
    model: &'a LanguageModel,
    timer: &'a Timer<'a>,
}

impl Decoding<'_> {
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
        let timed = self.timer.time(Row::new("full cache", t, 0.0), || {
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
        let attention = self.timer.device_seconds(|| {
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
        let apart = format!(" {ratio}, {policy}, batch {batch}");
        let timed = self.timer.time(Row::new("kept", t, 0.0).apart(apart), || {
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
        let attention = self.timer.device_seconds(|| {
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

    fn cells(&self) -> Vec<String> {
        let ms = |x: Option<f64>| cell(x, |x| format!("{:.3} ms", 1e3 * x));
        let bytes = |n: Option<usize>| cell(n, |n| human_bytes(n as u64));
        vec![
            self.what.to_owned(),
            if self.retain < 1.0 { self.policy.name() } else { "" }.to_owned(),
            self.context.to_string(),
            self.batch.to_string(),
            self.retain.to_string(),
            self.tokens_per_s.map_or_else(|| Row::OUT_OF_MEMORY.to_owned(), |x| format!("{x:.1}")),
            ms(self.step_s),
            ratio(self.speed_up),
            ms(self.attention_s),
            ratio(self.attention_speed_up),
            bytes(self.kept_bytes),
            ratio(self.cache_share),
            bytes(self.room_bytes),
        ]
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

impl Report for DecodeReport {
    fn text(&self) -> String {
        let head = &self.head;
        let names = [
            "",
            "policy",
            "context",
            "batch",
            "kept",
            "tokens/s",
            "step",
            "full/this",
            "attention",
            "full/this",
            "cache",
            "of full",
            "room",
        ];
        let mut lines = vec![names.map(str::to_owned).to_vec()];
        lines.extend(self.rows.iter().map(DecodeRow::cells));
        format!(
            "decoding, `{}` on {}, {}, {}: {}\n\n{}",
            head.recipe,
            head.device,
            head.dtype,
            head.weights(),
            self.shape,
            aligned(&lines)
        )
    }
}
