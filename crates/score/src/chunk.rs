//! The score of one scoring chunk in one layer, from queries and keys.
//!
//! The tokens of the queries come from `request`, KVzip+'s factors from `weighting`. Rows are taken in blocks
//! that bound memory. A block sees every key it may attend to, so its softmax is exact on its own and no
//! second pass is needed.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens (rows),
//! r rows of a block, d head_dim, k keys attended to, t position in the scoring chunk.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::Weighting;

/// Number of softmax weights held at once; sets the block size of [`chunk_scores`] and `extract`.
///
/// On a CPU 2 MiB of f32, which stay in its cache: 0.76 s of one core for a chunk of 1,400 tokens
/// in 12 layers of 6 query heads, against 2.1 s with 128 MiB. On a GPU 128 MiB, twice that at the
/// peak: with 32 query heads and chunks of 2000 tokens a block has about 250 rows.
pub fn block_elements(device: Device) -> usize {
    if device.is_cuda() { 1 << 25 } else { 1 << 19 }
}

/// Queries of the repeat and the keys they may see.
pub struct ChunkAttention<'a> {
    /// `[query_heads, s, head_dim]`, rotary applied; query heads of one KV head are neighbours.
    pub q_qsd: &'a Tensor,
    /// `[kv_heads, positions, head_dim]`: the cache's keys, the `s` new tokens last.
    pub k_hkd: &'a Tensor,
    /// Scale of products of queries and keys.
    pub scale: f64,
    /// Every row sees the first `sink` positions of the cache.
    pub sink: usize,
    /// Cache positions of the scoring chunk, after the sink and before the new tokens.
    pub chunk: Range<usize>,
}

/// Scores of one scoring chunk in one layer.
pub struct ChunkScores {
    /// `[kv_heads, t]`, f32: the strongest weight over rows and query group; higher means keep.
    pub max_ht: Tensor,
    /// `[kv_heads, t]`, f32: the mean weight over rows and query group.
    pub mean_ht: Tensor,
}

/// Score each KV pair of one scoring chunk by the attention that the repeat's rows pay it.
///
/// The softmax of a row runs over [the first `sink` positions | the chunk | the new tokens up to
/// the row itself] of the scaled products. The maximum runs over all rows, request and switch
/// included, and over the query group, so a pair that matters to one query head stays for all
/// that share it. `weighting` multiplies the softmax weights first (KVzip+).
///
/// # Shapes
/// - `attention`: see [`ChunkAttention`]; queries and keys of one floating kind and one device
/// - returns `[kv_heads, chunk]` twice, f32, same device, no gradient; in `[0, 1]` without weighting
///
/// `block_elements` bounds how many weights are held at once (at least one row is), see
/// [`block_elements()`]. It changes the maximum by nothing but the rounding of a product.
///
/// # Errors
/// Shapes, the chunk's range or the weighting disagree.
///
/// # Source
/// KVzip, arXiv 2505.23416 (snu-mllab/KVzip, `attention/score.py`), and `KVzipPress` of
/// NVIDIA/kvpress 0.5.5. Differs: products and softmax in f32 whatever the model's kind is.
/// Operands that come from bf16 are exact in TF32 too, so TF32 costs no accuracy there.
pub fn chunk_scores(
    attention: &ChunkAttention,
    weighting: Option<&Weighting>,
    block_elements: usize,
) -> Result<ChunkScores> {
    let _no_grad = tch::no_grad_guard();
    let ChunkAttention { q_qsd, k_hkd, scale, sink, chunk } = attention;
    let dims = Dims::check(q_qsd, k_hkd, *sink, chunk)?;
    if let Some(weighting) = weighting {
        weighting.check(dims.rows, dims.heads * dims.group, dims.chunk)?;
    }
    let Dims { heads, group, rows, head_dim, chunk: positions } = dims;
    let sink = *sink as i64;

    // Queries carry the scale: they are fewer than the products.
    let q_hgsd = (q_qsd.to_kind(Kind::Float) * *scale).reshape([heads, group, rows, head_dim]);
    let start = k_hkd.size()[1] - rows;
    let k_hkd = Tensor::cat(
        &[
            k_hkd.narrow(1, 0, sink),
            k_hkd.narrow(1, chunk.start as i64, positions),
            k_hkd.narrow(1, start, rows),
        ],
        1,
    )
    .to_kind(Kind::Float);
    let k_hdk = k_hkd.transpose(1, 2);

    let options = (Kind::Float, q_qsd.device());
    // Zero is below every weight, and what the maximum over no rows would be.
    let mut max_hgt = Tensor::zeros([heads, group, positions], options);
    let mut sum_hgt = Tensor::zeros([heads, group, positions], options);
    let row_elements = (heads * group * (sink + positions + rows)) as usize;
    let block = (block_elements / row_elements).clamp(1, rows as usize) as i64;
    let mut first = 0;
    while first < rows {
        let n = block.min(rows - first);
        let visible = sink + positions + first + n;
        let q_hrd = q_hgsd.narrow(2, first, n).reshape([heads, group * n, head_dim]);
        let logits_hgrk = q_hrd.matmul(&k_hdk.narrow(2, 0, visible)).view([heads, group, n, visible]);
        // Only the block's own new tokens can lie after a row.
        let later_rr = Tensor::ones([n, n], (Kind::Bool, q_qsd.device())).triu(1);
        let _ = logits_hgrk.narrow(3, visible - n, n).masked_fill_(&later_rr, f64::NEG_INFINITY);
        let mut weights_hgrt = logits_hgrk.softmax(-1, Kind::Float).narrow(3, sink, positions);
        if let Some(weighting) = weighting {
            weights_hgrt *= weighting.rows_s.narrow(0, first, n).unsqueeze(1);
        }
        max_hgt = max_hgt.maximum(&weights_hgrt.amax([2], false));
        sum_hgt += weights_hgrt.sum_dim_intlist([2i64].as_slice(), false, Kind::Float);
        first += n;
    }
    if let Some(weighting) = weighting {
        // The same for all rows and never negative, so it may follow the maximum over rows.
        let columns_hgt = weighting.columns_qt.view([heads, group, positions]);
        max_hgt *= &columns_hgt;
        sum_hgt *= &columns_hgt;
    }
    Ok(ChunkScores {
        max_ht: max_hgt.amax([1], false),
        mean_ht: sum_hgt.mean_dim([1i64].as_slice(), false, Kind::Float) / rows as f64,
    })
}

struct Dims {
    heads: i64,
    group: i64,
    rows: i64,
    head_dim: i64,
    chunk: i64,
}

impl Dims {
    fn check(q_qsd: &Tensor, k_hkd: &Tensor, sink: usize, chunk: &Range<usize>) -> Result<Self> {
        let (q, k) = (q_qsd.size(), k_hkd.size());
        ensure!(
            q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[0] % k[0] == 0 && q[0] > 0,
            "queries {q:?} and keys {k:?} do not fit: expected [query heads, new tokens, head_dim] and \
             [KV heads, positions, head_dim]"
        );
        ensure!(0 < q[1] && q[1] <= k[1], "{} new tokens do not fit into {} cached positions", q[1], k[1]);
        let start = (k[1] - q[1]) as usize;
        ensure!(
            sink <= chunk.start && chunk.start < chunk.end && chunk.end <= start,
            "a scoring chunk at {chunk:?} does not lie between the sink of {sink} and the new tokens at {start}"
        );
        Ok(Self { heads: k[0], group: q[0] / k[0], rows: q[1], head_dim: q[2], chunk: chunk.len() as i64 })
    }
}
