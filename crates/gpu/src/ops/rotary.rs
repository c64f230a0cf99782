//! Rotary embedding: of new queries and keys at their positions, and of vectors moved to other positions.
//!
//! Dimension key: s new token, q query head, h KV head, d head_dim, n row of packed keys and values.

use std::cell::OnceCell;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::exact_kind;
use crate::kernels::{self, PackedSlots};

/// Queries, keys and values of new tokens, rotary applied; views of what the projection gave.
pub struct Projected {
    /// `[.., s, query_heads, head_dim]`.
    pub q: Tensor,
    /// `[.., s, kv_heads, head_dim]`; without meaning where keys and values went to a cache.
    pub k: Tensor,
    pub v: Tensor,
}

/// Rotary embedding of new queries and keys, after the RMS norm of each head if there is one.
///
/// With a `cache` keys and values go there alone. `qkv` may be overwritten.
///
/// # Shapes
/// - `qkv`: `[.., s, query_heads + 2 kv_heads, head_dim]`: queries, keys, values; contiguous, any floating
///   kind and device
/// - `norm`: `[query_heads + kv_heads, head_dim]`, same kind; `eps` belongs to it
/// - `rotation`: at the positions of `[.., s]`, or of `[s]` for all
///
/// # Errors
/// The slots do not fit, or the driver refuses.
///
/// # Source
/// RoPE, arXiv 2104.09864, in the form of halves that Hugging Face's checkpoints have. Differs: bf16 and f16
/// are rotated in f32 and rounded once.
pub fn rotate(
    qkv: &Tensor,
    query_heads: usize,
    norm: Option<(&Tensor, f64)>,
    rotation: &Rotation,
    cache: Option<&PackedSlots>,
) -> Result<Projected> {
    let d = qkv.size()[qkv.dim() - 1];
    if kernels::has_elementwise(qkv.device(), qkv.kind(), d) {
        let rows_rnd = qkv.view([-1, qkv.size()[qkv.dim() - 2], d]);
        if let Some([cos, sin]) = rotation.of_rows(rows_rnd.size()[0]) {
            kernels::rotate(&rows_rnd, query_heads, norm, &cos, &sin, cache)?;
            return Ok(Projected::views(qkv, qkv, query_heads));
        }
    }
    let new = portable(qkv, query_heads, norm, rotation);
    if let Some(slots) = cache {
        slots.write(&new.k, &new.v);
    }
    Ok(new)
}

pub(super) fn portable(
    qkv: &Tensor,
    query_heads: usize,
    norm: Option<(&Tensor, f64)>,
    rotation: &Rotation,
) -> Projected {
    let (heads, query_heads_i) = (qkv.size()[qkv.dim() - 2], query_heads as i64);
    let mut qk = qkv.narrow(-2, 0, query_heads_i + (heads - query_heads_i) / 2);
    qk = qk.to_kind(exact_kind(qkv.kind()));
    if let Some((weight, eps)) = norm {
        qk = unit_rms(&qk, eps) * weight;
    }
    Projected::views(&rotation.apply(&qk).to_kind(qkv.kind()), qkv, query_heads)
}

impl Projected {
    /// Views of rotated queries and keys, and of values after what they were made of.
    fn views(qk: &Tensor, qkv: &Tensor, query_heads: usize) -> Self {
        let heads = query_heads as i64;
        let kv = (qkv.size()[qkv.dim() - 2] - heads) / 2;
        Self { q: qk.narrow(-2, 0, heads), k: qk.narrow(-2, heads, kv), v: qkv.narrow(-2, heads + kv, kv) }
    }
}

impl PackedSlots<'_> {
    /// Write new keys and values `[sequences, s, kv_heads, d]`.
    pub(super) fn write(&self, k_bshd: &Tensor, v_bshd: &Tensor) {
        for (rows_nd, new) in [(self.k_nd, k_bshd), (self.v_nd, v_bshd)] {
            let d = rows_nd.size()[1];
            let _ =
                rows_nd.shallow_clone().index_copy_(0, self.slot_n, &new.transpose(-3, -2).reshape([-1, d]));
        }
    }
}

