//! What distinguishes one supported architecture from another, as numbers and flags that the forward pass reads.
//!
//! What they all share is no field: an RMS norm before attention and one before the feed-forward layer, rotary embedding of
//! whole heads, full attention in every layer, a SiLU-gated feed-forward layer without bias. Shapes and the rotary embedding
//! are `config`'s; which architecture a checkpoint has, `family` says.

use anyhow::Result;
use pkv_core::ModelShape;

use crate::config::keys::Keys;

/// A decoder-only transformer, but for its shape and its rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Architecture {
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f64,
    /// Queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub output_bias: bool,
    /// Queries and keys are normalized per head before rotary.
    pub qk_norm: bool,
    /// What products of queries and keys are multiplied with before their softmax.
    pub score_scale: f64,
    /// What embeddings are multiplied with.
    pub embedding_scale: f64,
    /// What the outputs of attention and of the feed-forward layer are multiplied with before they are added to the residual.
    pub residual_scale: f64,
    /// What logits are divided by.
    pub logits_divisor: f64,
}

impl Architecture {
    /// No biases, no norms of queries and keys, products scaled by 1/sqrt(head_dim) and nothing else scaled.
    ///
    /// # Errors
    /// `rms_norm_eps` is no number.
    pub(crate) fn plain(keys: &Keys, shape: &ModelShape) -> Result<Self> {
        Ok(Self {
            norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            qkv_bias: false,
            output_bias: false,
            qk_norm: false,
            score_scale: 1.0 / (shape.head_dim as f64).sqrt(),
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits_divisor: 1.0,
        })
    }
}
