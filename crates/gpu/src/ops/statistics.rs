//! Attention of later queries to each KV pair of a context, in one layer.
//!
//! Queries are context positions only; the softmax of a query runs over its whole causal row, prefix
//! included, so that its weights are those of the prefill. The portable form takes rows in blocks: a block
//! sees every key it may attend to, its softmax is exact on its own, and no matrix of all queries times all
//! keys is ever held. What the statistics are for is `extract`'s subject.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens of a forward, r
//! rows (queries) of a block, d head_dim, k keys of the cache, t context position, c channel.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::scores::block_elements;
use crate::kernels::{self, Products, QueryStatistics};

/// Maximum and sum of the softmax weights that new queries pay each key, over queries and query group,
/// folded into what `gathered_hct` holds: a channel's row has the maximum so far, or the sum so far. Other
/// channels are left alone.
///
/// # Shapes
/// - `of`: see [`Products`]; queries are those of cache positions `start..start + rows`, of which those of
///   the prefix are skipped, and their own keys are the last of `[kv_heads, start + rows, head_dim]`
/// - `lse_qr`: f32 `[query_heads, rows]`, any strides: natural log-sum-exp of each row over all the keys it
///   sees. Needed where [`wants_lse`](super::wants_lse)
/// - `gathered_hct`: f32 `[kv_heads, channels, context]`, innermost contiguous, same device
///
/// # Errors
/// Shapes disagree, there are more positions than prefix and context, or the driver refuses.
///
/// # Source
/// The attention of the model's own prefill. Differs: products and softmax in f32 whatever the model's kind
/// is.
pub fn query_statistics(
    of: Products,
    lse_qr: Option<&Tensor>,
    start: usize,
    what: &QueryStatistics,
    gathered_hct: &Tensor,
) -> Result<()> {
    let d = of.q_rqd.size().last().copied().unwrap_or(0);
    match lse_qr {
        Some(lse_qr) if kernels::has_fused_scores(of.q_rqd.device(), of.q_rqd.kind(), d) => {
            kernels::fused_query_statistics(of, lse_qr, start, what, gathered_hct)
        }
        _ => portable(of, start, what, gathered_hct),
    }
}

pub(super) fn portable(
    of: Products,
    start: usize,
    what: &QueryStatistics,
    gathered_hct: &Tensor,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let (q_qsd, k_hkd) = (of.q_rqd.transpose(0, 1), of.k_hkd);
    let (q, k, out) = (q_qsd.size(), k_hkd.size(), gathered_hct.size());
    ensure!(
        q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[0] % k[0] == 0 && q[0] > 0,
        "queries {q:?} and keys {k:?} do not fit: expected [query heads, new tokens, head_dim] and \
         [KV heads, positions, head_dim]"
    );
    ensure!(
        out.len() == 3
            && out[0] == k[0]
            && what.channels.list().iter().flatten().all(|c| (*c as i64) < out[1]),
        "room for statistics is {out:?}, expected [{}, channels, context] for {:?}",
        k[0],
        what.channels
    );
    let (end, context) = (start + q[1] as usize, out[2] as usize);
    ensure!(
        k[1] as usize == end && end <= what.prefix + context,
        "{} new tokens at {start} and {} keys do not fit a prefix of {} and a context of {context}",
        q[1],
        k[1],
        what.prefix
    );
    if what.channels.list().iter().all(Option::is_none) {
        return Ok(());
    }
    let k_hdk = k_hkd.to_kind(Kind::Float).transpose(1, 2);
    let mut row = start.max(what.prefix);
    while row < end {
        // Long contexts get fewer rows than `block_tokens`: a row is as long as the context. At 170,000
        // tokens and 32 query heads a GPU's block has six, which are 24 per KV head of a group of four.
        let budget = block_elements(q_qsd.device()) / (q[0] as usize * end);
        let rows = row..end.min(row + what.block_tokens.min(budget).max(1));
        let q_qrd = q_qsd.narrow(1, (row - start) as i64, rows.len() as i64).to_kind(Kind::Float) * of.scale;
        row = rows.end;
        block(what, &q_qrd, &k_hdk, rows, gathered_hct);
    }
    Ok(())
}

