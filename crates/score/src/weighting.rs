//! KVzip+: a softmax weight becomes the size of what it writes into the residual stream.
//!
//! Each weight is divided by the norm of its row's attention input and multiplied by the norm of
//! the value after the output projection. Where that happens is `chunk`'s business.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens (rows),
//! t position in the scoring chunk, d head_dim, m hidden.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

/// Factors of the softmax weights of one scoring chunk in one layer.
pub struct Weighting {
    /// `[s]`, f32: one over the norm of the row's attention input.
    pub rows_s: Tensor,
    /// `[query_heads, t]`, f32, not negative: the norm of value x W_O of the query head.
    pub columns_qt: Tensor,
}

impl Weighting {
    /// KVzip+'s factors.
    ///
    /// # Shapes
    /// - `normed_sm`: `[s, hidden]`, the layer's input after its norm, which attention reads
    /// - `v_htd`: `[kv_heads, t, head_dim]`, values of the scoring chunk
    /// - `projection`: `[hidden, query_heads * head_dim]`, W_O; all on one device
    ///
    /// # Errors
    /// Shapes disagree.
    ///
    /// # Source
    /// `KVzipPress(kvzip_plus_normalization=True)` of NVIDIA/kvpress 0.5.5; its "hidden states" are
    /// what the attention module receives, so the norm is taken after `input_layernorm`.
    /// Differs: everything in f32 whatever the model's kind is.
    pub fn kvzip_plus(normed_sm: &Tensor, v_htd: &Tensor, projection: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let size = normed_sm.size();
        ensure!(size.len() == 2, "the rows' attention inputs are {size:?}, expected [rows, hidden]");
        // One dead row must not turn all scores into NaN; such a row's weights stay finite.
        let norms_s = l2_norm(&normed_sm.to_kind(Kind::Float)).clamp_min(1e-30);
        Ok(Self { rows_s: norms_s.reciprocal(), columns_qt: value_output_norms(v_htd, projection)? })
    }

    pub(crate) fn check(&self, rows: i64, query_heads: i64, positions: i64) -> Result<()> {
        let (r, c) = (self.rows_s.size(), self.columns_qt.size());
        ensure!(
            r == [rows] && c == [query_heads, positions],
            "weighting of rows {r:?} and columns {c:?}, expected [{rows}] and [{query_heads}, {positions}]"
        );
        Ok(())
    }
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
