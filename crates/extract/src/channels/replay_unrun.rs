//! An estimate of KVzip's score without the repeat: a scoring chunk's own queries, rotated to the positions
//! of its repeat, against its keys.
//!
//! KVzip scores a chunk by the queries of its repeat, which needs one more forward of the chunk. The
//! prefill's queries of the same tokens are there already. In the repeat, all tokens of a chunk are the same
//! number of positions further on, so one rotation moves them: here of the keys, which are fewer, the other
//! way. Not included are the change of hidden states in the repeat, the request's own rows, and the other
//! keys that they attend to.
//!
//! Dimension key: h KV head, q query head, s and r positions as queries, k and t as keys, d head_dim.

use std::ops::Range;

use anyhow::{Context, Result};
use pkv_core::Channel;
use pkv_gpu::{Movement, Products, ReplayScores, ScoreRows, replay_scores};
use pkv_lm::{LanguageModel, LayerView, PerPart};
use pkv_score::Requests;
use tch::Tensor;

use super::{Compute, Entry};
use crate::statistics::MEAN_FLOOR;

pub(super) const ENTRIES: &[Entry] = &[
    Entry { channel: Channel::ReplayUnrun, compute: Compute::ScoringChunk(|scores| scores.max_ht.log()) },
    Entry {
        channel: Channel::ReplayUnrunMean,
        compute: Compute::ScoringChunk(|scores| (&scores.mean_ht + MEAN_FLOOR).log()),
    },
];

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
    back: PerPart<Movement>,
}

impl UnrunReplay {
    /// For a context of `context` tokens after `prefix` tokens; a repeat comes after both and its request.
    pub fn new(model: &LanguageModel, requests: &Requests, prefix: usize, context: usize) -> Self {
        let chunk = |at: Range<usize>| {
            let further = context - at.start + requests.request_tokens(&at);
            Chunk { at, back: model.movements(-(further as i64)) }
        };
        Self {
            prefix,
            chunks: requests.chunks(context).map(chunk).collect(),
            waiting: (0..model.shape().layers).map(|_| None).collect(),
        }
    }

    /// Take a layer's new queries; `write` gets context positions and the scores of the chunks there, which
    /// are complete now.
    pub fn layer(
        &mut self,
        view: &LayerView,
        write: &mut dyn FnMut(&Range<usize>, &ReplayScores),
    ) -> Result<()> {
        let waiting = self.waiting.get_mut(view.layer).context("a layer that the model does not have")?;
        let prefix = self.prefix;
        let from = view.start.saturating_sub(prefix);
        let end = (view.start + view.q_qsd.size()[1] as usize).saturating_sub(prefix);
        // Query rows, of which the first is at context position `first`, and neighbouring chunks that lie in
        // them.
        let mut score = |q_rqd: &Tensor, first: usize, chunks: &[&Chunk]| -> Result<()> {
            let at = chunks[0].at.start..chunks[chunks.len() - 1].at.end;
            let rows = |own: &Range<usize>| ScoreRows {
                first_row: own.start - first,
                rows: own.len(),
                first_key: own.start - at.start,
                keys: own.len(),
            };
            let rows: Vec<_> =
                chunks.iter().map(|chunk| (rows(&chunk.at), chunk.back.of(view.layer))).collect();
            let k_hkd = view.k_hkd.narrow(1, (prefix + at.start) as i64, at.len() as i64);
            replay_scores(Products { q_rqd, k_hkd: &k_hkd, scale: view.scale }, &rows, &mut |keys, scores| {
                write(&(at.start + keys.start..at.start + keys.end), scores);
            })
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
