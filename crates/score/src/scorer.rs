//! Runs a model through prefill and repeat, and collects the scores of a whole context.
//!
//! The tokens fed come from `request`, the maths from `chunk` and `weighting`. The repeat's KV
//! pairs are dropped after every scoring chunk, so memory grows with the cache only.
//!
//! Dimension key: l layer, h KV head, t context position.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_lm::{KvCache, LanguageModel, LayerView, NoTap, Tap, TextTokenizer};
use pkv_recipe::{LabelPreset, LabelSection};
use tch::{Kind, Tensor};

use crate::{ChunkAttention, Requests, Weighting, block_elements, chunk_scores};

/// Scores of a context's KV pairs; the chat template's prefix has none.
pub struct ContextScores {
    /// `[layers, kv_heads, positions]`, f32, on the model's device: the KVzip score; higher means keep.
    pub max_lht: Tensor,
    /// The same shape: the mean, over rows and query group, of the weights whose maximum is the score.
    pub mean_lht: Tensor,
}

/// Scores contexts with one model and one definition of the label.
pub struct Scorer<'a> {
    model: &'a LanguageModel,
    requests: Requests,
    prefix: Vec<u32>,
    sink: usize,
    plus: bool,
    prefill_chunk_tokens: usize,
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
            plus: label.preset == LabelPreset::Plus,
            prefill_chunk_tokens: label.prefill_chunk_tokens,
        }
    }

    /// The tokens that scoring feeds.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Positions that a cache needs to hold prefix, context and one repeat.
    pub fn cache_capacity(&self, context_tokens: usize) -> usize {
        self.prefix.len() + context_tokens + self.requests.most_tokens(context_tokens)
    }

    /// Score a context, given without the prefix: prefill, then repeat it chunk by chunk.
    ///
    /// # Errors
    /// The context is empty, or the model fails on it.
    pub fn score(&self, context: &[u32]) -> Result<ContextScores> {
        check_not_empty(context)?;
        let ids = [&self.prefix, context].concat();
        let mut cache = self.model.new_cache(self.cache_capacity(context.len()));
        let _ = self
            .model
            .prefill(&ids, &mut cache, self.prefill_chunk_tokens, &mut NoTap)
            .with_context(|| format!("prefilling a context of {} tokens", context.len()))?;
        self.score_cached(context, &mut cache)
    }

    /// Score a context whose prefix and tokens `cache` already holds. The cache is left as it was.
    ///
    /// # Errors
    /// The context is empty; the cache holds something else or has too little room; the model fails.
    pub fn score_cached(&self, context: &[u32], cache: &mut KvCache) -> Result<ContextScores> {
        check_not_empty(context)?;
        let held = self.prefix.len() + context.len();
        ensure!(
            cache.len() == held,
            "the cache holds {} positions, expected {held}: a prefix of {} and a context of {}",
            cache.len(),
            self.prefix.len(),
            context.len()
        );
        let needed = self.cache_capacity(context.len());
        ensure!(
            cache.capacity() >= needed,
            "the cache has room for {} positions, scoring needs {needed}",
            cache.capacity()
        );
        let scores = self.repeat(context, cache);
        cache.truncate(held);
        scores
    }

    fn repeat(&self, context: &[u32], cache: &mut KvCache) -> Result<ContextScores> {
        let held = cache.len();
        let shape = self.model.shape();
        let size = [shape.layers as i64, shape.kv_heads as i64, context.len() as i64];
        let zeros = || Tensor::zeros(size, (Kind::Float, self.model.device()));
        let mut scores = ContextScores { max_lht: zeros(), mean_lht: zeros() };
        for chunk in self.requests.chunks(context.len()) {
            let ids: Vec<i64> = self.requests.ids(context, &chunk).into_iter().map(i64::from).collect();
            let ids = Tensor::from_slice(&ids).to_device(self.model.device());
            let mut tap = ChunkTap { scorer: self, chunk: &chunk, scores: &mut scores };
            self.model
                .forward_for_tap(&ids, cache, &mut tap)
                .with_context(|| format!("repeating tokens {chunk:?} of a context of {}", context.len()))?;
            cache.truncate(held);
        }
        Ok(scores)
    }
}

/// Writes the scores of one scoring chunk, layer by layer.
struct ChunkTap<'a> {
    scorer: &'a Scorer<'a>,
    /// Context positions.
    chunk: &'a Range<usize>,
    scores: &'a mut ContextScores,
}

impl Tap for ChunkTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let prefix = self.scorer.prefix.len();
        let chunk = prefix + self.chunk.start..prefix + self.chunk.end;
        let (start, len) = (self.chunk.start as i64, self.chunk.len() as i64);
        let weighting = if self.scorer.plus {
            let v_htd = view.v_hkd.narrow(1, chunk.start as i64, len);
            let projection = self.scorer.model.output_projection(view.layer);
            Some(Weighting::kvzip_plus(view.normed_sm, &v_htd, projection)?)
        } else {
            None
        };
        let attention =
            ChunkAttention { q_qsd: view.q_qsd, k_hkd: view.k_hkd, sink: self.scorer.sink, chunk };
        let scores = chunk_scores(&attention, weighting.as_ref(), block_elements(view.q_qsd.device()))?;
        let write = |into_lht: &Tensor, from_ht: &Tensor| {
            into_lht.get(view.layer as i64).narrow(1, start, len).copy_(from_ht);
        };
        write(&self.scores.max_lht, &scores.max_ht);
        write(&self.scores.mean_lht, &scores.mean_ht);
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
