//! The replay that is never run: a scoring chunk's own queries, moved to where its repeat would be, against its keys.
//!
//! KVzip scores a chunk by the queries of its repeat, which needs one more forward of the chunk. The prefill's queries of the
//! same tokens are there already. In the repeat, all tokens of a chunk are the same number of positions further on, so one
//! rotation moves them: here of the keys, which are fewer, the other way. What stays out is what the repeat's hidden states
//! have learned from the context, the request's own rows, and the other keys that they see.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s positions of the scoring chunk as queries,
//! t as keys, r rows (query heads of a group x positions) of a block, d head_dim.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use pkv_core::Channel;
use pkv_lm::{LanguageModel, LayerView};
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

/// What a chunk's queries see of its keys.
pub struct UnrunScores {
    /// `[KV heads, t]`, f32 in `[0, 1]`: the strongest weight over the chunk's queries and the query group.
    pub max_ht: Tensor,
    /// The same shape: the mean weight.
    pub mean_ht: Tensor,
}

/// Softmax weights of every query over all keys, scaled by 1/sqrt(head_dim), and their maximum and mean per key.
///
/// # Shapes
/// - `q_qsd`: `[query heads, s, head_dim]`; query heads of one KV head are neighbours
/// - `k_htd`: `[KV heads, t, head_dim]`, f32, same device
///
/// `block_elements` bounds how many weights are held at once (at least one row of each KV head is).
///
/// # Errors
/// Shapes disagree.
pub fn unrun_scores(q_qsd: &Tensor, k_htd: &Tensor, block_elements: usize) -> Result<UnrunScores> {
    let _no_grad = tch::no_grad_guard();
    let (q, k) = (q_qsd.size(), k_htd.size());
    ensure!(
        q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[0] > 0 && q[0] % k[0] == 0 && k[1] > 0,
        "queries {q:?} and keys {k:?} do not fit: expected [query heads, positions, head_dim] and \
         [KV heads, positions, head_dim]"
    );
    let (heads, keys) = (k[0], k[1]);
    let rows = q[0] / heads * q[1];
    let q_hrd = q_qsd.to_kind(Kind::Float).reshape([heads, rows, q[2]]) / (q[2] as f64).sqrt();
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

/// Gathers the queries of scoring chunks, layer by layer, and scores each chunk when its last token has been read.
pub(crate) struct UnrunReplay {
    prefix: usize,
    chunks: Vec<Chunk>,
    /// Of each layer: queries `[q, s, d]` of the chunk that earlier forwards began.
    waiting: Vec<Option<Tensor>>,
}

struct Chunk {
    /// Context positions.
    at: Range<usize>,
    /// How many positions further on its repeat would be.
    further: usize,
}

impl UnrunReplay {
    /// For a context of `context` tokens after `prefix` tokens; a repeat comes after both and its request.
    pub fn new(requests: &Requests, prefix: usize, context: usize, layers: usize) -> Self {
        let chunk = |at: Range<usize>| {
            let further = context - at.start + requests.request_tokens(&at);
            Chunk { at, further }
        };
        Self {
            prefix,
            chunks: requests.chunks(context).map(chunk).collect(),
            waiting: (0..layers).map(|_| None).collect(),
        }
    }

    /// Take a layer's new queries; `write` gets the context positions and the scores of the chunks that they complete.
    pub fn layer(
        &mut self,
        model: &LanguageModel,
        view: &LayerView,
        write: &mut dyn FnMut(&Range<usize>, &UnrunScores),
    ) -> Result<()> {
        let waiting = self.waiting.get_mut(view.layer).context("a layer that the model does not have")?;
        let prefix = self.prefix;
        let from = view.start.saturating_sub(prefix);
        let end = (view.start + view.q_qsd.size()[1] as usize).saturating_sub(prefix);
        for chunk in self.chunks.iter().filter(|c| c.at.start < end && c.at.end > from) {
            let (first, last) = (chunk.at.start.max(from), chunk.at.end.min(end));
            let new_qsd = view.q_qsd.narrow(1, (first + prefix - view.start) as i64, (last - first) as i64);
            let q_qsd = match waiting.take() {
                Some(earlier_qsd) => Tensor::cat(&[&earlier_qsd, &new_qsd], 1),
                None => new_qsd,
            };
            if last < chunk.at.end {
                *waiting = Some(q_qsd.copy());
                continue;
            }
            let k_htd = view.k_hkd.narrow(1, (prefix + chunk.at.start) as i64, chunk.at.len() as i64);
            let k_htd = model.moved(&k_htd, -(chunk.further as i64));
            write(&chunk.at, &unrun_scores(&q_qsd, &k_htd, block_elements(q_qsd.device()))?);
        }
        Ok(())
    }
}
