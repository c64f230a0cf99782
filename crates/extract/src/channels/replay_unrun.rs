//! An estimate of KVzip's score without the repeat: a scoring chunk's own queries, rotated to the positions
//! of its repeat, against its keys.
//!
//! KVzip scores a chunk by the queries of its repeat, which needs one more forward of the chunk. The
//! prefill's queries of the same tokens are there already. In the repeat, all tokens of a chunk are the same
//! number of positions further on, so one rotation moves them: here of the keys, which are fewer, the other
//! way. Not included are the change of hidden states in the repeat, the request's own rows, and the other
//! keys that they attend to.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s positions of the scoring
//! chunk as queries, t as keys, r rows (query heads of a group x positions) of a block, d head_dim. The
//! kernels' rows r are positions.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use pkv_core::Channel;
use pkv_gpu::{Products, ScoreOutput, ScoreRows, fused_chunk_scores};
use pkv_lm::{LanguageModel, LayerView, Movement};
use pkv_score::{Requests, block_elements};
use tch::{Kind, Tensor};

use super::{Compute, Entry};
use crate::statistics::MEAN_FLOOR;

pub(super) const MAX: Entry =
    Entry { channel: Channel::ReplayUnrun, compute: Compute::ScoringChunk(|scores| scores.max_ht.log()) };

pub(super) const MEAN: Entry = Entry {
    channel: Channel::ReplayUnrunMean,
    compute: Compute::ScoringChunk(|scores| (&scores.mean_ht + MEAN_FLOOR).log()),
};

/// Attention of a chunk's queries to its keys.
pub struct UnrunScores {
    /// `[KV heads, t]`, f32 in `[0, 1]`: the strongest weight over the chunk's queries and the query group.
    pub max_ht: Tensor,
    /// The same shape: the mean weight.
    pub mean_ht: Tensor,
}

/// Softmax weights of every query over all keys, products scaled by `scale`, and their maximum and mean per
/// key.
///
/// # Shapes
/// - `q_qsd`: `[query heads, s, head_dim]`; query heads of one KV head are neighbours
/// - `k_htd`: `[KV heads, t, head_dim]`, f32, same device
///
/// `block_elements` bounds how many weights are held at once (at least one row of each KV head is).
///
/// # Errors
/// Shapes disagree.
pub fn unrun_scores(
    q_qsd: &Tensor,
    k_htd: &Tensor,
    scale: f64,
    block_elements: usize,
) -> Result<UnrunScores> {
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
    Ok(UnrunScores { max_ht, mean_ht: sum_ht / rows.max(1) as f64 })
}

/// [`unrun_scores`] of several chunks of a layer by the kernels of KVzip's scores, which hold no weights.
///
/// # Shapes
/// - `of.q_rqd`: `[rows, query heads, head_dim]`, see [`has_fused_scores`](pkv_gpu::has_fused_scores)
/// - `of.k_hkd`: `[KV heads, t, head_dim]`, moved, positions contiguous; kind and device of the queries
/// - `chunks`: which rows and keys belong together; every key to one
/// - returns all keys' scores
///
/// # Errors
/// Shapes disagree, or the driver refuses.
pub fn fused_unrun_scores(of: Products, chunks: &[ScoreRows]) -> Result<UnrunScores> {
    let k_htd = of.k_hkd;
    let room = || Tensor::empty(&k_htd.size()[..2], (Kind::Float, k_htd.device()));
    let scores = UnrunScores { max_ht: room(), mean_ht: room() };
    let to = ScoreOutput { max_ht: &scores.max_ht, mean_ht: Some(&scores.mean_ht), first: 0 };
    fused_chunk_scores(of, None, None, chunks, 0, to)?;
    Ok(scores)
}

/// Gathers the queries of scoring chunks, layer by layer, and scores each chunk when its last token has been
/// read.
pub(crate) struct UnrunReplay {
    prefix: usize,
    chunks: Vec<Chunk>,
    /// Of each layer: queries `[s, q, d]` of the chunk that earlier forwards began.
    waiting: Vec<Option<Tensor>>,
}

