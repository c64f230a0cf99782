//! Label weightings: factors of rows and columns that softmax weights are multiplied with before the maximum;
//! a file for each kind, and [`REGISTRY`], which lists them.
//!
//! Presets name their weighting in `recipe`. [`pkv_gpu::chunk_scores`] applies the factors.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens (rows),
//! t position in the scoring chunk, d head_dim, m hidden.

mod kvzip_plus;
mod plain;
#[cfg(test)]
mod tests;

use anyhow::{Result, ensure};
use pkv_gpu::Weighting;
use pkv_recipe::LabelWeighting;
use tch::{Kind, Tensor};

pub use kvzip_plus::kvzip_plus;

/// Factors from the rows' attention inputs `[s, hidden]`, the values `[h, t, d]`, and W_O of the layer.
pub(crate) type Factors = fn(&Tensor, &Tensor, &Tensor) -> Result<Weighting>;

/// A kind of weighting and its way to factors; none where weights stay as they are.
pub(crate) struct Entry {
    pub weighting: LabelWeighting,
    pub factors: Option<Factors>,
}

/// All kinds of weighting.
pub(crate) static REGISTRY: &[Entry] = &[plain::ENTRY, kvzip_plus::ENTRY];

/// Function for a weighting's factors, if it has any.
pub(crate) fn factors(weighting: LabelWeighting) -> Option<Factors> {
    REGISTRY.iter().find(|entry| entry.weighting == weighting).and_then(|entry| entry.factors)
}

/// Norm of each value after the output projection, per query head.
///
/// # Shapes
/// - `v_htd`: `[kv_heads, t, head_dim]`, any floating kind
/// - `projection`: `[hidden, query_heads * head_dim]`, any floating kind, same device
/// - returns `[query_heads, t]`, f32
///
/// # Errors
/// The projection's width is no multiple of `kv_heads * head_dim`.
pub fn value_output_norms(v_htd: &Tensor, projection: &Tensor) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let (v, w) = (v_htd.size(), projection.size());
    ensure!(
        v.len() == 3 && w.len() == 2 && v[0] * v[2] > 0 && w[1] > 0 && w[1] % (v[0] * v[2]) == 0,
        "values {v:?} and output projection {w:?} do not fit: expected [KV heads, positions, head_dim] and \
         [hidden, query heads x head_dim]"
    );
    let (heads, head_dim) = (v[0], v[2]);
    let group = w[1] / (heads * head_dim);
    let v_htd = v_htd.to_kind(Kind::Float);
    // A query head at a time: [t, hidden] is held, never [query_heads, t, hidden].
    let norms: Vec<Tensor> = (0..heads * group)
        .map(|q| {
            let w_md = projection.narrow(1, q * head_dim, head_dim).to_kind(Kind::Float);
            l2_norm(&v_htd.get(q / group).matmul(&w_md.transpose(0, 1)))
        })
        .collect();
    Ok(Tensor::stack(&norms, 0))
}

/// Euclidean norm along the last dimension.
fn l2_norm(x: &Tensor) -> Tensor {
    x.norm_scalaropt_dim(2.0, [-1i64], false)
}
