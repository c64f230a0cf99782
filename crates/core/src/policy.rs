//! How a budget is spread over layers, KV heads and positions.

use serde::{Deserialize, Serialize};

/// Which KV pairs compete with each other for a place in the pruned cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// One global ranking over layers x KV heads x positions (KVzip's default).
    Pair,
    /// The same number of positions in every layer and KV head.
    PairUniform,
    /// A fixed number of positions in each layer and KV head, by budgets learned from the training labels: the same cache
    /// shape for every context of a length.
    PairBudget,
    /// The same positions in all KV heads of all layers.
    Token,
}

impl Policy {
    pub const ALL: [Self; 4] = [Self::Pair, Self::PairUniform, Self::PairBudget, Self::Token];
    /// Those that need nothing beside scores.
    pub const OF_SCORES: [Self; 3] = [Self::Pair, Self::PairUniform, Self::Token];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::PairUniform => "pair-uniform",
            Self::PairBudget => "pair-budget",
            Self::Token => "token",
        }
    }
}
