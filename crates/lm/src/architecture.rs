//! The differences between supported architectures, as numbers and flags that the forward pass reads.
//!
//! Common to all, and therefore without a field: an RMS norm before attention and one before the feed-forward
//! layer, rotary embedding of whole heads, full attention in every layer, a SiLU-gated feed-forward layer
//! without bias. Shapes and the rotary embedding are `config`'s; which architecture a checkpoint has,
//! `family` says.

use anyhow::{Result, ensure};
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
    /// Factor of products of queries and keys before their softmax.
    pub score_scale: f64,
    /// Factor of embeddings.
    pub embedding_scale: f64,
    /// Factor of the outputs of attention and of the feed-forward layer before they are added
    /// to the residual.
    pub residual_scale: f64,
    /// Divisor of logits.
    pub logits_divisor: f64,
}

impl Architecture {
    /// No biases, no norms of queries and keys, products scaled by 1/sqrt(head_dim) and nothing else scaled.
    ///
    /// # Errors
    /// `rms_norm_eps` is no number, or below 0.
    pub(crate) fn plain(keys: &Keys, shape: &ModelShape) -> Result<Self> {
        let norm_eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        ensure!(norm_eps >= 0.0, "`rms_norm_eps` is {norm_eps}; expected 0 or more");
        Ok(Self {
            norm_eps,
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
