//! Attention of later queries to each KV pair of a context, in one layer.
//!
//! Queries are context positions only; the softmax of a query runs over its whole causal row, prefix
//! included, so that its weights are those of the prefill. Rows are taken in blocks: a block sees every key
//! it may attend to, its softmax is exact on its own, and no matrix of all queries times all keys is ever
//! held. `extractor` chooses the model.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens of a
//! forward, r rows (queries) of a block, d head_dim, k keys of the cache, t context position, c channel.

use std::ops::Range;

use anyhow::{Result, ensure};
use pkv_gpu::{Products, StatisticChannels, fused_query_statistics};
use pkv_recipe::ExtractSection;
use pkv_score::block_elements;
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

    /// Gather the attention of new queries. A channel's row then holds the maximum so far, or the
    /// sum so far; rows of other channels are left alone.
    ///
    /// # Shapes
    /// - `q_qsd`: `[query_heads, s, head_dim]`, rotary applied; query heads of one KV head are neighbours
    /// - `k_hkd`: `[kv_heads, start + s, head_dim]`: prefix, context so far, and the `s` new tokens, which
    ///   are the cache's positions from `start` on; kind and device of the queries
    /// - `scale`: what their products are multiplied with
    /// - `gathered_hct`: `[kv_heads, channels, context]`, f32, same device; written in place
    ///
    /// # Errors
    /// Shapes disagree, or there are more positions than prefix and context.
    pub fn add(
        &self,
        q_qsd: &Tensor,
        k_hkd: &Tensor,
        scale: f64,
        start: usize,
        gathered_hct: &Tensor,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let (q, k) = (q_qsd.size(), k_hkd.size());
        ensure!(
            q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[0] % k[0] == 0 && q[0] > 0,
            "queries {q:?} and keys {k:?} do not fit: expected [query heads, new tokens, head_dim] and \
             [KV heads, positions, head_dim]"
        );
        let end = start + q[1] as usize;
        ensure!(
            k[1] as usize == end && end <= self.prefix + self.context,
            "{} new tokens at {start} and {} keys do not fit a prefix of {} and a context of {}",
            q[1],
            k[1],
            self.prefix,
            self.context
        );
        let expected = [k[0], self.channels as i64, self.context as i64];
        ensure!(
            gathered_hct.size() == expected,
            "room for features is {:?}, expected {expected:?}",
            gathered_hct.size()
        );
        if self.slots.is_empty() {
            return Ok(());
        }
        let k_hdk = k_hkd.to_kind(Kind::Float).transpose(1, 2);
        let mut row = start.max(self.prefix);
        while row < end {
            // Long contexts get fewer rows than `block_tokens`: a row is as long as the context. At 170,000
            // tokens and 32 query heads a GPU's block has six, which are 24 per KV head of a group of four.
            let budget = block_elements(q_qsd.device()) / (q[0] as usize * end);
            let rows = row..end.min(row + self.block_tokens.min(budget).max(1));
            let q_qrd = q_qsd.narrow(1, (row - start) as i64, rows.len() as i64).to_kind(Kind::Float) * scale;
            row = rows.end;
            self.block(&q_qrd, &k_hdk, rows, gathered_hct);
        }
        Ok(())
    }

    /// One block of scaled queries, at cache positions `rows`.
    fn block(&self, q_qrd: &Tensor, k_hdk: &Tensor, rows: Range<usize>, gathered_hct: &Tensor) {
        let (n, visible) = (rows.len() as i64, rows.end as i64);
        let (heads, head_dim) = (k_hdk.size()[0], k_hdk.size()[1]);
        let group = q_qrd.size()[0] / heads;
        let q_hrd = q_qrd.reshape([heads, group * n, head_dim]);
        let logits_hgrk = q_hrd.matmul(&k_hdk.narrow(2, 0, visible)).view([heads, group, n, visible]);
        // Only the block's own positions can lie after a row.
        let later_rr = Tensor::ones([n, n], (Kind::Bool, k_hdk.device())).triu(1);
        let _ = logits_hgrk.narrow(3, visible - n, n).masked_fill_(&later_rr, f64::NEG_INFINITY);
        let prefix = self.prefix as i64;
        let weights_hgrt = logits_hgrk.softmax(-1, Kind::Float).narrow(3, prefix, visible - prefix);
        drop(logits_hgrk);

        // From here on, rows and columns are context positions.
        let (first, end) = (rows.start - self.prefix, rows.end - self.prefix);
        // Keys up to here are at least `min_distance` older than some row; later ones get nothing.
        let Some(columns) = end.checked_sub(self.min_distance).filter(|n| *n > 0) else { return };
        // A weight from too near counts as zero, which is below all others and adds nothing.
        let mixed = (first + 1).saturating_sub(self.min_distance)..columns;
        self.zero_where(&weights_hgrt, first, &mixed, |distance_rt| distance_rt.lt(self.min_distance as i64));
        for slots in &self.slots {
            match slots.reach {
                Reach::All => {
                    let skipped = first.next_multiple_of(self.stride) - first;
                    if skipped < rows.len() {
                        let asking = weights_hgrt.slice(2, skipped as i64, None, self.stride as i64);
                        gather(slots, &asking, 0..columns, gathered_hct);
                    }
                }
                Reach::Last => {
                    let from = self.context.saturating_sub(self.last).max(first);
                    if from < end {
                        let last = weights_hgrt.narrow(2, (from - first) as i64, (end - from) as i64);
                        gather(slots, &last, 0..columns, gathered_hct);
                    }
                }
                Reach::Window => {}
            }
        }
        // The window comes last: it may then blank what is out of its reach.
        if let Some(slots) = self.slots.iter().find(|s| s.reach == Reach::Window) {
            let band = first.saturating_sub(self.window)..columns;
            if !band.is_empty() {
                let mixed = band.start..columns.min(end.saturating_sub(self.window));
                self.zero_where(&weights_hgrt, first, &mixed, |distance_rt| {
                    distance_rt.gt(self.window as i64)
                });
                gather(slots, &weights_hgrt, band, gathered_hct);
            }
        }
    }

    /// Zero the weights in `columns` whose distance from key to query `blank` picks.
    fn zero_where(
        &self,
        weights_hgrt: &Tensor,
        first: usize,
        columns: &Range<usize>,
        blank: impl Fn(&Tensor) -> Tensor,
    ) {
        if columns.is_empty() {
            return;
        }
        let options = (Kind::Int64, weights_hgrt.device());
        let rows = weights_hgrt.size()[2];
        let row_r = Tensor::arange_start(first as i64, first as i64 + rows, options);
        let column_t = Tensor::arange_start(columns.start as i64, columns.end as i64, options);
        let distance_rt = row_r.unsqueeze(1) - column_t;
        let _ = weights_hgrt
            .narrow(3, columns.start as i64, columns.len() as i64)
            .masked_fill_(&blank(&distance_rt), 0.0);
    }

    /// [`Self::add`] by the fused kernel, which needs the rows' log-sum-exps and no blocks.
    ///
    /// # Shapes
    /// - `of`: queries as [`has_fused_scores`](pkv_gpu::has_fused_scores) wants them
    /// - `lse_qr`: f32 `[query_heads, s]`, natural log-sum-exp of each query over all keys it sees
    /// - the others as in [`Self::add`]
    ///
    /// # Errors
    /// Shapes disagree, or the driver refuses.
    pub fn add_fused(
        &self,
        of: Products,
        lse_qr: &Tensor,
        start: usize,
        gathered_hct: &Tensor,
    ) -> Result<()> {
        let slot = |reach, max: bool| {
            let slots = self.slots.iter().find(|s| s.reach == reach)?;
            if max { slots.max } else { slots.sum() }.map(|slot| slot as usize)
        };
        let channels = StatisticChannels {
            all_max: slot(Reach::All, true),
            all_sum: slot(Reach::All, false),
            window_max: slot(Reach::Window, true),
            window_sum: slot(Reach::Window, false),
            last_max: slot(Reach::Last, true),
            last_sum: slot(Reach::Last, false),
        };
        let what = pkv_gpu::QueryStatistics {
            channels,
            prefix: self.prefix,
            min_distance: self.min_distance,
            window: self.window,
            last: self.context.saturating_sub(self.last),
            stride: self.stride,
        };
        fused_query_statistics(of, lse_qr, start, &what, gathered_hct)
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
    pub fn finish(&self, gathered_hct: &Tensor, heads: usize, group: usize) {
        self.finish_range(gathered_hct, heads, group, 0..self.context);
    }

    /// As [`Self::finish`], for the context positions of `range` alone; each once.
    pub(crate) fn finish_range(
        &self,
        gathered_hct: &Tensor,
        heads: usize,
        group: usize,
        range: Range<usize>,
    ) {
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
            let counts_t = Tensor::from_slice(&counts).to_device(gathered_hct.device());
            for mean in [slots.mean, slots.layer_mean].into_iter().flatten() {
                let mut mean_ht = part(mean);
                mean_ht /= &counts_t;
                mean_ht += MEAN_FLOOR;
                let _ = mean_ht.log_().clamp_(-LOG_LIMIT, LOG_LIMIT);
            }
        }
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

/// Fold the weights of some rows into what was gathered for the context positions `columns`.
fn gather(slots: &Slots, weights_hgrt: &Tensor, columns: Range<usize>, gathered_hct: &Tensor) {
    let (from, n) = (columns.start as i64, columns.len() as i64);
    let weights_hgrt = weights_hgrt.narrow(3, from, n);
    let row = |slot: i64| gathered_hct.select(1, slot).narrow(1, from, n);
    if let Some(slot) = slots.max {
        let mut max_ht = row(slot);
        max_ht.copy_(&max_ht.maximum(&weights_hgrt.amax([1, 2], false)));
    }
    if let Some(slot) = slots.sum() {
        let mut sum_ht = row(slot);
        sum_ht += weights_hgrt.sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float);
    }
}
