//! Products with weights that keep all digits of f32, whatever the kind of what they are multiplied by.

use tch::{Device, Kind, Tensor};

/// A bf16 number has 8 digits, an f32 24.
const PARTS: i64 = 3;

/// f32 matrices, one per layer, that inputs of any floating kind are multiplied by as in f32.
///
/// A copy of bf16 inputs in f32 would cost more than the product: at 32,768 tokens of a hidden size of 4,096
/// it is 512 MiB per layer. On a GPU the weights are therefore the sum of three bf16 matrices, side by side
/// in one product, whose results are f32.
#[derive(Debug)]
pub struct FullWeights {
    /// f32 `[layers, m, n]`
    weight_lmn: Tensor,
    /// bf16 `[layers, PARTS * n, m]` on a GPU
    parts_lpm: Option<Tensor>,
}

impl FullWeights {
    /// # Shapes
    /// - `weight_lmn`: f32 `[layers, m, n]`
    pub fn new(weight_lmn: Tensor) -> Self {
        let parts_lpm = matches!(weight_lmn.device(), Device::Cuda(_)).then(|| parts(&weight_lmn));
        Self { weight_lmn, parts_lpm }
    }

    /// f32 `[layers, m, n]`
    pub fn weight_lmn(&self) -> &Tensor {
        &self.weight_lmn
    }

    /// A layer's product with `x_sm`.
    ///
    /// # Shapes
    /// - `x_sm`: `[s, m]`, any floating kind, the weights' device
    /// - returns f32 `[s, n]`
    pub fn product(&self, layer: i64, x_sm: &Tensor) -> Tensor {
        match &self.parts_lpm {
            Some(parts_lpm) if x_sm.kind() == Kind::BFloat16 => {
                let parts_sp = x_sm.mm_dtype(&parts_lpm.get(layer).transpose(0, 1), Kind::Float);
                let n = self.weight_lmn.size()[2];
                parts_sp.view([-1, PARTS, n]).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
            }
            _ => portable(x_sm, &self.weight_lmn.get(layer)),
        }
    }
}

pub(super) fn portable(x_sm: &Tensor, weight_mn: &Tensor) -> Tensor {
    x_sm.to_kind(Kind::Float).matmul(weight_mn)
}

/// Three bf16 matrices whose sum is the weights, transposed: `[layers, PARTS * n, m]`.
pub(super) fn parts(weight_lmn: &Tensor) -> Tensor {
    let mut rest = weight_lmn.transpose(1, 2).contiguous();
    let parts: Vec<Tensor> = (0..PARTS)
        .map(|_| {
            let part = rest.to_kind(Kind::BFloat16);
            rest = &rest - part.to_kind(Kind::Float);
            part
        })
        .collect();
    Tensor::cat(&parts, 1)
}
