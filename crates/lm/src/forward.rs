//! The one loop over decoder layers.
//!
//! What a layer's attention may see differs: one cache, the cache and several continuations that do not see
//! one another, caches whose KV heads have different lengths. Each of those is a [`KvStore`], in the file of
//! its cache.

use anyhow::Result;
use pkv_gpu::{PackedSlots, Projected, Rotation};
use tch::Tensor;

use crate::model::LanguageModel;
use crate::placement::PerPart;

/// Input of a layer.
pub(crate) struct LayerInput<'a> {
    pub layer: usize,
    /// Its input: `[.., s, hidden]`.
    pub hidden: &'a Tensor,
    /// The same after the layer's input norm.
    pub normed: &'a Tensor,
}

/// Keeps keys and values of new tokens, and lets their queries attend to what they may see.
pub(crate) trait KvStore {
    /// Where keys and values go when they are rotated, so that [`KvStore::attend`] need not write them.
    fn slot(&mut self, _layer: usize) -> Option<PackedSlots<'_>> {
        None
    }

    /// Attention of new tokens: `[.., s, query_heads, head_dim]`. Where it is not `wanted`, because no layer
    /// follows, it may be left out.
    ///
    /// # Errors
    /// A kernel or a tap fails.
    fn attend(&mut self, input: &LayerInput, new: &Projected, wanted: bool) -> Result<Option<Tensor>>;
}

impl LanguageModel {
    /// Run all layers on `hidden`, the new tokens' embeddings; what returns is not normed, and is on the last
    /// layer's device. Without `complete` the last layer ends after its store has seen the new tokens, and
    /// what returns is that layer's input.
    ///
    /// A layer of input x, with K and V the keys and values that a token may see, its own included:
    /// - n = norm(x); q, k, v = W_qkv n, with q and k normed where the architecture does, and rotated
    /// - y = x + W_O softmax(scale q K^T) V
    /// - m = norm(y); the next layer's input is y + W_down (silu(W_gate m) * W_up m)
    ///
    /// # Errors
    /// A kernel fails, or the store does.
    pub(crate) fn run(
        &self,
        mut hidden: Tensor,
        rotations: &PerPart<Rotation>,
        store: &mut dyn KvStore,
        complete: bool,
    ) -> Result<Tensor> {
        for (index, layer) in self.layers.iter().enumerate() {
            let wanted = complete || index + 1 < self.layers.len();
            // Nothing is copied within a device.
            hidden = hidden.to_device(layer.device());
            let normed = layer.normed(&hidden);
            let new = layer.project(&normed, rotations.of(index), store.slot(index).as_ref())?;
            let input = LayerInput { layer: index, hidden: &hidden, normed: &normed };
            let attended = store.attend(&input, &new, wanted)?;
            if let Some(attended) = attended.filter(|_| wanted) {
                hidden = layer.finish_block(hidden, &attended)?;
            }
        }
        Ok(hidden)
    }
}
