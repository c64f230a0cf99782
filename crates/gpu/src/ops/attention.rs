//! Attention of new tokens over a cache and over each other, in memory that grows with the cache only.
//!
//! New tokens after a cache split into two parts that need no mask: the rectangle over the cache,
//! which every query sees whole, and the causal square over the new tokens. Each is one fused
//! kernel; their log-sum-exps merge them exactly. No matrix of queries times keys is ever stored.
//! `fused` has the kernels of CUDA in bf16 and f16, and `policy` decides which of them takes which part;
//! `portable` has those of all other places.
//!
//! Dimension key: q query head, h KV head, g query heads per KV head, s or r new token, k key, d head_dim.

mod fused;
mod policy;
pub(super) mod portable;
#[cfg(test)]
mod tests;

use std::ops::Range;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::flash::{Mask, Softmax, has_fused_attention};
use crate::{kernels, upload};

pub use policy::{AttentionPolicy, Rectangle};

/// Attention settings of a model.
///
/// # Source
/// Softmax attention, arXiv 1706.03762, whose KV heads are shared by groups of neighbouring query heads
/// (arXiv 2305.13245); exact merging of parts by their log-sum-exps as in FlashAttention (arXiv 2205.14135).
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Scale of products of queries and keys.
    pub scale: f64,
    pub policy: AttentionPolicy,
}

impl Attention {
    /// With products scaled by `scale`, split between kernels by default.
    pub fn new(scale: f64) -> Self {
        Self { scale, policy: AttentionPolicy::default() }
    }

    fn softmax(&self, mask: Mask) -> Softmax {
        Softmax { mask, scale: self.scale }
    }
}

/// Attention of rows over some of the keys they see.
pub struct Part {
    /// `[rows, query_heads, head_dim]`, kind of the queries; any strides.
    pub out_rqd: Tensor,
    /// Natural log-sum-exp of each row's scaled logits: `[query_heads, rows]`, f32 (f64 of f64 queries).
    pub lse_qr: Tensor,
}

impl Part {
    /// Let rows `first..` also see the keys of `other`: in place, exact.
    ///
    /// One pass over the outputs of both. Without a kernel of our own the weights are in the outputs' kind:
    /// in bf16 their rounding is that of the outputs themselves.
    ///
    /// # Errors
    /// The kernel fails.
    fn add(&mut self, first: i64, other: &Self) -> Result<()> {
        let n = other.out_rqd.size()[0];
        let mut out_rqd = self.out_rqd.narrow(0, first, n);
        let lse_qr = self.lse_qr.narrow(1, first, n);
        if kernels::has_elementwise(out_rqd.device(), out_rqd.kind(), out_rqd.size()[2]) {
            return kernels::merge_attended(&out_rqd, &lse_qr, &other.out_rqd, &other.lse_qr);
        }
        portable::merge(&mut out_rqd, &lse_qr, other);
        Ok(())
    }
}

/// Queries `[s, query_heads, head_dim]` in the memory order that the device's kernels want.
pub fn arranged(q_sqd: &Tensor) -> Tensor {
    if has_fused_attention(q_sqd) {
        return q_sqd.shallow_clone();
    }
    q_sqd.transpose(0, 1).contiguous().transpose(0, 1)
}

/// Attention of new tokens that follow `start` cached ones: softmax(scale q k^T) v, causal among the new
/// tokens.
///
/// # Shapes
/// - `q_sqd`: `[s, query_heads, head_dim]`, see [`arranged`]
/// - `k_hkd`, `v_hkd`: `[kv_heads, start + s, head_dim]`, kind and device of the queries
/// - returns `[s, query_heads, head_dim]`, same kind; and if wanted the log-sum-exp of every row over
///   all keys it sees, f32 `[query_heads, s]`
///
/// # Errors
/// A kernel fails.
pub fn attend(
    q_sqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    start: usize,
    wants_lse: bool,
    attention: &Attention,
) -> Result<(Tensor, Option<Tensor>)> {
    let fused = has_fused_attention(q_sqd);
    if fused && start == 0 && q_sqd.size()[0] > 1 && !wants_lse {
        return Ok((fused::whole(q_sqd, k_hkd, v_hkd, attention.scale), None));
    }
    let part = match fused {
        true => fused::causal(q_sqd, k_hkd, v_hkd, start as i64, attention)?,
        false => portable::causal(q_sqd, k_hkd, v_hkd, start as i64, attention.scale)?,
    };
    Ok((part.out_rqd, wants_lse.then(|| part.lse_qr.to_kind(Kind::Float))))
}

/// Rows of several segments in sequence, each of which sees only itself.
pub struct Segments {
    pub ranges: Vec<Range<usize>>,
    longest: usize,
    /// int32 `[segments + 1]`: where segments begin and the last ends.
    starts: Tensor,
}

impl Segments {
    /// # Errors
    /// The device has no room.
    pub fn new(lengths: impl IntoIterator<Item = usize>, device: Device) -> Result<Self> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for n in lengths {
            let start = ranges.last().map_or(0, |r| r.end);
            ranges.push(start..start + n);
        }
        let starts: Vec<i32> = std::iter::once(0).chain(ranges.iter().map(|r| r.end as i32)).collect();
        Ok(Self {
            longest: ranges.iter().map(Range::len).max().unwrap_or(0),
            starts: upload(&Tensor::from_slice(&starts), device)?,
            ranges,
        })
    }
}

/// Causal attention of each segment over itself.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`; `k_rhd`, `v_rhd`: `[rows, kv_heads, head_dim]`
///
/// # Errors
/// A kernel fails.
pub fn attend_segments(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    segments: &Segments,
    attention: &Attention,
) -> Result<Part> {
    if !has_fused_attention(q_rqd) {
        return Ok(portable::squares(q_rqd, k_rhd, v_rhd, &segments.ranges, attention.scale));
    }
    fused::squares(q_rqd, k_rhd, v_rhd, segments, attention)
}

/// Let all rows of `part` see all keys as well.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`; `k_hkd`, `v_hkd`: `[kv_heads, keys, head_dim]`
///
/// # Errors
/// A kernel fails.
pub fn add_attention(
    part: &mut Part,
    q_rqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    attention: &Attention,
) -> Result<()> {
    if k_hkd.size()[1] == 0 {
        return Ok(());
    }
    if !has_fused_attention(q_rqd) {
        return part.add(0, &portable::rectangle(q_rqd, k_hkd, v_hkd, attention.scale));
    }
    fused::add_rectangle(part, q_rqd, k_hkd, v_hkd, attention)
}

/// Products of queries and keys, `[n, rows, d]` by `[n, d, keys]`; f32 where the device can.
///
/// In bf16 a logit of 10 is off by up to 0.03, its weight by 3%.
pub fn logits(q: &Tensor, k: &Tensor) -> Tensor {
    let half = matches!(q.kind(), Kind::BFloat16 | Kind::Half);
    if half && q.device().is_cuda() { q.bmm_dtype(k, Kind::Float) } else { q.bmm(k) }
}
