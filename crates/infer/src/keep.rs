//! The pruning budget, and statistics of what was kept.
//!
//! Dimension key: l layer, h KV head, t context position.

use std::fmt;

use anyhow::{Result, ensure};
use pkv_core::{Policy, RetentionRatio, hinted};
use pkv_extract::key_diff_of;
use pkv_lm::{KvCache, RaggedCache};
use pkv_prune::{HeadBudgets, PolicyInputs, keep_mask_budget_by, keep_mask_by};
use serde::Serialize;
use tch::{Kind, Tensor};

/// Number of KV pairs of a context to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// A share of them.
    Ratio(RetentionRatio),
    /// So many positions of every KV head, or as many pairs as these are together; a shorter context
    /// stays whole.
    Tokens(usize),
}

impl Budget {
    /// Positions of every KV head that may stay of a context of `tokens`.
    pub fn positions(self, tokens: usize) -> usize {
        match self {
            Self::Ratio(ratio) => ratio.count(tokens),
            Self::Tokens(most) => most.min(tokens),
        }
    }
}

/// A budget and how it is spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep<'a> {
    pub budget: Budget,
    pub policy: Policy,
    /// Of the target's heads; `pair-budget` needs them.
    pub budgets: Option<&'a HeadBudgets>,
    /// Last positions of every head, kept regardless of their scores, within the budget.
    pub recent: usize,
}

/// Statistics of a context's kept pairs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kept {
    /// Kept KV pairs of the context.
    pub pairs: usize,
    /// KV pairs that the context had.
    pub of_pairs: usize,
    /// `pairs / of_pairs`.
    pub ratio: f64,
    /// Pairs of the chat template's prefix, which is kept in every KV head.
    pub prefix_pairs: usize,
    /// Fewest and most context pairs of a (layer, KV head).
    pub fewest_in_head: usize,
    pub most_in_head: usize,
    /// Keys and values of the kept pairs, the prefix's included.
    pub kept_bytes: usize,
    /// Keys and values of the full cache by the same rule: of its pairs, the prefix's included, without room.
    pub full_cache_bytes: usize,
    /// Bytes allocated in addition to the kept pairs, for the tokens of questions and answers.
    pub room_bytes: usize,
    /// All that is allocated: `kept_bytes + room_bytes`.
    pub cache_bytes: usize,
}

impl Keep<'_> {
    /// Keep mask of the full cache; the prefix is always kept.
    ///
    /// # Shapes
    /// - `scores_lht`: `[layers, KV heads, context positions]`, any float kind, higher means keep
    /// - `full`: what is pruned, `prefix` positions and then the context; only `pair-keydiff` reads it
    /// - returns bool `[layers, KV heads, prefix + context]`, same device
    ///
    /// # Errors
    /// A score is not finite: a proxy that computes nonsense must not choose what is evicted. Or the policy
    /// lacks budgets.
    pub fn mask(&self, scores_lht: &Tensor, full: &KvCache, prefix: usize) -> Result<Tensor> {
        let broken = scores_lht.isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
        ensure!(
            broken == 0,
            hinted(
                format!("{broken} of {} predicted scores are no finite numbers", scores_lht.numel()),
                "the proxy or the mapper overflows: try `--dtype f32`, or check their weights"
            )
        );
        let key_diff_lht = self.policy.needs_keys().then(|| key_diff_of(full, prefix)).transpose()?;
        let inputs =
            PolicyInputs { budgets: self.budgets, key_diff_lht: key_diff_lht.as_ref(), newest: self.recent };
        let keep_lht = match self.budget {
            Budget::Ratio(ratio) => keep_mask_by(scores_lht, self.policy, ratio, &inputs)?,
            Budget::Tokens(tokens) => keep_mask_budget_by(scores_lht, self.policy, tokens, &inputs)?,
        };
        let (layers, heads, _) = keep_lht.size3()?;
        let prefix = Tensor::ones([layers, heads, prefix as i64], (Kind::Bool, keep_lht.device()));
        Ok(Tensor::cat(&[&prefix, &keep_lht], -1))
    }
}

impl Kept {
    /// Count what `cache` holds of a context of `positions` tokens after `prefix` ones.
    pub fn of(cache: &RaggedCache, prefix: usize, positions: usize, full_cache_bytes: usize) -> Self {
        let heads: Vec<usize> =
            (0..cache.layers()).flat_map(|l| cache.kept(l).iter().map(|n| n - prefix)).collect();
        let (pairs, of_pairs) = (heads.iter().sum::<usize>(), heads.len() * positions);
        let prefix_pairs = heads.len() * prefix;
        let pair_bytes = full_cache_bytes / (of_pairs + prefix_pairs).max(1);
        let kept_bytes = (pairs + prefix_pairs) * pair_bytes;
        Self {
            pairs,
            of_pairs,
            ratio: pairs as f64 / of_pairs.max(1) as f64,
            prefix_pairs,
            fewest_in_head: heads.iter().min().copied().unwrap_or(0),
            most_in_head: heads.iter().max().copied().unwrap_or(0),
            kept_bytes,
            full_cache_bytes,
            room_bytes: cache.bytes() - kept_bytes,
            cache_bytes: cache.bytes(),
        }
    }
}

impl fmt::Display for Keep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.budget {
            Budget::Ratio(ratio) => write!(f, "{ratio} of the KV pairs, policy {}", self.policy.name()),
            Budget::Tokens(n) => write!(f, "{n} tokens per KV head, policy {}", self.policy.name()),
        }?;
        match self.recent {
            0 => Ok(()),
            n => write!(f, ", the newest {n} tokens first"),
        }
    }
}