/// RMS norm without a weight.
fn unit_rms(x: &Tensor, eps: f64) -> Tensor {
    let width = x.size().last().copied().unwrap_or(0);
    x.rms_norm::<Tensor>([width], None, eps)
}

/// Cosine and sine of one forward's positions, shared by all layers.
pub struct Rotation {
    /// Cosine and sine, f32 `[.., head_dim / 2]`.
    exact_sd: [Tensor; 2],
    /// Dtype in which [`Rotation::apply`] computes.
    kind: Kind,
    /// Tables of [`Rotation::apply`]; made on first use, because kernels do not need them.
    portable: OnceCell<Portable>,
}

/// In the kind of the computation.
struct Portable {
    /// `[.., 1, head_dim]`: both halves are the same.
    cos_sd: Tensor,
    /// `[.., 1, head_dim / 2]`, and its negative.
    sin_sd: Tensor,
    minus_sin_sd: Tensor,
}

impl Rotation {
    /// Of cosines and sines `[.., head_dim / 2]`, f32, for a model of `kind`.
    pub fn new(exact_sd: [Tensor; 2], kind: Kind) -> Self {
        Self { exact_sd, kind: exact_kind(kind), portable: OnceCell::new() }
    }

    /// Cosine and sine of as many rows as `rows`, f32 `[rows, head_dim / 2]`; `None` if positions are shared
    /// between rows.
    fn of_rows(&self, rows: i64) -> Option<[Tensor; 2]> {
        let half = self.exact_sd[0].size().last().copied()?;
        let of_all = self.exact_sd[0].numel() as i64 == rows * half;
        of_all.then(|| [0, 1].map(|i| self.exact_sd[i].reshape([rows, half])))
    }

    /// Rotate heads `[.., heads, head_dim]`, positions in the leading dimensions. `x` and what returns are of
    /// the kind of [`exact_kind`]: rounded to bf16 are the results alone, not the terms and the angles.
    fn apply(&self, x: &Tensor) -> Tensor {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        let Portable { cos_sd, sin_sd, minus_sin_sd } = self.portable.get_or_init(|| {
            let [cos, sin] = [0, 1].map(|i| self.exact_sd[i].to_kind(self.kind));
            Portable {
                cos_sd: Tensor::cat(&[&cos, &cos], -1).unsqueeze(-2),
                minus_sin_sd: sin.neg().unsqueeze(-2),
                sin_sd: sin.unsqueeze(-2),
            }
        });
        let out = x * cos_sd;
        // Halves are written in place: x is read twice and its rotation written twice, no more.
        let _ = out.narrow(-1, 0, half).addcmul_(&x.narrow(-1, half, half), minus_sin_sd);
        let _ = out.narrow(-1, half, half).addcmul_(&x.narrow(-1, 0, half), sin_sd);
        out
    }
}

/// One distance, by which rotated queries or keys can be moved: f32 `[head_dim / 2]`.
pub struct Movement {
    cos_d: Tensor,
    sin_d: Tensor,
}

impl Movement {
    /// Of the angles' cosine and sine, f32 `[head_dim / 2]`.
    pub fn new(cos_d: Tensor, sin_d: Tensor) -> Self {
        Self { cos_d, sin_d }
    }

    /// What `x`, rotated at its positions, is at the others: f32, dimensions before head_dim as they come.
    pub fn of(&self, x: &Tensor) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let Self { cos_d, sin_d } = self;
        let (x, half) = (x.to_kind(Kind::Float), cos_d.numel() as i64);
        let (a, b) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
        Tensor::cat(&[&a * cos_d - &b * sin_d, &b * cos_d + &a * sin_d], -1)
    }

    /// The same by a kernel, rounded to the kind of `x_hsd` and written to `out_hsd`, as [`kernels::turn`]
    /// needs them.
    pub(super) fn write(&self, x_hsd: &Tensor, out_hsd: &Tensor) -> Result<()> {
        kernels::turn(x_hsd, &self.cos_d, &self.sin_d, out_hsd)
    }
}
