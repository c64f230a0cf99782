//! Pruning policies: how a budget is distributed over layers, KV heads and positions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which KV pairs compete with each other for a place in the pruned cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// One global ranking over layers x KV heads x positions (KVzip's default).
    Pair,
    /// The same, but the best positions of every KV head are kept, however low that head scores
    /// ([`HEAD_PLACES`]).
    PairFloor,
    /// The same number of positions in every layer and KV head.
    PairUniform,
    /// A fixed number of positions in each layer and KV head, by budgets learned from the training labels:
    /// the same cache shape for every context of a length.
    PairBudget,
    /// The same positions in all KV heads of all layers.
    Token,
}

/// Under `pair-floor`, what a pair's place within its KV head counts beside its place among all pairs: with
/// 5, every head keeps at least a sixth of its even share.
///
/// The idea is the safeguard of Ada-KV (arXiv 2407.11550), a fifth of an even share there. On the real pair 5
/// and 2 gave KVzip's own scores the same answers.
pub const HEAD_PLACES: i64 = 5;

impl Policy {
    pub const ALL: [Self; 5] =
        [Self::Pair, Self::PairFloor, Self::PairUniform, Self::PairBudget, Self::Token];
    /// Those that need only scores: a pair that is kept at one ratio is kept at every larger one.
    pub const OF_SCORES: [Self; 4] = [Self::Pair, Self::PairFloor, Self::PairUniform, Self::Token];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::PairFloor => "pair-floor",
            Self::PairUniform => "pair-uniform",
            Self::PairBudget => "pair-budget",
            Self::Token => "token",
        }
    }
}
