//! Attention of later queries to each KV pair of a context, in one layer.
//!
//! Which queries each channel reads, and how maxima and sums become features; [`pkv_gpu::query_statistics`]
//! gathers them. `extractor` chooses the model.
//!
//! Dimension key: h KV head, q query head, s new tokens of a forward, d head_dim, t context position,
//! c channel.

use std::ops::Range;

use anyhow::{Result, ensure};
use pkv_gpu::{Products, StatisticChannels, query_statistics, upload};
use pkv_recipe::ExtractSection;
use tch::{Device, Kind, Tensor};

use crate::channels::{Compute, chosen};

/// Added to a mean before its logarithm, so that a pair without attention has one.
pub(crate) const MEAN_FLOOR: f64 = 1e-7;
/// All channels are clamped to this on either side; also the log of a maximum over no queries.
pub(crate) const LOG_LIMIT: f64 = 16.0;

/// Which queries a channel reads; all of them at least `min_distance` later than the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The whole causal range, at every `stride`-th context position.
    All,
    /// At most `window_tokens` later.
    Window,
    /// The last `last_queries` of the context.
    Last,
}

/// How a channel reduces its queries' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fold {
    /// The maximum over queries and the KV head's query group.
    Max,
    /// The mean over the same.
    Mean,
    /// The mean over queries and all query heads of the layer.
    LayerMean,
}

/// Rows of the feature tensor that the statistics of one reach go to.
#[derive(Clone, Copy, Debug)]
struct Slots {
    reach: Reach,
    max: Option<i64>,
    mean: Option<i64>,
    layer_mean: Option<i64>,
}

impl Slots {
    /// The row that sums are gathered in: a layer's mean is that of its KV heads' means.
    fn sum(&self) -> Option<i64> {
        self.mean.or(self.layer_mean)
    }
}

/// The attention channels of one context.
///
/// [`Self::zeros`] makes room for a layer, [`Self::add`] takes its queries as they come, in any
/// number of pieces, and [`Self::finish`] turns what was gathered into features.
#[derive(Clone, Debug)]
pub struct QueryStatistics {
    prefix: usize,
    context: usize,
    min_distance: usize,
    window: usize,
    last: usize,
    stride: usize,
    block_tokens: usize,
    channels: usize,
    slots: Vec<Slots>,
}

impl QueryStatistics {
    /// Statistics of a context of `context` tokens after `prefix` tokens of the chat template.
    pub fn new(extract: &ExtractSection, prefix: usize, context: usize) -> Self {
        let slots = [Reach::All, Reach::Window, Reach::Last].into_iter().map(|reach| {
            let slot = |wanted: Fold| {
                let is_wanted =
                    |c: &Compute| matches!(c, Compute::Statistic(r, f) if (*r, *f) == (reach, wanted));
                chosen(&extract.channels).find(|(_, compute)| is_wanted(compute)).map(|(slot, _)| slot)
            };
            Slots { reach, max: slot(Fold::Max), mean: slot(Fold::Mean), layer_mean: slot(Fold::LayerMean) }
        });
        Self {
            prefix,
            context,
            min_distance: extract.min_distance,
            window: extract.window_tokens,
            last: extract.last_queries,
            stride: extract.whole_range_stride.max(1),
            block_tokens: extract.block_tokens.max(1),
            channels: extract.channels.len(),
            slots: slots.filter(|s| s.max.is_some() || s.sum().is_some()).collect(),
        }
    }

    /// Room for `heads` KV heads: f32 `[heads, channels, context]`.
    pub fn zeros(&self, heads: usize, device: Device) -> Tensor {
        Tensor::zeros([heads as i64, self.channels as i64, self.context as i64], (Kind::Float, device))
    }

