//! Attention of new tokens over KV heads of different lengths, without padding.
//!
//! Each KV head of each sequence is a segment, which the group of query heads that share it attends to. Where
//! there is a kernel for many lengths at once (CUDA, half precision), one call does a layer: for one new
//! token per sequence our own, which shares all rows evenly between blocks, otherwise FlashAttention's.
//! Elsewhere every segment has its own call.
//!
//! Dimension key: b sequence, h KV head, x segment (sequence x KV head, sequence-major), s new token, q query
//! head, g query heads per KV head, n row of packed keys and values, d head_dim.

use std::ops::Range;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::attention::{Attention, arranged, attend};
use crate::flash::{Mask, Softmax, flash_used_segments, has_fused_attention};
use crate::kernels::{self, DecodeSpace, PackedKv};

/// Whether attention over such keys has kernels for KV heads of different lengths: packing them then pays.
pub fn packs(keys: &Tensor) -> bool {
    has_fused_attention(keys)
}

/// Attention of all layers of one forward, as many new tokens of every sequence.
pub struct RaggedAttention {
    attention: Attention,
    kv_heads: i64,
    reading: Reading,
}

/// Which kernel reads the keys and values.
enum Reading {
    /// That for one new token per sequence, which works in this.
    Single(DecodeSpace),
    /// Any other; where each segment's queries begin, and the end, i32 `[x + 1]`.
    Segments(Tensor),
}

/// Sizes of one forward over a ragged cache.
#[derive(Clone, Copy, Debug)]
pub struct RaggedShape {
    pub sequences: usize,
    /// New tokens of each sequence.
    pub tokens: i64,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl RaggedAttention {
    /// `space` is the workspace of earlier forwards over the same segments; it is made when first needed.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(
        attention: Attention,
        shape: RaggedShape,
        device: Device,
        kind: Kind,
        space: &mut Option<DecodeSpace>,
    ) -> Result<Self> {
        let RaggedShape { sequences, tokens: s, query_heads, kv_heads, head_dim } = shape;
        let (segments, group) = (sequences * kv_heads, query_heads / kv_heads.max(1));
        let single = s <= 1 && kernels::has_decode(device, kind, head_dim as i64, group, segments);
        if single && space.is_none() {
            *space = Some(DecodeSpace::new(device, segments, group, head_dim)?);
        }
        let reading = match space.as_ref().filter(|_| single) {
            Some(space) => Reading::Single(space.share()),
            None => Reading::Segments(Tensor::arange(segments as i64 + 1, (Kind::Int, device)) * s),
        };
        Ok(Self { attention, kv_heads: kv_heads as i64, reading })
    }

    /// Attention of new tokens over all that came before them and over themselves, causally.
    ///
    /// # Shapes
    /// - `q_bsqd`: `[b, s, query_heads, d]`, rotary applied; any strides with head_dim innermost
    /// - `kv`: see [`PackedKv`], the new tokens' keys and values written; kind and device of the queries
    /// - `rows`: rows of each segment that are in use, as the host knows them; `s` or more each
    /// - returns `[b, s, query_heads, d]`, same kind
    ///
    /// # Errors
    /// A kernel fails.
    pub fn attend(
        &self,
        q_bsqd: &Tensor,
        kv: &PackedKv,
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<Tensor> {
        let query_bounds_x = match &self.reading {
            Reading::Single(space) => {
                let all = rows.map(|rows| rows.len()).sum();
                let out = kernels::decode(&q_bsqd.select(1, 0), kv, all, space, self.attention.scale)?;
                return Ok(out.unsqueeze(1));
            }
            Reading::Segments(query_bounds_x) => query_bounds_x,
        };
        let (b, s, heads_q, d) = q_bsqd.size4()?;
        let (heads, group) = (self.kv_heads, heads_q / self.kv_heads);
        let q_xsgd = by_segment(q_bsqd, heads)?;
        let out_xsgd = match has_fused_attention(q_bsqd) {
            true => at_once(&q_xsgd, kv, query_bounds_x, rows, self.attention.scale)?,
            false => one_by_one(&q_xsgd, kv, rows, &self.attention)?,
        };
        Ok(out_xsgd.view([b, heads, s, group, d]).transpose(1, 2).reshape([b, s, heads_q, d]))
    }
}

fn at_once(
    q_xsgd: &Tensor,
    kv: &PackedKv,
    query_bounds_x: &Tensor,
    rows: impl Iterator<Item = Range<usize>>,
    scale: f64,
) -> Result<Tensor> {
    let (_, s, group, d) = q_xsgd.size4()?;
    let attended = flash_used_segments(
        &q_xsgd.view([-1, group, d]),
        &kv.keys_nd.unsqueeze(1),
        &kv.values_nd.unsqueeze(1),
        [query_bounds_x, kv.starts_x],
        kv.lengths_x,
        [s as usize, rows.map(|rows| rows.len()).max().unwrap_or(0)],
        Softmax { mask: Mask::Causal, scale },
    )?;
    Ok(attended.out.view(q_xsgd.size().as_slice()))
}

/// The portable form: each segment by [`attend`].
pub(super) fn one_by_one(
    q_xsgd: &Tensor,
    kv: &PackedKv,
    rows: impl Iterator<Item = Range<usize>>,
    attention: &Attention,
) -> Result<Tensor> {
    let s = q_xsgd.size()[1] as usize;
    let mut outs = Vec::new();
    for (x, rows) in rows.enumerate() {
        let of = |all: &Tensor| all.narrow(0, rows.start as i64, rows.len() as i64).unsqueeze(0);
        let q_sgd = arranged(&q_xsgd.get(x as i64));
        let (k, v) = (of(kv.keys_nd), of(kv.values_nd));
        outs.push(attend(&q_sgd, &k, &v, rows.len() - s, false, attention)?.0);
    }
    Ok(Tensor::stack(&outs, 0))
}

/// Queries `[b, s, query_heads, d]` by the segment that they read, `[b * heads, s, group, d]`, contiguous: a
/// segment's rows are its new tokens, and its query heads the group. Nothing moves for one token.
pub(super) fn by_segment(q_bsqd: &Tensor, heads: i64) -> Result<Tensor> {
    let (b, s, heads_q, d) = q_bsqd.size4()?;
    let q_bhsgd = q_bsqd.reshape([b, s, heads, heads_q / heads, d]).transpose(1, 2);
    Ok(q_bhsgd.reshape([b * heads, s, heads_q / heads, d]).contiguous())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Queries come as a part of what a projection gave, as the kernels leave them.
    #[test]
    fn segments_lie_behind_each_other() {
        let (heads_q, heads, d) = (4, 2, 8);
        for (b, s) in [(1, 1), (1, 5), (3, 1), (3, 5)] {
            let qkv = Tensor::randn([b, s, heads_q + 2 * heads, d], (Kind::Float, Device::Cpu));
            let q_bsqd = qkv.narrow(2, 0, heads_q);
            let q_xsgd = by_segment(&q_bsqd, heads).unwrap();
            assert!(q_xsgd.is_contiguous(), "{b} sequences, {s} tokens");
            for (x, token, g) in [(0, 0, 1), (b * heads - 1, s - 1, 0), (b * heads - 1, 0, 1)] {
                let expected = q_bsqd.get(x / heads).get(token).get(x % heads * 2 + g);
                assert!(q_xsgd.get(x).get(token).get(g).equal(&expected));
            }
        }
    }
}
