//! Runs a model through prefill and repeat, and collects the scores of a whole context.
//!
//! The tokens fed come from `request`, the maths from `chunk` and `weighting`, what happens when
//! memory runs out from `pieces`. The repeats of all scoring chunks are independent once the cache
//! is filled, so several are read in one forward; they append no KV pairs to the cache.
//!
//! Dimension key: l layer, h KV head, t context position.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_gpu::{Products, ScoreOutput, ScoreRows, fused_chunk_scores, has_fused_scores};
use pkv_lm::{KvCache, LanguageModel, NoTap, RepeatTap, RepeatView, TextTokenizer};
use pkv_recipe::LabelSection;
use tch::{Kind, Tensor};

use crate::pieces;
use crate::weighting::{self, Factors};
use crate::{ChunkAttention, Requests, block_elements, chunk_scores};

/// Scores of a context's KV pairs; the chat template's prefix has none.
pub struct ContextScores {
    /// `[layers, kv_heads, positions]`, f32, on the model's device: the KVzip score; higher means keep.
    pub max_lht: Tensor,
    /// The same shape: the mean, over rows and query group, of the weights whose maximum is the score.
    /// Absent if the scorer gives [maxima only](Scorer::maxima_only).
    pub mean_lht: Option<Tensor>,
}

/// Scores contexts with one model and one definition of the label.
pub struct Scorer<'a> {
    model: &'a LanguageModel,
    requests: Requests,
    prefix: Vec<u32>,
    sink: usize,
    /// Function for the factors of softmax weights, if the preset has any.
    factors: Option<Factors>,
    means: bool,
    prefill_chunk_tokens: usize,
    pack_tokens: usize,
}

impl<'a> Scorer<'a> {
    /// # Errors
    /// The tokenizer fails on the texts of the requests.
    pub fn new(model: &'a LanguageModel, tokenizer: &TextTokenizer, label: &LabelSection) -> Result<Self> {
        let requests = Requests::new(tokenizer, label)?;
        Ok(Self::with_requests(model, requests, tokenizer.prefix(), label))
    }

    /// A scorer without a tokenizer: requests and prefix are token ids.
    pub fn with_requests(
        model: &'a LanguageModel,
        requests: Requests,
        prefix: &[u32],
        label: &LabelSection,
    ) -> Self {
        Self {
            model,
            requests,
            sink: label.sink_tokens(prefix.len()),
            prefix: prefix.to_vec(),
            factors: weighting::factors(label.preset.preset().weighting),
            means: true,
            prefill_chunk_tokens: label.prefill_chunk_tokens,
            pack_tokens: label.pack(model.device().is_cuda()),
        }
    }

    /// Leave means out, which labels do not need: without them the fused kernels compute no exponential per
    /// weight.
    pub fn maxima_only(mut self) -> Self {
        self.means = false;
        self
    }

    /// The tokens that scoring feeds.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Positions that a cache needs to hold prefix and context; repeats need no room in it.
    pub fn cache_capacity(&self, context_tokens: usize) -> usize {
        self.prefix.len() + context_tokens
    }

    /// Score a context, given without the prefix: prefill, then repeat it in packs of scoring chunks.
    ///
    /// # Errors
    /// The context is empty, or the model fails on it.
    pub fn score(&self, context: &[u32]) -> Result<ContextScores> {
        let cache = self.prefill(context)?;
        self.score_cached(context, &cache)
    }

    /// A cache that holds the prefix and a context.
    ///
    /// If memory runs out, prefill chunks become smaller.
    ///
    /// # Errors
    /// The context is empty, or the model fails on it.
    pub fn prefill(&self, context: &[u32]) -> Result<KvCache> {
        check_not_empty(context)?;
        let _no_grad = tch::no_grad_guard();
        let ids = [&self.prefix, context].concat();
        let mut cache = self.model.new_cache(self.cache_capacity(context.len()));
        let chunk = self.prefill_chunk_tokens.max(1);
        self.model
            .prefill_for_tap(&ids, &mut cache, chunk, &mut NoTap)
            .with_context(|| format!("prefilling a context of {} tokens", context.len()))?;
        Ok(cache)
    }

    /// Score a context whose prefix and tokens `cache` already holds.
    ///
    /// If memory runs out, packs become smaller.
    ///
    /// # Errors
    /// The context is empty; the cache holds something else; the model fails.
    pub fn score_cached(&self, context: &[u32], cache: &KvCache) -> Result<ContextScores> {
        check_not_empty(context)?;
        let _no_grad = tch::no_grad_guard();
        let held = self.prefix.len() + context.len();
        ensure!(
            cache.len() == held,
            "the cache holds {} positions, expected {held}: a prefix of {} and a context of {}",
            cache.len(),
            self.prefix.len(),
            context.len()
        );
        let shape = self.model.shape();
        let size = [shape.layers as i64, shape.kv_heads as i64, context.len() as i64];
        let zeros = || Tensor::zeros(size, (Kind::Float, self.model.device()));
        let scores = ContextScores { max_lht: zeros(), mean_lht: self.means.then(zeros) };
        let repeats: Vec<Repeat> = self
            .requests
            .chunks(context.len())
            .map(|chunk| Repeat { ids: self.requests.ids(context, &chunk), chunk })
            .collect();
        pieces::packs(
            &repeats,
            |repeat| repeat.ids.len(),
            self.pack_tokens,
            |pack| {
                let segments: Vec<&[u32]> = pack.iter().map(|repeat| repeat.ids.as_slice()).collect();
                let mut tap = PackTap { scorer: self, pack, scores: &scores };
                self.model.forward_repeats(&segments, cache, &mut tap).with_context(|| {
                    let positions = pack[0].chunk.start..pack[pack.len() - 1].chunk.end;
                    format!("repeating tokens {positions:?} of a context of {}", context.len())
                })
            },
        )?;
        Ok(scores)
    }
}

