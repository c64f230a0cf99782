//! Layers shared by all stages; channels last.

use tch::Tensor;

use crate::params::{Param, ParamStore, Pass};

/// y = x W^T + b over the last dimension.
pub(crate) struct Linear {
    weight: Param,
    bias: Param,
}

impl Linear {
    pub fn new(params: &mut ParamStore, name: &str, from: usize, to: usize) -> Self {
        let weight = params.weight(format!("{name}.weight"), &[to, from], from);
        Self { weight, bias: params.constant(format!("{name}.bias"), &[to], 0.0) }
    }

    /// All zero: what it feeds starts as if it were not there, and learns from the first step on.
    pub fn zero(params: &mut ParamStore, name: &str, from: usize, to: usize) -> Self {
        let weight = params.constant(format!("{name}.weight"), &[to, from], 0.0);
        Self { weight, bias: params.constant(format!("{name}.bias"), &[to], 0.0) }
    }

    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Tensor {
        x.linear(&pass.weights[self.weight], Some(&pass.weights[self.bias]))
    }
}

/// Layer normalization over the last dimension.
pub(crate) struct Norm {
    weight: Param,
    bias: Param,
    width: i64,
}

impl Norm {
    pub fn new(params: &mut ParamStore, name: &str, width: usize) -> Self {
        let weight = params.constant(format!("{name}.weight"), &[width], 1.0);
        Self { weight, bias: params.constant(format!("{name}.bias"), &[width], 0.0), width: width as i64 }
    }

    pub fn forward(&self, pass: &Pass, x: &Tensor) -> Tensor {
        let (weight, bias) = (&pass.weights[self.weight], &pass.weights[self.bias]);
        x.layer_norm([self.width], Some(weight), Some(bias), 1e-5, true)
    }
}

/// Dense convolution over time, centred, zeros beyond both ends.
pub(crate) struct Conv {
    weight: Param,
    bias: Param,
    dilation: i64,
}

impl Conv {
    pub fn new(params: &mut ParamStore, name: &str, width: usize, kernel: usize, dilation: usize) -> Self {
        let weight = params.weight(format!("{name}.weight"), &[width, width, kernel], width * kernel);
        let bias = params.constant(format!("{name}.bias"), &[width], 0.0);
        Self { weight, bias, dilation: dilation as i64 }
    }

    /// Positions on either side that one output depends on.
    pub fn reach(kernel: usize, dilation: usize) -> usize {
        kernel / 2 * dilation
    }

    /// `[rows, positions, width]` to the same.
    pub fn forward(&self, pass: &Pass, x_rtm: &Tensor) -> Tensor {
        pkv_gpu::time_conv(x_rtm, &pass.weights[self.weight], &pass.weights[self.bias], self.dilation)
    }
}
