//! Runs a model through prefill and repeat, and collects the scores of a whole context.
//!
//! The tokens fed come from `request`, the maths from [`pkv_gpu::chunk_scores`] and `scorers`, what happens
//! when memory runs out from `pieces`. The repeats of all scoring chunks are independent once the cache
//! is filled, so several are read in one forward; they append no KV pairs to the cache.
//!
//! Dimension key: l layer, h KV head, t context position.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_gpu::{Products, Repeats, ScoreOutput, ScoreRows, WeightingOf, chunk_scores, wants_lse};
use pkv_lm::{KvCache, LanguageModel, LayerRows, NoTap, RepeatTap, RepeatView};
use pkv_recipe::LabelSection;
use pkv_text::TextTokenizer;
use tch::{Kind, Tensor};

use crate::pieces;
use crate::request::Requests;
use crate::scorers::{self, CachedContext, Compute, Factors};

/// Scores of a context's KV pairs; the chat template's prefix has none.
pub struct ContextScores {
    /// `[layers, kv_heads, positions]`, f32, on the model's device, home of a split one: the KVzip score;
    /// higher means keep.
    pub max_lht: Tensor,
    /// The same shape: the mean, over rows and query group, of the weights whose maximum is the score.
    /// Absent if the scorer gives [maxima only](Scorer::maxima_only), or repeats nothing.
    pub mean_lht: Option<Tensor>,
}

/// Scores contexts with one model and one definition of the label.
pub struct Scorer<'a> {
    model: &'a LanguageModel,
    requests: Requests,
    prefix: Vec<u32>,
    sink: usize,
    /// The way to score, by name.
    name: String,
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
            name: label.scorer().to_owned(),
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
    /// The context is empty; the cache holds something else; there is no such way to score; the model fails.
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
        let factors = match scorers::find(&self.name)? {
            Compute::Repeat(factors) => factors,
            Compute::Cached(scores) => {
                let of =
                    CachedContext { model: self.model, cache, prefix: self.prefix.len(), tokens: context };
                return Ok(ContextScores { max_lht: scores(&of)?, mean_lht: None });
            }
        };
        let shape = self.model.shape();
        let size = [shape.layers as i64, shape.kv_heads as i64, context.len() as i64];
        let rows = || {
            LayerRows::new(self.model.placement(), Tensor::zeros(size, (Kind::Float, self.model.device())))
        };
        let (max_lht, mean_lht) = (rows()?, self.means.then(rows).transpose()?);
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
                let mut tap =
                    PackTap { scorer: self, factors, pack, max_lht: &max_lht, mean_lht: mean_lht.as_ref() };
                self.model.forward_repeats(&segments, cache, &mut tap).with_context(|| {
                    let positions = pack[0].chunk.start..pack[pack.len() - 1].chunk.end;
                    format!("repeating tokens {positions:?} of a context of {}", context.len())
                })
            },
        )?;
        Ok(ContextScores { max_lht: max_lht.gather(), mean_lht: mean_lht.map(LayerRows::gather) })
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
    /// Function for the factors of softmax weights, if they have any.
    factors: Option<Factors>,
    pack: &'a [Repeat],
    max_lht: &'a LayerRows,
    mean_lht: Option<&'a LayerRows>,
}

impl RepeatTap for PackTap<'_> {
    fn wants_lse(&self) -> bool {
        let model = self.scorer.model;
        wants_lse(model.device(), model.kind(), model.shape().head_dim)
    }

    fn layer(&mut self, view: &RepeatView) -> Result<()> {
        let (prefix, model) = (self.scorer.prefix.len(), self.scorer.model);
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
        let repeats = Repeats {
            of: Products { q_rqd: view.q_rqd, k_hkd: view.k_cache_hkd, scale: view.scale },
            own_k_rhd: view.k_rhd,
            own_lse_qr: view.own_lse_qr,
            sink: self.scorer.sink,
        };
        let weighting = self.factors.map(|factors| {
            move |rows: Range<usize>, positions: Range<usize>| {
                let normed_sm = view.normed_rm.narrow(0, rows.start as i64, rows.len() as i64);
                let v_htd = view.v_cache_hkd.narrow(1, positions.start as i64, positions.len() as i64);
                factors(&normed_sm, &v_htd, model.output_projection(view.layer))
            }
        });
        let layer = |scores_lht: &LayerRows| scores_lht.layer(view.layer).squeeze_dim(0);
        let (max_ht, mean_ht) = (layer(self.max_lht), self.mean_lht.map(layer));
        let to = ScoreOutput { max_ht: &max_ht, mean_ht: mean_ht.as_ref(), first: prefix };
        chunk_scores(&repeats, &chunks, weighting.as_ref().map(|of| of as &WeightingOf), to)
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
