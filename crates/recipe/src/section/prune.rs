//! `[prune]`: what a policy needs beside scores.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Head budgets of the policy `pair-budget`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PruneSection {
    /// Training contexts, evenly spread over the split, whose labels give each head its budget. Which heads
    /// KVzip prefers hardly depends on the context: the mean of 50 is stable.
    pub budget_contexts: u64,
}

impl Default for PruneSection {
    fn default() -> Self {
        Self { budget_contexts: 50 }
    }
}

impl PruneSection {
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.budget_contexts > 0, "`prune.budget_contexts` is 0");
        Ok(())
    }
}
