//! Stage 1, temporal feature extraction: each proxy KV head on its own, weights shared.

use pkv_recipe::MapperSection;
use tch::Tensor;

use crate::layers::{Conv, Linear, Norm};
use crate::params::{Param, ParamStore, Pass};
use crate::standardize::MapperDims;

/// Dilations of the two convolutions.
const DILATIONS: [usize; 2] = [1, 2];

pub(crate) struct Temporal {
    input: Linear,
    head_embedding_pd: Param,
    convs: Vec<Conv>,
    norm: Norm,
}

impl Temporal {
    pub fn new(params: &mut ParamStore, section: &MapperSection, dims: &MapperDims) -> Self {
        let width = section.head_width;
        Self {
            input: Linear::new(params, "stage1.input", dims.channels, width),
            head_embedding_pd: params.uniform(
                "stage1.head_embedding".into(),
                &[dims.proxy_heads, width],
                0.8,
            ),
            convs: DILATIONS
                .iter()
                .enumerate()
                .map(|(i, &dilation)| {
                    Conv::new(params, &format!("stage1.conv{i}"), width, section.kernel, dilation)
                })
                .collect(),
            norm: Norm::new(params, "stage1.norm", width),
        }
    }

    /// Positions on either side that one output depends on.
    pub fn reach(section: &MapperSection) -> usize {
        DILATIONS.iter().map(|&dilation| Conv::reach(section.kernel, dilation)).sum()
    }

    /// Standardized features `[b, p, c, t]` to head tokens `[b, p, t, d]`, in the kind of the features.
    pub fn forward(&self, pass: &Pass, heads_bpct: &Tensor) -> Tensor {
        let (b, p, _, t) = heads_bpct.size4().expect("features have four dimensions");
        let embedding_p1d = pass.weights[self.head_embedding_pd].unsqueeze(1);
        let x_bptd = self.input.forward(pass, &heads_bpct.transpose(2, 3)) + embedding_p1d;
        let mut h_rtd = x_bptd.gelu("none").reshape([b * p, t, -1]);
        for conv in &self.convs {
            h_rtd = &h_rtd + conv.forward(pass, &h_rtd).gelu("none");
        }
        self.norm.forward(pass, &h_rtd).reshape([b, p, t, -1])
    }
}
