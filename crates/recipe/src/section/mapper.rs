//! `[mapper]`: the network from proxy features to target scores.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sizes of the HybridAxialMapper and its variants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MapperSection {
    /// Which stages the mapper has.
    pub variant: Variant,
    /// Stage 1: width per proxy KV head.
    pub head_width: usize,
    /// Stage 2: width per position.
    pub width: usize,
    /// Stage 2: feed-forward width over `width`.
    pub feed_forward: usize,
    /// Stage 2: dilations of the blocks' convolutions, one block each.
    pub dilations: Vec<usize>,
    /// Stages 1 and 2: kernel of the convolutions over time, odd.
    pub kernel: usize,
    /// Stage 2: blocks (by index) that also attend over time. None by default: on contexts up to
    /// 1,800 tokens it gained nothing.
    pub attention_blocks: Vec<usize>,
    /// Stage 2: heads of the attention over time.
    pub attention_heads: usize,
    /// Stage 2: half-width of the attention's window, tokens.
    pub attention_window: usize,
    /// Stage 3: width of the cross-attention over proxy heads.
    pub cross_width: usize,
    /// Stage 3: its heads.
    pub cross_heads: usize,
    /// Linear path from the standardized inputs to all outputs, set by ridge regression before training.
    pub linear_skip: bool,
    /// Ridge penalty, relative to the mean diagonal of the normal matrix.
    pub ridge: f64,
}

/// Which stages the mapper has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// All three stages.
    #[default]
    HybridAxial,
    /// Stage 2 on the standardized inputs, and a linear output.
    Conv,
    /// Two hidden layers, position by position.
    Mlp,
    /// The ridge solution alone.
    Linear,
}

impl Default for MapperSection {
    fn default() -> Self {
        Self {
            variant: Variant::HybridAxial,
            head_width: 32,
            width: 192,
            feed_forward: 2,
            dilations: vec![1, 2, 4, 8],
            kernel: 5,
            attention_blocks: Vec::new(),
            attention_heads: 4,
            attention_window: 256,
            cross_width: 64,
            cross_heads: 4,
            linear_skip: true,
            ridge: 1e-4,
        }
    }
}

impl MapperSection {
    /// # Errors
    /// A size is 0 or beyond any use, or sizes do not fit each other.
    pub fn check(&self) -> Result<()> {
        crate::bounds::check("mapper", self)?;
        ensure!(self.kernel % 2 == 1, "`mapper.kernel` is {}; it must be odd to be centred", self.kernel);
        for (name, n) in [
            ("head_width", self.head_width),
            ("width", self.width),
            ("feed_forward", self.feed_forward),
            ("attention_heads", self.attention_heads),
            ("attention_window", self.attention_window),
            ("cross_width", self.cross_width),
            ("cross_heads", self.cross_heads),
        ] {
            ensure!(n > 0, "`mapper.{name}` is 0");
        }
        ensure!(
            self.cross_width.is_multiple_of(self.cross_heads),
            "`mapper.cross_width` = {} is no multiple of `mapper.cross_heads` = {}",
            self.cross_width,
            self.cross_heads
        );
        ensure!(
            self.width.is_multiple_of(2 * self.attention_heads),
            "`mapper.width` = {} is no multiple of twice `mapper.attention_heads` = {}",
            self.width,
            self.attention_heads
        );
        for (i, &b) in self.attention_blocks.iter().enumerate() {
            ensure!(
                b < self.dilations.len(),
                "`mapper.attention_blocks[{i}]` is {b}, but there are {} blocks (`mapper.dilations`)",
                self.dilations.len()
            );
        }
        ensure!(self.dilations.iter().all(|&d| d > 0), "`mapper.dilations` holds a 0");
        ensure!(self.ridge > 0.0, "`mapper.ridge` is {}; it must be positive", self.ridge);
        Ok(())
    }
}
