//! A context, prefilled once by both models and scored by every method.
//!
//! Dimension key: n keep mask, l layer, h KV head, t context position, k cached position.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use pkv_core::{Policy, RetentionRatio, Seed, hinted};
use pkv_extract::{ContextFeatures, SourceExtractors, key_diff_of};
use pkv_lm::KvCache;
use pkv_prune::{HeadBudgets, PolicyInputs, keep_mask_by, keep_masks, log_odds};
use pkv_recipe::MethodName;
use pkv_results::cell::Cell;
use pkv_score::Scorer;
use tch::{Kind, Tensor};

use crate::methods::{ContextView, Draw, Methods, Scored, Target, Watches};
use crate::stopwatch::Stopwatch;

/// Both models, ready to read contexts.
pub struct Reader<'a> {
    pub target: Target<'a>,
    pub scorer: Scorer<'a>,
    pub extractor: SourceExtractors<'a>,
    pub methods: Methods<'a>,
    /// There if a cell's policy needs them.
    pub budgets: Option<Arc<HeadBudgets>>,
    /// Last positions, kept regardless of their scores.
    pub keep_recent: usize,
    pub seed: Seed,
}

/// A context in the target's cache, whole, and what each method thinks of it.
pub struct PrunedContext {
    /// Chat template's prefix and context.
    pub cache: KvCache,
    prefix: usize,
    budgets: Option<Arc<HeadBudgets>>,
    keep_recent: usize,
    pub scored: Vec<Scored>,
}

impl<'a> Reader<'a> {
    /// Prefill `context` after the chat template's prefix and score it by every method. Labels and features
    /// are computed where a method needs them.
    ///
    /// # Errors
    /// A model cannot read it.
    pub fn read(&self, context: &[u32], draw: Draw, clock: &mut Stopwatch) -> Result<PrunedContext> {
        let needs = self.methods.needs();
        // Where the target is a source of features, its only prefill gives them.
        let mut watches = self.methods.watches();
        let tapped = match needs.features {
            true => clock.time("target: prefill with features", || {
                let capacity = self.scorer.cache_capacity(context.len());
                self.extractor.prefill_target(context, capacity, &mut watches)
            })?,
            false => None,
        };
        let (cache, watches, of_target) = match tapped {
            Some((cache, features)) => (cache, watches, Some(features)),
            None => {
                let (cache, watches) = self.prefill(context, clock)?;
                (cache, watches, None)
            }
        };
        let label_lht =
            match needs.labels {
                true => Some(clock.time("target: KVzip scores", || {
                    Ok(self.scorer.score_cached(context, &cache)?.max_lht)
                })?),
                false => None,
            };
        let features = match needs.features {
            true => Some(clock.time("features", || self.extractor.features_beside(context, of_target))?),
            false => None,
        };
        let view = ContextView {
            label_lht: label_lht.as_ref(),
            features: features.as_ref(),
            prefilled: Some((&cache, self.target.prefix.len())),
            ..self.view(context.len(), draw)
        };
        let scored = self.methods.score(&view, watches, clock)?;
        let budgets = self.budgets.clone();
        Ok(PrunedContext {
            cache,
            prefix: self.target.prefix.len(),
            budgets,
            keep_recent: self.keep_recent,
            scored,
        })
    }

    /// Score a context whose labels and features are there already. The target reads it where a method needs
    /// that.
    ///
    /// # Errors
    /// The labels are not of this context, or the target cannot read it.
    pub fn score_stored(
        &self,
        context: &[u32],
        label_lht: &Tensor,
        features: &ContextFeatures,
        draw: Draw,
    ) -> Result<Vec<Scored>> {
        let empty = self.view(context.len(), draw);
        ensure!(
            label_lht.size() == empty.size_lht,
            hinted(
                format!(
                    "the labels are {:?} KV pairs, the example has {:?}",
                    label_lht.size(),
                    empty.size_lht
                ),
                "labels must come from these examples: `--redo label`"
            )
        );
        // The tasks time the methods; here contexts differ in length.
        let mut untimed = Stopwatch::new(self.target.model.device());
        let (cache, watches) = match self.methods.needs().prefill {
            true => {
                let (cache, watches) = self.prefill(context, &mut untimed)?;
                (Some(cache), watches)
            }
            false => (None, self.methods.watches()),
        };
        let view = ContextView {
            label_lht: Some(label_lht),
            features: Some(features),
            prefilled: cache.as_ref().map(|cache| (cache, self.target.prefix.len())),
            ..empty
        };
        self.methods.score(&view, watches, &mut untimed)
    }

