//! The dimensions of a decoder-only model that scoring, planning and the mapper depend on.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Dimensions of a model. A recipe states them; `lm` checks them against `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Query heads per layer, a multiple of `kv_heads`.
    pub query_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Rows of the embedding matrix.
    pub vocab: usize,
}

impl ModelShape {
    /// KV heads of all layers: the mapper's outputs (target) or input heads (proxy).
    pub const fn total_kv_heads(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// Query heads that share a KV head.
    pub const fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Parameters of the layers' matrices: what a token is multiplied with, embedding and head left out.
    pub const fn matrix_parameters(&self) -> usize {
        let attention = 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads);
        self.layers * (attention + 3 * self.hidden * self.intermediate)
    }

    /// Elements of keys and values of one position in all layers.
    pub const fn kv_elements_per_token(&self) -> usize {
        2 * self.total_kv_heads() * self.head_dim
    }
}

impl fmt::Display for ModelShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers x {} KV heads of {}", self.layers, self.kv_heads, self.head_dim)
    }
}
