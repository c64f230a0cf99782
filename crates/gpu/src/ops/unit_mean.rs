//! How near vectors are to the mean direction of all.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::kernels;

/// Shorter vectors count as this long.
const SHORTEST: f64 = 1e-12;

/// Cosine of each vector with the mean of its head's vectors, each taken at length 1. In f32.
///
/// # Shapes
/// - `vectors_hsd`: `[heads, rows, head_dim]`, any floating kind and device; rows contiguous, heads any
///   multiple of 8 apart
/// - returns f32 `[heads, rows]` in [-1, 1]
///
/// # Errors
/// The driver refuses.
pub fn mean_cosines(vectors_hsd: &Tensor) -> Result<Tensor> {
    if !kernels::has_elementwise(vectors_hsd.device(), vectors_hsd.kind(), vectors_hsd.size()[2]) {
        return Ok(portable(vectors_hsd));
    }
    let (inverse_hs, sums_hbd) = kernels::unit_sums(vectors_hsd, SHORTEST)?;
    let mean_hd = sums_hbd.sum_dim_intlist([1i64].as_slice(), false, Kind::Float) / vectors_hsd.size()[1];
    kernels::cosines(vectors_hsd, &inverse_hs, &(&mean_hd / lengths(&mean_hd)))
}

pub(super) fn portable(vectors_hsd: &Tensor) -> Tensor {
    let vectors_hsd = vectors_hsd.to_kind(Kind::Float);
    let unit_hsd = &vectors_hsd / lengths(&vectors_hsd);
    let mean_h1d = unit_hsd.mean_dim([1].as_slice(), true, Kind::Float);
    let mean_h1d = &mean_h1d / lengths(&mean_h1d);
    unit_hsd.matmul(&mean_h1d.transpose(1, 2)).squeeze_dim(-1)
}

fn lengths(x: &Tensor) -> Tensor {
    x.norm_scalaropt_dim(2, [-1], true).clamp_min(SHORTEST)
}