    /// Gather the attention of new queries: [`pkv_gpu::query_statistics`]. A channel's row then holds the
    /// maximum so far, or the sum so far; rows of other channels are left alone.
    ///
    /// # Shapes
    /// - `of`: queries `[s, query_heads, head_dim]` and keys `[kv_heads, start + s, head_dim]`, rotary
    ///   applied: prefix, context so far, and the `s` new tokens, which are cache positions from `start` on
    /// - `lse_qs`: f32 `[query_heads, s]`, natural log-sum-exp of each query over all keys it sees; needed
    ///   where [`wants_lse`](pkv_gpu::wants_lse)
    /// - `gathered_hct`: `[kv_heads, channels, context]`, f32, same device; written in place
    ///
    /// # Errors
    /// Shapes disagree, there are more positions than prefix and context, or the driver refuses.
    pub fn add(
        &self,
        of: Products,
        lse_qs: Option<&Tensor>,
        start: usize,
        gathered_hct: &Tensor,
    ) -> Result<()> {
        let expected = [of.k_hkd.size()[0], self.channels as i64, self.context as i64];
        ensure!(
            gathered_hct.size() == expected,
            "room for features is {:?}, expected {expected:?}",
            gathered_hct.size()
        );
        let slot = |reach, max: bool| {
            let slots = self.slots.iter().find(|s| s.reach == reach)?;
            if max { slots.max } else { slots.sum() }.map(|slot| slot as usize)
        };
        let what = pkv_gpu::QueryStatistics {
            channels: StatisticChannels {
                all_max: slot(Reach::All, true),
                all_sum: slot(Reach::All, false),
                window_max: slot(Reach::Window, true),
                window_sum: slot(Reach::Window, false),
                last_max: slot(Reach::Last, true),
                last_sum: slot(Reach::Last, false),
            },
            prefix: self.prefix,
            min_distance: self.min_distance,
            window: self.window,
            last: self.context.saturating_sub(self.last),
            stride: self.stride,
            block_tokens: self.block_tokens,
        };
        query_statistics(of, lse_qs, start, &what, gathered_hct)
    }

    /// Is there any attention channel?
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Turn what was gathered into features, in place.
    ///
    /// Maxima become logs, sums become `log(mean + 1e-7)` over the queries in reach and the query
    /// group; both are clamped to +-16, which is also what a pair without queries in reach gets.
    ///
    /// `heads` is the number of KV heads of a layer, `group` of query heads per KV head; `gathered_hct` as in
    /// [`Self::add`], but its first axis may hold the heads of all layers.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn finish(&self, gathered_hct: &Tensor, heads: usize, group: usize) -> Result<()> {
        self.finish_range(gathered_hct, heads, group, 0..self.context)
    }

    /// As [`Self::finish`], for the context positions of `range` alone; each once.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub(crate) fn finish_range(
        &self,
        gathered_hct: &Tensor,
        heads: usize,
        group: usize,
        range: Range<usize>,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let part = |slot: i64| gathered_hct.select(1, slot).narrow(1, range.start as i64, range.len() as i64);
        for slots in &self.slots {
            if let Some(max) = slots.max {
                let mut max_ht = part(max);
                let _ = max_ht.log_().clamp_(-LOG_LIMIT, LOG_LIMIT);
            }
            let Some(sum) = slots.sum() else { continue };
            if let Some(layer_mean) = slots.layer_mean {
                // All query heads of a layer read the same queries, so the mean over its KV heads is the mean
                // over all.
                let sum_ht = part(sum);
                let sum_lht = sum_ht.reshape([-1, heads as i64, range.len() as i64]);
                let mean_lht = sum_lht.mean_dim([1i64].as_slice(), true, Kind::Float).expand_as(&sum_lht);
                part(layer_mean).copy_(&mean_lht.reshape_as(&sum_ht));
            }
            let counts: Vec<f32> =
                range.clone().map(|t| (self.queries(slots.reach, t) * group).max(1) as f32).collect();
            // Nothing waits: another part of the model may be at work.
            let counts_t = upload(&Tensor::from_slice(&counts), gathered_hct.device())?;
            for mean in [slots.mean, slots.layer_mean].into_iter().flatten() {
                let mut mean_ht = part(mean);
                mean_ht /= &counts_t;
                mean_ht += MEAN_FLOOR;
                let _ = mean_ht.log_().clamp_(-LOG_LIMIT, LOG_LIMIT);
            }
        }
        Ok(())
    }

    /// Context positions whose features no later query changes, once `read` context tokens were read.
    ///
    /// The window's channels settle `window_tokens` later; those of the whole range and of the last
    /// queries only when all is read.
    pub(crate) fn settled(&self, read: usize) -> usize {
        let behind = |slots: &Slots| match slots.reach {
            _ if read >= self.context => 0,
            Reach::Window => self.window,
            Reach::All | Reach::Last => self.context,
        };
        read.saturating_sub(self.slots.iter().map(behind).max().unwrap_or(0))
    }

    /// Number of queries that a channel reads for the key at context position `t`.
    fn queries(&self, reach: Reach, t: usize) -> usize {
        let near = t + self.min_distance;
        let (from, to) = match reach {
            Reach::All => {
                return self.context.div_ceil(self.stride).saturating_sub(near.div_ceil(self.stride));
            }
            Reach::Window => (near, self.context.min(t + self.window + 1)),
            Reach::Last => (near.max(self.context.saturating_sub(self.last)), self.context),
        };
        to.saturating_sub(from)
    }
}
