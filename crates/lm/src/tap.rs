//! Taps: how scoring and feature extraction read a forward pass.

use anyhow::Result;
use tch::Tensor;

/// Called once per layer and forward, after rotary and after the new keys are in the cache.
pub trait Tap {
    /// Is [`LayerView::lse_qs`] needed? Then the last layer's attention is computed for it too.
    fn wants_lse(&self) -> bool {
        false
    }

    /// # Errors
    /// The tap's own errors; the forward pass ends with it, the cache as it was before.
    fn layer(&mut self, view: &LayerView) -> Result<()>;
}

/// Data of a layer's attention. Views: copy what must outlive the call.
pub struct LayerView<'a> {
    pub layer: usize,
    /// Queries of the new tokens, rotary applied: `[query_heads, s, head_dim]`, any strides. Query
    /// heads of one KV head lie together.
    pub q_qsd: &'a Tensor,
    /// Keys, rotary applied: `[kv_heads, len, head_dim]`, the new ones last.
    pub k_hkd: &'a Tensor,
    /// Values: `[kv_heads, len, head_dim]`.
    pub v_hkd: &'a Tensor,
    /// Index in the cache of the first new token; its position too, unless pairs were evicted.
    pub start: usize,
    /// Scale of products of queries and keys.
    pub scale: f64,
    /// The layer's input, before the norm: `[s, hidden]`.
    pub hidden_sm: &'a Tensor,
    /// The same after the layer's input norm.
    pub normed_sm: &'a Tensor,
    /// Natural log-sum-exp of each row's scaled logits over all keys it sees: f32 `[query_heads, s]`.
    /// There if the tap wants it.
    pub lse_qs: Option<&'a Tensor>,
}

/// Looks at nothing.
pub struct NoTap;

impl Tap for NoTap {
    fn layer(&mut self, _: &LayerView) -> Result<()> {
        Ok(())
    }
}
