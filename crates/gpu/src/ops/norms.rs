//! Lengths of keys and values.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::kernels;

/// Logarithms of vectors' lengths, in f32. A vector shorter than `floor` counts as `floor` long.
///
/// # Shapes
/// - `vectors_hsd`: `[heads, rows, head_dim]`, any floating kind and device; rows contiguous, heads any
///   multiple of 8 apart
/// - `out_hs`: f32 `[heads, rows]`, rows contiguous, same device; written
///
/// # Errors
/// Shapes disagree, or the driver refuses.
pub fn log_norms(vectors_hsd: &Tensor, floor: f64, out_hs: &mut Tensor) -> Result<()> {
    if kernels::has_elementwise(vectors_hsd.device(), vectors_hsd.kind(), vectors_hsd.size()[2]) {
        return kernels::log_norms(vectors_hsd, floor, out_hs);
    }
    out_hs.copy_(&portable(vectors_hsd, floor));
    Ok(())
}

pub(super) fn portable(vectors_hsd: &Tensor, floor: f64) -> Tensor {
    let norms_hs = vectors_hsd.to_kind(Kind::Float).norm_scalaropt_dim(2.0, [-1i64], false);
    norms_hs.clamp_min(floor).log()
}
