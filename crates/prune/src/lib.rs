//! From scores to what stays in the cache, and how well two rankings agree.
//!
//! Owns the three policies' keep masks, the log-odds scale and span pooling of labels, and the
//! metrics of a prediction against KVzip's scores. Tensors in, tensors or numbers out: it knows no
//! model, no shard and no mapper.
//!
//! Every mask is made of comparisons and integer counts alone, so CPU and CUDA keep the same pairs.
//!
//! Dimension key: l layer, h KV head, o layers x KV heads flattened, t position, n pairs that compete.

mod keep;
pub mod metrics;
mod target;

pub use keep::{keep_mask, keep_mask_budget, token_scores, top_mask};
pub use target::{LOG_ODDS_LIMIT, log_odds, pool_targets};
