//! KVzip scores of the scoring chunks of one layer, from queries and keys.
//!
//! The tokens of the queries and KVzip+'s factors are those of `score`. The portable form takes rows in
//! blocks that bound memory. A block sees every key it may attend to, so its softmax is exact on its own and
//! no second pass is needed.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), r rows of all repeats, s rows
//! of one, d head_dim, k keys attended to, t position in the scoring chunk.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::kernels::{self, Products, ScoreOutput, ScoreRows};

/// Do [`chunk_scores`] and [`query_statistics`](super::query_statistics) want the log-sum-exps of their rows?
/// Where their fused kernels serve: on a Hopper GPU, bf16 or f16, head_dim a multiple of 8 up to 256.
pub fn wants_lse(device: Device, kind: Kind, head_dim: usize) -> bool {
    kernels::has_fused_scores(device, kind, head_dim as i64)
}

/// Number of softmax weights that portable forms hold at once.
///
/// On a CPU 2 MiB of f32, which stay in its cache: 0.76 s of one core for a chunk of 1,400 tokens
/// in 12 layers of 6 query heads, against 2.1 s with 128 MiB. On a GPU 128 MiB, twice that at the
/// peak: with 32 query heads and chunks of 2000 tokens a block has about 250 rows.
pub(super) fn block_elements(device: Device) -> usize {
    if device.is_cuda() { 1 << 25 } else { 1 << 19 }
}

/// Rows that repeat scoring chunks, and the keys they may see.
#[derive(Clone, Copy)]
pub struct Repeats<'a> {
    /// The rows' queries, rotary applied, and the cache's keys.
    pub of: Products<'a>,
    /// The rows' own keys, `[rows, kv_heads, head_dim]`, rotary applied.
    pub own_k_rhd: &'a Tensor,
    /// Natural log-sum-exp of each row's scaled logits over its own keys up to itself: f32
    /// `[query_heads, rows]`, contiguous. Needed where [`wants_lse`].
    pub own_lse_qr: Option<&'a Tensor>,
    /// Every row sees the first `sink` positions of the cache.
    pub sink: usize,
}

/// Factors of softmax weights.
pub struct Weighting {
    /// `[rows]`, f32.
    pub rows_s: Tensor,
    /// `[query_heads, positions]`, f32, not negative.
    pub columns_qt: Tensor,
}

/// Makes the factors of some rows and cache positions.
pub type WeightingOf<'a> = dyn Fn(Range<usize>, Range<usize>) -> Result<Weighting> + 'a;

/// Score each KV pair of some scoring chunks by the attention that the rows of its chunk's repeat pay it.
///
/// The softmax of a row runs over [the first `sink` positions | its chunk | its repeat's keys up to the row
/// itself] of the scaled products. The score is the maximum over all rows, request and switch included, and
/// over the query group, so a pair that matters to one query head stays for all that share it; `to` may also
/// take the mean over the same. `weighting` multiplies the softmax weights first (KVzip+).
///
/// # Shapes
/// - `repeats`: see [`Repeats`]; queries and keys of one floating kind and one device
/// - `to`: see [`ScoreOutput`]; scores are in `[0, 1]` without weighting. The chunks' positions are written,
///   no gradient
///
/// # Errors
/// Shapes, a chunk's range or the weighting disagree, or the driver refuses.
///
/// # Source
/// KVzip, arXiv 2505.23416 (snu-mllab/KVzip, `attention/score.py`), and `KVzipPress` of
/// NVIDIA/kvpress 0.5.5. Differs: products and softmax in f32 whatever the model's kind is.
/// Operands that come from bf16 are exact in TF32 too, so TF32 costs no accuracy there.
pub fn chunk_scores(
    repeats: &Repeats,
    chunks: &[ScoreRows],
    weighting: Option<&WeightingOf>,
    to: ScoreOutput,
) -> Result<()> {
    let (q, k) = (repeats.of.q_rqd.size(), repeats.of.k_hkd);
    let d = q.last().copied().unwrap_or(0);
    if let Some(own_lse_qr) = repeats.own_lse_qr
        && kernels::has_fused_scores(k.device(), k.kind(), d)
    {
        let positions = to.first..to.first + to.max_ht.size()[1] as usize;
        let both = weighting.map(|of| of(0..q[0] as usize, positions)).transpose()?;
        let both = both.map(|both| (both.rows_s.contiguous(), both.columns_qt.contiguous()));
        let weights = both.as_ref().map(|(rows_r, columns_qt)| (rows_r, columns_qt));
        return kernels::fused_chunk_scores(repeats.of, Some(own_lse_qr), weights, chunks, repeats.sink, to);
    }
    portable(repeats, chunks, weighting, to, block_elements(k.device()))
}

