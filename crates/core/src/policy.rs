//! Pruning policies: how a budget is distributed over layers, KV heads and positions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

crate::named! {
    /// Which KV pairs compete with each other for a place in the pruned cache.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    pub enum Policy {
        /// One global ranking over layers x KV heads x positions (KVzip's default).
        Pair = "pair", "All KV pairs of the context compete";
        /// The same, but every KV head keeps its best positions, at least a sixth of an even share.
        PairFloor = "pair-floor", "As `pair`, but every KV head keeps at least a sixth of an even share";
        /// As `pair-floor`; below a fifth kept, KeyDiff's scores are added, the more the less is kept.
        PairKeydiff = "pair-keydiff", "As `pair-floor`; below a fifth kept, KeyDiff's scores count too";
        /// The same number of positions in every layer and KV head.
        PairUniform = "pair-uniform",
            "Positions compete within each KV head; every head keeps the same number";
        /// A fixed number of positions in each layer and KV head, by budgets learned from the training
        /// labels: the same cache shape for every context of a length.
        PairBudget = "pair-budget",
            "Positions compete within each KV head; the number kept is the head's budget from the export";
        /// The same positions in all KV heads of all layers.
        Token = "token", "Positions compete; all KV heads keep the same ones";
    }
}

/// Under `pair-floor`, what a pair's place within its KV head counts beside its place among all pairs: with
/// 5, every head keeps at least a sixth of its even share.
///
/// The idea is the safeguard of Ada-KV (arXiv 2407.11550), a fifth of an even share there. On the real pair 5
/// and 2 gave KVzip's own scores the same answers.
pub const HEAD_PLACES: i64 = 5;

/// Under `pair-keydiff`, the weight of KeyDiff's scores beside the method's where a share `kept` of the KV
/// pairs is kept, both standardized over the context: 0 from a fifth on, 0.2 at a tenth, 0.6 at a twentieth,
/// at most 1.
///
/// With weights of 0, 0.15, 0.3, 0.6 and 1 a mapper of the real pair answered most with about these; the
/// table is in the results of that pair.
pub fn key_diff_weight(kept: f64) -> f64 {
    (0.2 * (0.2 / kept - 1.0)).clamp(0.0, 1.0)
}

impl Policy {
    /// Those that need no keys, and so can be compared where there are only scores.
    pub const WITHOUT_KEYS: [Self; 5] =
        [Self::Pair, Self::PairFloor, Self::PairUniform, Self::PairBudget, Self::Token];
    /// Those that need only scores: a pair that is kept at one ratio is kept at every larger one.
    pub const OF_SCORES: [Self; 4] = [Self::Pair, Self::PairFloor, Self::PairUniform, Self::Token];

    /// Does it look at the target's keys?
    pub const fn needs_keys(self) -> bool {
        matches!(self, Self::PairKeydiff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_count_only_where_few_pairs_stay() {
        let weights = [1.0, 0.3, 0.2, 0.1, 0.05, 0.01, 0.0].map(key_diff_weight);
        let expected = [0.0, 0.0, 0.0, 0.2, 0.6, 1.0, 1.0];
        for (weight, expected) in weights.into_iter().zip(expected) {
            assert!((weight - expected).abs() < 1e-12, "{weight} {expected}");
        }
    }
}
