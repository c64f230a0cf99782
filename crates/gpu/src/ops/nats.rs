//! Token likelihoods.

use anyhow::Result;
use tch::{Kind, Reduction, Tensor};

use crate::kernels;

/// Negative log-likelihood (nats) of the token `next_s` by each row of logits, computed in f32.
///
/// # Shapes
/// - `logits_sv`: `[rows, vocabulary]`, any floating kind and device; contiguous
/// - `next_s`: i64 `[rows]`, same device; every id below the vocabulary, which is not checked
/// - returns f32 `[rows]`
///
/// # Errors
/// The driver refuses.
pub fn nats(logits_sv: &Tensor, next_s: &Tensor) -> Result<Tensor> {
    let vocab = logits_sv.size()[1];
    if kernels::has_elementwise(logits_sv.device(), logits_sv.kind(), 64) && vocab % 8 == 0 {
        return kernels::row_nats(logits_sv, &next_s.contiguous());
    }
    Ok(portable(logits_sv, next_s))
}

pub(super) fn portable(logits_sv: &Tensor, next_s: &Tensor) -> Tensor {
    let logits_sv = logits_sv.to_kind(Kind::Float);
    logits_sv.cross_entropy_loss::<Tensor>(next_s, None, Reduction::None, -100, 0.0)
}