/// `block_elements` bounds how many weights are held at once (at least one row is). It changes the maximum by
/// nothing but the rounding of a product.
pub(super) fn portable(
    repeats: &Repeats,
    chunks: &[ScoreRows],
    weighting: Option<&WeightingOf>,
    to: ScoreOutput,
    block_elements: usize,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    for chunk in chunks {
        check(repeats, chunk, to)?;
        let positions = chunk.first_key..chunk.first_key + chunk.keys;
        let rows = chunk.first_row..chunk.first_row + chunk.rows;
        let factors = weighting.map(|of| of(rows, positions)).transpose()?;
        let (max_ht, mean_ht) = of_chunk(repeats, chunk, factors.as_ref(), block_elements)?;
        let write = |out: &Tensor, scores: &Tensor| {
            out.narrow(1, (chunk.first_key - to.first) as i64, chunk.keys as i64).copy_(scores);
        };
        write(to.max_ht, &max_ht);
        if let Some(out) = to.mean_ht {
            write(out, &mean_ht);
        }
    }
    Ok(())
}

/// Maximum and mean of one chunk, `[kv_heads, t]` each.
fn of_chunk(
    Repeats { of, own_k_rhd, sink, .. }: &Repeats,
    chunk: &ScoreRows,
    weighting: Option<&Weighting>,
    block_elements: usize,
) -> Result<(Tensor, Tensor)> {
    let (first_row, rows, positions) = (chunk.first_row as i64, chunk.rows as i64, chunk.keys as i64);
    let (heads, head_dim) = (of.k_hkd.size()[0], of.k_hkd.size()[2]);
    let group = of.q_rqd.size()[1] / heads;
    let sink = *sink as i64;
    if let Some(Weighting { rows_s, columns_qt }) = weighting {
        let (r, c) = (rows_s.size(), columns_qt.size());
        ensure!(
            r == [rows] && c == [heads * group, positions],
            "weighting of rows {r:?} and columns {c:?}, expected [{rows}] and [{}, {positions}]",
            heads * group
        );
    }
    let own = |x_rhd: &Tensor| x_rhd.narrow(0, first_row, rows).transpose(0, 1);
    // Queries carry the scale: they are fewer than the products.
    let q_hgsd = (own(of.q_rqd).to_kind(Kind::Float) * of.scale).reshape([heads, group, rows, head_dim]);
    let k_hkd = Tensor::cat(
        &[of.k_hkd.narrow(1, 0, sink), of.k_hkd.narrow(1, chunk.first_key as i64, positions), own(own_k_rhd)],
        1,
    )
    .to_kind(Kind::Float);
    let k_hdk = k_hkd.transpose(1, 2);

    let options = (Kind::Float, of.q_rqd.device());
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
        let later_rr = Tensor::ones([n, n], (Kind::Bool, options.1)).triu(1);
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
    let mean_ht = sum_hgt.mean_dim([1i64].as_slice(), false, Kind::Float) / rows as f64;
    Ok((max_hgt.amax([1], false), mean_ht))
}

fn check(Repeats { of, own_k_rhd, sink, .. }: &Repeats, chunk: &ScoreRows, to: ScoreOutput) -> Result<()> {
    let (q, k, own) = (of.q_rqd.size(), of.k_hkd.size(), own_k_rhd.size());
    ensure!(
        q.len() == 3
            && k.len() == 3
            && q[2] == k[2]
            && k[0] > 0
            && q[1] % k[0] == 0
            && q[1] > 0
            && own == [q[0], k[0], k[2]],
        "queries {q:?}, their own keys {own:?} and cached keys {k:?} do not fit: expected [rows, query heads, \
         head_dim], [rows, KV heads, head_dim] and [KV heads, positions, head_dim]"
    );
    let ScoreRows { first_row, rows, first_key, keys } = *chunk;
    ensure!(
        rows > 0 && first_row + rows <= q[0] as usize,
        "rows {first_row}..{} of a scoring chunk are not among {} rows",
        first_row + rows,
        q[0]
    );
    ensure!(
        keys > 0 && *sink <= first_key && first_key + keys <= k[1] as usize,
        "a scoring chunk at {first_key}..{} does not lie between the sink of {sink} and the cache's end at {}",
        first_key + keys,
        k[1]
    );
    let out = to.max_ht.size();
    ensure!(
        out.len() == 2
            && out[0] == k[0]
            && to.first <= first_key
            && first_key + keys - to.first <= out[1] as usize,
        "room for scores is {out:?} from position {} on, the scoring chunk is at {first_key}..{}",
        to.first,
        first_key + keys
    );
    Ok(())
}
