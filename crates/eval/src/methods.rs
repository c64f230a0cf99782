//! The methods that score KV pairs, beside the mapper.
//!
//! All of them give one score per (target layer, KV head, position), higher means keep; turning
//! scores into masks is `prune`'s.
//!
//! Dimension key: l target layer, h target KV head, t position.

mod align;
mod positional;
mod snapkv;

use pkv_recipe::Method;
use tch::Tensor;

pub use snapkv::QueryTail;

/// One method's scores of one context, `[layers, KV heads, positions]`.
pub struct Scored {
    pub method: Method,
    pub scores_lht: Tensor,
}