struct Chunk {
    /// Context positions.
    at: Range<usize>,
    /// Moves its keys as far back as its repeat is further on.
    back: Movement,
}

impl UnrunReplay {
    /// For a context of `context` tokens after `prefix` tokens; a repeat comes after both and its request.
    pub fn new(model: &LanguageModel, requests: &Requests, prefix: usize, context: usize) -> Self {
        let chunk = |at: Range<usize>| {
            let further = context - at.start + requests.request_tokens(&at);
            Chunk { at, back: model.movement(-(further as i64)) }
        };
        Self {
            prefix,
            chunks: requests.chunks(context).map(chunk).collect(),
            waiting: (0..model.shape().layers).map(|_| None).collect(),
        }
    }

    /// Take a layer's new queries; `write` gets context positions and the scores of the chunks there, which
    /// are complete now. `fused`: the kernels serve.
    pub fn layer(
        &mut self,
        view: &LayerView,
        fused: bool,
        write: &mut dyn FnMut(&Range<usize>, &UnrunScores),
    ) -> Result<()> {
        let waiting = self.waiting.get_mut(view.layer).context("a layer that the model does not have")?;
        let prefix = self.prefix;
        let from = view.start.saturating_sub(prefix);
        let end = (view.start + view.q_qsd.size()[1] as usize).saturating_sub(prefix);
        let k_htd = |at: &Range<usize>| view.k_hkd.narrow(1, (prefix + at.start) as i64, at.len() as i64);
        // Query rows, of which the first is at context position `first`, and neighbouring chunks that lie in
        // them.
        let mut score = |q_rqd: &Tensor, first: usize, chunks: &[&Chunk]| -> Result<()> {
            if fused {
                let at = chunks[0].at.start..chunks[chunks.len() - 1].at.end;
                let moved_htd = Tensor::empty(k_htd(&at).size(), (view.k_hkd.kind(), q_rqd.device()));
                let mut rows = Vec::new();
                for Chunk { at: own, back } in chunks {
                    let (first_key, keys) = (own.start - at.start, own.len());
                    back.write(&k_htd(own), &moved_htd.narrow(1, first_key as i64, keys as i64))?;
                    rows.push(ScoreRows { first_row: own.start - first, rows: keys, first_key, keys });
                }
                let of = Products { q_rqd, k_hkd: &moved_htd, scale: view.scale };
                write(&at, &fused_unrun_scores(of, &rows)?);
                return Ok(());
            }
            for Chunk { at, back } in chunks {
                let q_qsd = q_rqd.narrow(0, (at.start - first) as i64, at.len() as i64).transpose(0, 1);
                let (moved_htd, block) = (back.of(&k_htd(at)), block_elements(q_rqd.device()));
                write(at, &unrun_scores(&q_qsd, &moved_htd, view.scale, block)?);
            }
            Ok(())
        };
        let new_rqd = |at: Range<usize>| {
            view.q_qsd.narrow(1, (at.start + prefix - view.start) as i64, at.len() as i64).transpose(0, 1)
        };
        // Chunks that lie in this forward need no copy of their queries.
        let mut whole = Vec::new();
        for chunk in self.chunks.iter().filter(|c| c.at.start < end && c.at.end > from) {
            if from <= chunk.at.start && chunk.at.end <= end {
                whole.push(chunk);
                continue;
            }
            let part_rqd = new_rqd(chunk.at.start.max(from)..chunk.at.end.min(end));
            let q_rqd = match waiting.take() {
                Some(earlier_rqd) => Tensor::cat(&[&earlier_rqd, &part_rqd], 0),
                None => part_rqd.copy(),
            };
            if end < chunk.at.end {
                *waiting = Some(q_rqd);
            } else {
                score(&q_rqd, chunk.at.start, &[chunk])?;
            }
        }
        if let Some(chunk) = whole.first() {
            score(&new_rqd(chunk.at.start..end), chunk.at.start, &whole)?;
        }
        Ok(())
    }
}