/// One scoring chunk and what is fed to make the model repeat it.
struct Repeat {
    ids: Vec<u32>,
    /// Context positions.
    chunk: Range<usize>,
}

/// Writes the scores of some scoring chunks, layer by layer.
struct PackTap<'a> {
    scorer: &'a Scorer<'a>,
    pack: &'a [Repeat],
    scores: &'a ContextScores,
}

impl RepeatTap for PackTap<'_> {
    fn wants_lse(&self) -> bool {
        self.fused()
    }

    fn layer(&mut self, view: &RepeatView) -> Result<()> {
        if let Some(own_lse_qr) = view.own_lse_qr {
            return self.score_fused(view, own_lse_qr);
        }
        for (repeat, rows) in self.pack.iter().zip(view.segments) {
            self.score(view, &repeat.chunk, rows)?;
        }
        Ok(())
    }
}

impl PackTap<'_> {
    /// Do the fused kernels serve? On some GPUs, in 16-bit kinds.
    fn fused(&self) -> bool {
        let model = self.scorer.model;
        has_fused_scores(model.device(), model.kind(), model.shape().head_dim as i64)
    }

    /// Score all chunks of the pack in two kernels.
    fn score_fused(&self, view: &RepeatView, own_lse_qr: &Tensor) -> Result<()> {
        let (prefix, layer) = (self.scorer.prefix.len(), view.layer as i64);
        let chunks: Vec<ScoreRows> = self
            .pack
            .iter()
            .zip(view.segments)
            .map(|(repeat, rows)| ScoreRows {
                first_row: rows.start,
                rows: rows.len(),
                first_key: prefix + repeat.chunk.start,
                keys: repeat.chunk.len(),
            })
            .collect();
        let weights = self.scorer.factors.map(|factors| self.weights(view, factors)).transpose()?;
        fused_chunk_scores(
            Products { q_rqd: view.q_rqd, k_hkd: view.k_cache_hkd, scale: view.scale },
            Some(own_lse_qr),
            weights.as_ref().map(|(rows_r, columns_qt)| (rows_r, columns_qt)),
            &chunks,
            self.scorer.sink,
            ScoreOutput {
                max_ht: &self.scores.max_lht.get(layer),
                mean_ht: self.scores.mean_lht.as_ref().map(|mean_lht| mean_lht.get(layer)).as_ref(),
                first: prefix,
            },
        )
    }

    /// Factors of all rows `[rows]` and of the context's positions `[query_heads, t]`, f32.
    fn weights(&self, view: &RepeatView, factors: Factors) -> Result<(Tensor, Tensor)> {
        let prefix = self.scorer.prefix.len() as i64;
        let context = view.v_cache_hkd.size()[1] - prefix;
        let v_htd = view.v_cache_hkd.narrow(1, prefix, context);
        let projection = self.scorer.model.output_projection(view.layer);
        let both = factors(view.normed_rm, &v_htd, projection)?;
        Ok((both.rows_s.contiguous(), both.columns_qt.contiguous()))
    }

    /// Score one chunk by the rows of its repeat.
    fn score(&self, view: &RepeatView, chunk: &Range<usize>, rows: &Range<usize>) -> Result<()> {
        let (first_row, rows) = (rows.start as i64, rows.len() as i64);
        let (start, len) = (chunk.start as i64, chunk.len() as i64);
        let sink = self.scorer.sink;
        let cached = self.scorer.prefix.len() as i64 + start;
        let weighting = if let Some(factors) = self.scorer.factors {
            let v_htd = view.v_cache_hkd.narrow(1, cached, len);
            let projection = self.scorer.model.output_projection(view.layer);
            Some(factors(&view.normed_rm.narrow(0, first_row, rows), &v_htd, projection)?)
        } else {
            None
        };
        let own = |x_rhd: &Tensor| x_rhd.narrow(0, first_row, rows).transpose(0, 1);
        // What the rows may see and nothing else, so that the chunk follows the sink at once.
        let k_hkd = Tensor::cat(
            &[
                view.k_cache_hkd.narrow(1, 0, sink as i64),
                view.k_cache_hkd.narrow(1, cached, len),
                own(view.k_rhd),
            ],
            1,
        );
        let attention = ChunkAttention {
            q_qsd: &own(view.q_rqd),
            k_hkd: &k_hkd,
            scale: view.scale,
            sink,
            chunk: sink..sink + chunk.len(),
        };
        let scores = chunk_scores(&attention, weighting.as_ref(), block_elements(view.q_rqd.device()))?;
        let write = |into_lht: &Tensor, from_ht: &Tensor| {
            into_lht.get(view.layer as i64).narrow(1, start, len).copy_(from_ht);
        };
        write(&self.scores.max_lht, &scores.max_ht);
        if let Some(mean_lht) = &self.scores.mean_lht {
            write(mean_lht, &scores.mean_ht);
        }
        Ok(())
    }
}

fn check_not_empty(context: &[u32]) -> Result<()> {
    ensure!(
        !context.is_empty(),
        hinted(
            "cannot score an empty context: it has no KV pairs",
            "leave documents without tokens out of the manifest"
        )
    );
    Ok(())
}
