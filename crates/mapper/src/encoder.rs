//! Stage 2, time-axis context encoder: all heads together, residual blocks along time.

use pkv_recipe::MapperSection;
use tch::Tensor;

use crate::attention::TimeAttention;
use crate::layers::{Conv, Linear, Norm};
use crate::params::{ParamStore, Pass};

pub(crate) struct ContextEncoder {
    input: Linear,
    blocks: Vec<Block>,
    norm: Norm,
}

/// Convolution, attention where the recipe asks for it, feed-forward; each on a normalized copy.
struct Block {
    conv_norm: Norm,
    conv: Conv,
    attention: Option<(Norm, TimeAttention)>,
    feed_forward_norm: Norm,
    up: Linear,
    down: Linear,
}

impl ContextEncoder {
    pub fn new(params: &mut ParamStore, section: &MapperSection, inputs: usize) -> Self {
        let input = Linear::new(params, "stage2.input", inputs, section.width);
        let blocks = (0..section.dilations.len()).map(|i| Block::new(params, section, i)).collect();
        Self { input, blocks, norm: Norm::new(params, "stage2.norm", section.width) }
    }

    /// Positions on either side that one output depends on.
    pub fn reach(section: &MapperSection) -> usize {
        let convs: usize = section.dilations.iter().map(|&d| Conv::reach(section.kernel, d)).sum();
        let mut attending = section.attention_blocks.clone();
        attending.sort_unstable();
        attending.dedup();
        convs + attending.len() * section.attention_window
    }

    /// `[b, t, inputs]` to one normalized vector per position, `[b, t, m]`.
    pub fn forward(&self, pass: &Pass, x_bti: &Tensor) -> Tensor {
        let mut x_btm = self.input.forward(pass, x_bti);
        for block in &self.blocks {
            x_btm = block.forward(pass, &x_btm);
        }
        self.norm.forward(pass, &x_btm)
    }
}

impl Block {
    fn new(params: &mut ParamStore, section: &MapperSection, index: usize) -> Self {
        let (width, wide) = (section.width, section.width * section.feed_forward);
        let name = |part: &str| format!("stage2.block{index}.{part}");
        let conv_norm = Norm::new(params, &name("conv_norm"), width);
        let conv = Conv::new(params, &name("conv"), width, section.kernel, section.dilations[index]);
        let attention = section.attention_blocks.contains(&index).then(|| {
            let norm = Norm::new(params, &name("attention_norm"), width);
            (norm, TimeAttention::new(params, section, &name("attention")))
        });
        Self {
            conv_norm,
            conv,
            attention,
            feed_forward_norm: Norm::new(params, &name("feed_forward_norm"), width),
            up: Linear::new(params, &name("feed_forward.up"), width, wide),
            down: Linear::new(params, &name("feed_forward.down"), wide, width),
        }
    }

    fn forward(&self, pass: &Pass, x_btm: &Tensor) -> Tensor {
        let near = self.conv.forward(pass, &self.conv_norm.forward(pass, x_btm)).gelu("none");
        let mut x_btm = x_btm + pass.drop(near);
        if let Some((norm, attention)) = &self.attention {
            x_btm = &x_btm + attention.forward(pass, &norm.forward(pass, &x_btm));
        }
        let up = self.up.forward(pass, &self.feed_forward_norm.forward(pass, &x_btm)).gelu("none");
        x_btm + self.down.forward(pass, &pass.drop(up))
    }
}
