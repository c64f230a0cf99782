//! From scores to the KV pairs that are kept, and the agreement of two rankings.
//!
//! Owns the policies' keep masks and the head budgets of one of them, the log-odds scale and span pooling of
//! labels, and the metrics of a prediction against KVzip's scores. Tensors in, tensors or numbers out: it
//! knows no model, no shard and no mapper.
//!
//! Every mask is made of comparisons and integer counts alone, so CPU and CUDA keep the same pairs.
//!
//! Dimension key: l layer, h KV head, o layers x KV heads flattened, t position, n pairs that compete.

mod budget;
mod keep;
mod key_diff;
pub mod metrics;
mod target;

pub use budget::{BudgetFit, HeadBudgets};
pub use keep::{
    PolicyInputs, keep_mask, keep_mask_budget, keep_mask_budget_by, keep_mask_by, keep_masks, newest_first,
    token_scores, top_mask,
};
pub use target::{LOG_ODDS_LIMIT, log_odds, pool_targets};