/// One block of scaled queries, at cache positions `rows`.
fn block(what: &QueryStatistics, q_qrd: &Tensor, k_hdk: &Tensor, rows: Range<usize>, gathered_hct: &Tensor) {
    let (n, visible) = (rows.len() as i64, rows.end as i64);
    let (heads, head_dim) = (k_hdk.size()[0], k_hdk.size()[1]);
    let group = q_qrd.size()[0] / heads;
    let q_hrd = q_qrd.reshape([heads, group * n, head_dim]);
    let logits_hgrk = q_hrd.matmul(&k_hdk.narrow(2, 0, visible)).view([heads, group, n, visible]);
    // Only the block's own positions can lie after a row.
    let later_rr = Tensor::ones([n, n], (Kind::Bool, k_hdk.device())).triu(1);
    let _ = logits_hgrk.narrow(3, visible - n, n).masked_fill_(&later_rr, f64::NEG_INFINITY);
    let prefix = what.prefix as i64;
    let weights_hgrt = logits_hgrk.softmax(-1, Kind::Float).narrow(3, prefix, visible - prefix);
    drop(logits_hgrk);

    // From here on, rows and columns are context positions.
    let (first, end) = (rows.start - what.prefix, rows.end - what.prefix);
    // Keys up to here are at least `min_distance` older than some row; later ones get nothing.
    let Some(columns) = end.checked_sub(what.min_distance).filter(|n| *n > 0) else { return };
    // A weight from too near counts as zero, which is below all others and adds nothing.
    let mixed = (first + 1).saturating_sub(what.min_distance)..columns;
    zero_where(&weights_hgrt, first, &mixed, |distance_rt| distance_rt.lt(what.min_distance as i64));
    let [all_max, all_sum, window_max, window_sum, last_max, last_sum] = what.channels.list();
    let (all, near, last) = ([all_max, all_sum], [window_max, window_sum], [last_max, last_sum]);
    let wanted = |channels: &[Option<usize>; 2]| channels.iter().any(Option::is_some);
    let stride = what.stride.max(1);
    if wanted(&all) {
        let skipped = first.next_multiple_of(stride) - first;
        if skipped < rows.len() {
            let asking = weights_hgrt.slice(2, skipped as i64, None, stride as i64);
            gather(all, &asking, 0..columns, gathered_hct);
        }
    }
    if wanted(&last) {
        let from = what.last.max(first);
        if from < end {
            let asking = weights_hgrt.narrow(2, (from - first) as i64, (end - from) as i64);
            gather(last, &asking, 0..columns, gathered_hct);
        }
    }
    // The window comes last: it may then blank what is out of its reach.
    if wanted(&near) {
        let band = first.saturating_sub(what.window)..columns;
        if !band.is_empty() {
            let mixed = band.start..columns.min(end.saturating_sub(what.window));
            zero_where(&weights_hgrt, first, &mixed, |distance_rt| distance_rt.gt(what.window as i64));
            gather(near, &weights_hgrt, band, gathered_hct);
        }
    }
}

/// Zero the weights in `columns` whose distance from key to query `blank` picks.
fn zero_where(
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

/// Fold the weights of some rows into the channels of maximum and sum, for the context positions `columns`.
fn gather(
    [max, sum]: [Option<usize>; 2],
    weights_hgrt: &Tensor,
    columns: Range<usize>,
    gathered_hct: &Tensor,
) {
    let (from, n) = (columns.start as i64, columns.len() as i64);
    let weights_hgrt = weights_hgrt.narrow(3, from, n);
    let row = |channel: usize| gathered_hct.select(1, channel as i64).narrow(1, from, n);
    if let Some(channel) = max {
        let mut max_ht = row(channel);
        max_ht.copy_(&max_ht.maximum(&weights_hgrt.amax([1, 2], false)));
    }
    if let Some(channel) = sum {
        let mut sum_ht = row(channel);
        sum_ht += weights_hgrt.sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float);
    }
}