    /// The target's cache of `context`, and what looked on. Methods that work inside the prefill are timed
    /// with it.
    fn prefill(&self, context: &[u32], clock: &mut Stopwatch) -> Result<(KvCache, Watches<'a>)> {
        let mut watches = self.methods.watches();
        let capacity = self.scorer.cache_capacity(context.len());
        let cache = clock.time("target: prefill", || self.target.prefill(context, capacity, &mut watches))?;
        Ok((cache, watches))
    }

    /// A view of a context of which nothing was computed yet.
    fn view<'v>(&self, positions: usize, draw: Draw<'v>) -> ContextView<'v> {
        let shape = self.target.model.shape();
        ContextView {
            size_lht: [shape.layers, shape.kv_heads, positions].map(|n| n as i64),
            device: self.target.model.device(),
            seed: self.seed,
            draw,
            label_lht: None,
            features: None,
            prefilled: None,
        }
    }
}
impl PrunedContext {
    /// Keep mask of each cell; the prefix is never evicted.
    ///
    /// # Shapes
    /// - returns bool `[cells, layers, KV heads, prefix + context]`
    ///
    /// # Errors
    /// A cell names a method that did not score, or the policy lacks budgets.
    pub fn keep_masks(&self, cells: &[Cell]) -> Result<Tensor> {
        let mut masks = Vec::with_capacity(cells.len());
        for alike in cells.chunk_by(|a, b| (a.method, a.policy) == (b.method, b.policy)) {
            let ratios: Vec<RetentionRatio> = alike.iter().map(|cell| cell.ratio).collect();
            let Cell { method, policy, .. } = alike[0];
            masks.extend(keep_masks(
                &self.scores(method, policy)?,
                policy,
                &ratios,
                &self.inputs(self.key_diff(policy)?.as_ref()),
            )?);
        }
        let keep_nlht = Tensor::stack(&masks, 0);
        let size = keep_nlht.size();
        let prefix = [size[0], size[1], size[2], self.prefix as i64];
        Ok(Tensor::cat(&[&Tensor::ones(prefix, (Kind::Bool, keep_nlht.device())), &keep_nlht], -1))
    }

    /// Keep mask of one method: bool `[layers, KV heads, positions]`.
    ///
    /// # Errors
    /// The method did not score, or the policy lacks budgets.
    pub fn keep(&self, method: MethodName, policy: Policy, ratio: RetentionRatio) -> Result<Tensor> {
        let key_diff_lht = self.key_diff(policy)?;
        keep_mask_by(&self.scores(method, policy)?, policy, ratio, &self.inputs(key_diff_lht.as_ref()))
    }

    fn scores(&self, method: MethodName, policy: Policy) -> Result<Tensor> {
        let scored = self.scored.iter().find(|s| s.method == method);
        let scored = scored.with_context(|| format!("`{method}` has not scored this context"))?;
        Ok(match policy.needs_keys() && method == MethodName::KVZIP {
            // To be added to others they must be on the scale that the mapper predicts.
            true => log_odds(&scored.scores_lht),
            false => scored.scores_lht.shallow_clone(),
        })
    }

    fn key_diff(&self, policy: Policy) -> Result<Option<Tensor>> {
        policy.needs_keys().then(|| key_diff_of(&self.cache, self.prefix)).transpose()
    }

    fn inputs<'i>(&'i self, key_diff_lht: Option<&'i Tensor>) -> PolicyInputs<'i> {
        PolicyInputs { budgets: self.budgets.as_deref(), key_diff_lht, newest: self.keep_recent }
    }
}
