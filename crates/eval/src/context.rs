//! A context, read once by both models and scored by every method.
//!
//! Dimension key: n keep mask, l layer, h KV head, t context position, k cached position.

use anyhow::{Context, Result};
use pkv_core::{Policy, RetentionRatio};
use pkv_extract::SourceExtractors;
use pkv_lm::{KvCache, LanguageModel, Tap, TextTokenizer};
use pkv_prune::keep_mask;
use pkv_recipe::Method;
use pkv_score::Scorer;
use tch::{Device, Kind, Tensor};

use crate::cell::Cell;
use crate::clock::Clock;
use crate::methods::{Draw, KvzapScores, KvzapTap, Material, Methods, QueryTail, Scored, Several};

/// Both models, ready to read contexts.
pub struct Reader<'a> {
    pub target: &'a LanguageModel,
    pub tokenizer: &'a TextTokenizer,
    pub scorer: Scorer<'a>,
    pub extractor: SourceExtractors<'a>,
    pub methods: &'a Methods<'a>,
    pub prefill_chunk_tokens: usize,
}

/// Scores that fall off the target's prefill, f32 `[layers, KV heads, positions]`, of the methods that are asked for.
#[derive(Default)]
pub struct Looked {
    pub snapkv_lht: Option<Tensor>,
    pub kvzap: KvzapScores,
}

/// A context in the target's cache, whole, and what each method thinks of it.
pub struct PrunedContext {
    /// Chat template's prefix and context.
    pub cache: KvCache,
    prefix: usize,
    pub scored: Vec<Scored>,
}

impl Reader<'_> {
    /// Prefill `context` behind the chat template's prefix and score it by every method.
    ///
    /// # Errors
    /// A model cannot read it.
    pub fn read(&self, context: &[u32], draw: Draw, clock: &mut Clock) -> Result<PrunedContext> {
        let (cache, looked) = self.look(context, clock)?;
        let label_lht =
            clock.time("target: KVzip scores", || Ok(self.scorer.score_cached(context, &cache)?.max_lht))?;
        let features = clock.time("features", || self.extractor.features(context))?;
        let prefix = self.tokenizer.prefix().len();
        let material = Material {
            label_lht,
            heads_pct: features.heads_pct,
            globals_ct: features.globals_ct,
            snapkv_lht: looked.snapkv_lht,
            kvzap: looked.kvzap,
        };
        let scored = self.methods.score(&material, draw, clock)?;
        Ok(PrunedContext { cache, prefix, scored })
    }

    /// Prefill `context` in the target; its cache, and what the methods that look at the prefill saw. KVzap's scorers work
    /// inside the prefill and are timed with it.
    ///
    /// # Errors
    /// The target cannot read it.
    pub fn look(&self, context: &[u32], clock: &mut Clock) -> Result<(KvCache, Looked)> {
        let prefix = self.tokenizer.prefix().len();
        let wants_tail = self.methods.includes(Method::Snapkv);
        let mut tail = QueryTail::default();
        let mut kvzap = self.methods.kvzap().map(|kvzap| KvzapTap::new(kvzap, prefix));
        let mut taps: Vec<&mut dyn Tap> = Vec::new();
        if wants_tail {
            taps.push(&mut tail);
        }
        if let Some(kvzap) = &mut kvzap {
            taps.push(kvzap);
        }
        let cache = clock.time("target: prefill", || self.prefill(context, &mut Several(taps)))?;
        let looked = Looked {
            snapkv_lht: if wants_tail { Some(tail.scores(&cache, prefix)?) } else { None },
            kvzap: kvzap.map(KvzapTap::scores).unwrap_or_default(),
        };
        Ok((cache, looked))
    }

    fn prefill(&self, context: &[u32], tap: &mut dyn Tap) -> Result<KvCache> {
        let ids: Vec<u32> = self.tokenizer.prefix().iter().chain(context).copied().collect();
        let mut cache = self.target.new_cache(self.scorer.cache_capacity(context.len()));
        let _hidden = self.target.prefill(&ids, &mut cache, self.prefill_chunk_tokens, tap)?;
        Ok(cache)
    }
}

impl PrunedContext {
    /// What each cell keeps of the cache; the prefix is never evicted.
    ///
    /// # Shapes
    /// - returns bool `[cells, layers, KV heads, prefix + context]`
    ///
    /// # Errors
    /// A cell names a method that did not score.
    pub fn keep_masks(&self, cells: &[Cell]) -> Result<Tensor> {
        let masks =
            cells.iter().map(|c| self.keep(c.method, c.policy, c.ratio)).collect::<Result<Vec<_>>>()?;
        let keep_nlht = Tensor::stack(&masks, 0);
        let size = keep_nlht.size();
        let prefix = [size[0], size[1], size[2], self.prefix as i64];
        Ok(Tensor::cat(&[&Tensor::ones(prefix, (Kind::Bool, keep_nlht.device())), &keep_nlht], -1))
    }

    /// What one method keeps of the context: bool `[layers, KV heads, positions]`.
    ///
    /// # Errors
    /// The method did not score.
    pub fn keep(&self, method: Method, policy: Policy, ratio: RetentionRatio) -> Result<Tensor> {
        let scored = self.scored.iter().find(|s| s.method == method);
        let scored = scored.with_context(|| format!("`{}` has not scored this context", method.name()))?;
        Ok(keep_mask(&scored.scores_lht, policy, ratio))
    }
}

/// How much memory the largest intermediates of a forward over many masks may take.
pub fn forward_bytes(device: Device) -> usize {
    match device {
        Device::Cpu => 256 << 20,
        _ => 4 << 30,
    }
}
