//! The data of one context that a method may read.
//!
//! Dimension key: l target layer, h target KV head, t context position.

use anyhow::{Context, Result};
use pkv_core::{Rng, Seed};
use pkv_extract::ContextFeatures;
use pkv_lm::KvCache;
use pkv_recipe::MethodName;
use tch::{Device, Tensor};

/// Which random numbers a context draws: a task's name and the context's index in it.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    pub task: &'a str,
    pub index: u64,
}

/// One context. What no chosen method needs is absent.
pub struct ContextView<'a> {
    /// Layers, KV heads and positions.
    pub size_lht: [i64; 3],
    /// Device of the scores.
    pub device: Device,
    pub seed: Seed,
    pub draw: Draw<'a>,
    /// KVzip's raw scores, f32 `[layers, KV heads, positions]`.
    pub label_lht: Option<&'a Tensor>,
    /// Raw features.
    pub features: Option<&'a ContextFeatures>,
    /// The target's cache, nothing but the chat template's prefix and the context in it, and the tokens of
    /// the prefix.
    pub prefilled: Option<(&'a KvCache, usize)>,
}

impl ContextView<'_> {
    /// KVzip's raw scores.
    ///
    /// # Errors
    /// They were not computed: the method's needs do not name them.
    pub fn labels(&self) -> Result<&Tensor> {
        self.label_lht.context("KVzip's scores were not computed: `needs` does not name them")
    }

    /// Raw features.
    ///
    /// # Errors
    /// As [`ContextView::labels`].
    pub fn features(&self) -> Result<&ContextFeatures> {
        self.features.context("the features were not computed: `needs` does not name them")
    }

    /// The target's cache and how many tokens the chat template's prefix has in it.
    ///
    /// # Errors
    /// As [`ContextView::labels`].
    pub fn prefilled(&self) -> Result<(&KvCache, usize)> {
        self.prefilled.context("the target did not read the context: `needs` does not name its prefill")
    }

    /// Layers times KV heads.
    pub fn heads(&self) -> i64 {
        self.size_lht[0] * self.size_lht[1]
    }

    pub fn positions(&self) -> i64 {
        self.size_lht[2]
    }

    /// The method's own random numbers of this context.
    pub fn random(&self, method: MethodName) -> Rng {
        self.seed.stream(&format!("eval {} {}", self.draw.task, method), self.draw.index)
    }
}
