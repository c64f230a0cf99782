//! KVzip+: a softmax weight is scaled to the norm of its contribution to the residual stream.
//!
//! Each weight is divided by the norm of its row's attention input and multiplied by the norm of
//! the value after the output projection.
//!
//! Dimension key: h KV head, t position in the scoring chunk, s new tokens (rows), d head_dim, m hidden.

use anyhow::{Result, ensure};
use pkv_gpu::Weighting;
use pkv_recipe::plan::ScorerWork;
use tch::{Kind, Tensor};

use super::{Compute, Entry, l2_norm, value_output_norms};

pub(super) const ENTRY: Entry = Entry {
    name: "kvzip-plus",
    meaning: "the same, each weight over the norm of its row's attention input, times the norm of the value through W_O",
    compute: Compute::Repeat(Some(kvzip_plus)),
    work: ScorerWork { value_norms: true, ..ScorerWork::REPEAT },
    #[cfg(test)]
    held_by: ("score/tests/score/naive.rs", "fn kvzip_plus_factors_match_loops_in_f64"),
};

/// KVzip+'s factors.
///
/// # Shapes
/// - `normed_sm`: `[s, hidden]`, the layer's input after its norm, which attention reads
/// - `v_htd`: `[kv_heads, t, head_dim]`, values of the positions scored
/// - `projection`: `[hidden, query_heads * head_dim]`, W_O; all on one device
///
/// # Errors
/// Shapes disagree.
///
/// # Source
/// `KVzipPress(kvzip_plus_normalization=True)` of NVIDIA/kvpress 0.5.5; its "hidden states" are
/// what the attention module receives, so the norm is taken after `input_layernorm`.
/// Differs: everything in f32 whatever the model's kind is.
pub fn kvzip_plus(normed_sm: &Tensor, v_htd: &Tensor, projection: &Tensor) -> Result<Weighting> {
    let _no_grad = tch::no_grad_guard();
    let size = normed_sm.size();
    ensure!(size.len() == 2, "the rows' attention inputs are {size:?}, expected [rows, hidden]");
    // One dead row must not turn all scores into NaN; such a row's weights stay finite.
    let norms_s = l2_norm(&normed_sm.to_kind(Kind::Float)).clamp_min(1e-30);
    Ok(Weighting { rows_s: norms_s.reciprocal(), columns_qt: value_output_norms(v_htd, projection)? })
}
