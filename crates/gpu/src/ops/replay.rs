//! Attention of scoring chunks' own queries to their keys, the keys moved: `extract`'s estimate of KVzip's
//! score without the repeat.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s positions of a scoring chunk
//! as queries, t as keys, r rows (positions; of a block: query heads of a group x positions), d head_dim.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::rotary::Movement;
use super::scores::block_elements;
use crate::kernels::{self, Products, ScoreOutput, ScoreRows};

/// Attention of a chunk's queries to its keys.
pub struct ReplayScores {
    /// `[KV heads, t]`, f32 in `[0, 1]`: the strongest weight over the chunk's queries and the query group.
    pub max_ht: Tensor,
    /// The same shape: the mean weight.
    pub mean_ht: Tensor,
}

/// Softmax weights of every query of a chunk over the chunk's keys, and their maximum and mean per key.
///
/// Of each chunk, which rows and keys belong together, and how far its keys are moved first. `write` gets
/// positions among the keys and their scores, of one chunk or of several at once.
///
/// # Shapes
/// - `of`: see [`Products`]; the keys not moved yet
/// - `chunks`: their keys lie after each other and are all there are
///
/// # Errors
/// Shapes disagree, or the driver refuses.
pub fn replay_scores(
    of: Products,
    chunks: &[(ScoreRows, &Movement)],
    write: &mut dyn FnMut(Range<usize>, &ReplayScores),
) -> Result<()> {
    let Products { q_rqd, k_hkd, scale } = of;
    let keys = |rows: &ScoreRows| (rows.first_key as i64, rows.keys as i64);
    if kernels::has_fused_scores(q_rqd.device(), k_hkd.kind(), k_hkd.size()[2]) {
        let moved_htd = Tensor::empty(k_hkd.size(), (k_hkd.kind(), q_rqd.device()));
        let mut all = Vec::new();
        for (rows, movement) in chunks {
            let (first, n) = keys(rows);
            movement.write(&k_hkd.narrow(1, first, n), &moved_htd.narrow(1, first, n))?;
            all.push(*rows);
        }
        let room = || Tensor::empty(&moved_htd.size()[..2], (Kind::Float, moved_htd.device()));
        let scores = ReplayScores { max_ht: room(), mean_ht: room() };
        let to = ScoreOutput { max_ht: &scores.max_ht, mean_ht: Some(&scores.mean_ht), first: 0 };
        kernels::fused_chunk_scores(Products { k_hkd: &moved_htd, ..of }, None, None, &all, 0, to)?;
        write(0..moved_htd.size()[1] as usize, &scores);
        return Ok(());
    }
    for (rows, movement) in chunks {
        let q_qsd = q_rqd.narrow(0, rows.first_row as i64, rows.rows as i64).transpose(0, 1);
        let (first, n) = keys(rows);
        let (moved_htd, block) = (movement.of(&k_hkd.narrow(1, first, n)), block_elements(q_rqd.device()));
        let scores = portable(&q_qsd, &moved_htd, scale, block)?;
        write(rows.first_key..rows.first_key + rows.keys, &scores);
    }
    Ok(())
}

/// Of one chunk's queries `[query heads, s, head_dim]` and moved keys `[KV heads, t, head_dim]`, f32.
///
/// `block_elements` bounds how many weights are held at once (at least one row of each KV head is).
pub(super) fn portable(
    q_qsd: &Tensor,
    k_htd: &Tensor,
    scale: f64,
    block_elements: usize,
) -> Result<ReplayScores> {
    let _no_grad = tch::no_grad_guard();
    let (q, k) = (q_qsd.size(), k_htd.size());
    ensure!(
        q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[0] > 0 && q[0] % k[0] == 0 && k[1] > 0,
        "queries {q:?} and keys {k:?} do not fit: expected [query heads, positions, head_dim] and \
         [KV heads, positions, head_dim]"
    );
    let (heads, keys) = (k[0], k[1]);
    let rows = q[0] / heads * q[1];
    let q_hrd = q_qsd.to_kind(Kind::Float).reshape([heads, rows, q[2]]) / scale.recip();
    let k_hdt = k_htd.transpose(1, 2);
    let options = (Kind::Float, q_qsd.device());
    let mut max_ht = Tensor::zeros([heads, keys], options);
    let mut sum_ht = Tensor::zeros([heads, keys], options);
    let block = ((block_elements as i64) / (heads * keys)).clamp(1, rows.max(1));
    for first in (0..rows).step_by(block as usize) {
        let n = block.min(rows - first);
        let weights_hrt = q_hrd.narrow(1, first, n).matmul(&k_hdt).softmax(-1, Kind::Float);
        max_ht = max_ht.maximum(&weights_hrt.amax([1], false));
        sum_ht += weights_hrt.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    }
    Ok(ReplayScores { max_ht, mean_ht: sum_ht / rows.max(1) as f64 })
}
