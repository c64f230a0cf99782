//! The gated product of a feed-forward block.

use anyhow::Result;
use tch::Tensor;

use super::exact_kind;
use crate::kernels;

/// silu(gate) * up, rounded once.
///
/// # Shapes
/// - `gate_up`: `[rows, 2 * width]`, gates first, any floating kind and device
/// - returns `[rows, width]`, same kind
///
/// # Errors
/// The driver refuses.
///
/// # Source
/// SwiGLU, arXiv 2002.05202, as Llama has it.
pub fn gated_silu(gate_up: &Tensor) -> Result<Tensor> {
    let wide = gate_up.size()[1] / 2;
    if wide % 8 == 0 && kernels::has_elementwise(gate_up.device(), gate_up.kind(), 64) {
        return kernels::gated_silu(gate_up);
    }
    Ok(portable(gate_up))
}

pub(super) fn portable(gate_up: &Tensor) -> Tensor {
    let wide = gate_up.size()[1] / 2;
    let mut gated = gate_up.narrow(1, 0, wide).to_kind(exact_kind(gate_up.kind())).silu();
    gated *= gate_up.narrow(1, wide, wide);
    gated.to_kind(gate_up.kind())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_gate_in_half_precision_rounds_nothing_but_the_result() {
        tch::manual_seed(1);
        for kind in [Kind::BFloat16, Kind::Half] {
            let gate_up = (Tensor::randn([30, 2 * 24], (Kind::Float, Device::Cpu)) * 3.0).to_kind(kind);
            let exact = gated_silu(&gate_up.to_kind(Kind::Float)).unwrap();
            assert!(gated_silu(&gate_up).unwrap().equal(&exact.to_kind(kind)), "{kind:?}");
        }
    }
}
