//! Attention of new tokens over KV heads of different lengths, without padding.
//!
//! Each KV head of each sequence is a sequence of its own to the kernel, with the group of query heads
//! that share it. Where there is a kernel for many lengths at once (CUDA, half precision), one call
//! does a layer: for one new token per sequence our own, which shares all rows evenly between blocks,
//! otherwise FlashAttention's. Elsewhere every KV head has its own call.
//!
//! Dimension key: as [`super`]; q query head, g query heads per KV head.

use anyhow::Result;
use pkv_gpu::{DecodeSpace, Mask, Segments, Softmax, decode, flash_used_segments, has_fused_attention};
use tch::Tensor;

use super::RaggedCache;
use super::forward::{Reading, Step};
use crate::attention::{self, Attention};

impl RaggedCache {
    /// Attention of new tokens, whose keys and values are written, over all that came before them and
    /// over themselves, causally.
    ///
    /// # Shapes
    /// - `q_bsqd`: `[b, s, query_heads, d]`, rotary applied; any strides with head_dim innermost
    /// - returns `[b, s, query_heads, d]`, same kind
    ///
    /// # Errors
    /// A kernel fails.
    pub(super) fn attend(
        &self,
        layer: usize,
        step: &Step,
        q_bsqd: &Tensor,
        attention: &Attention,
    ) -> Result<Tensor> {
        let query_bounds_x = match &step.reading {
            Reading::Single(space) => return self.decode(layer, step, q_bsqd, space, attention.scale),
            Reading::Segments(query_bounds_x) => query_bounds_x,
        };
        let (b, s, heads_q, d) = q_bsqd.size4()?;
        let (heads, group) = (self.kv_heads as i64, heads_q / self.kv_heads as i64);
        let q_xsgd = by_segment(q_bsqd, heads)?;
        let out_xsgd = match has_fused_attention(q_bsqd) {
            true => self.attend_at_once(layer, step, query_bounds_x, &q_xsgd, attention.scale)?,
            false => self.attend_one_by_one(layer, step, &q_xsgd, attention)?,
        };
        Ok(out_xsgd.view([b, heads, s, group, d]).transpose(1, 2).reshape([b, s, heads_q, d]))
    }

    /// One new token per sequence.
    fn decode(
        &self,
        index: usize,
        step: &Step,
        q_b1qd: &Tensor,
        space: &DecodeSpace,
        scale: f64,
    ) -> Result<Tensor> {
        let (layer, at) = (&self.layers[index], index as i64);
        let kv = Segments {
            keys_nd: &layer.keys,
            values_nd: &layer.values,
            starts_x: &self.bounds_lx.get(at),
            lengths_x: &step.used_lx.get(at),
        };
        let new: usize = step.read.iter().map(|read| read + 1).sum();
        let rows = layer.kept.iter().sum::<usize>() + self.kv_heads * new;
        Ok(decode(&q_b1qd.select(1, 0), &kv, rows, space, scale)?.unsqueeze(1))
    }

    fn attend_at_once(
        &self,
        index: usize,
        step: &Step,
        query_bounds_x: &Tensor,
        q_xsgd: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        let (layer, at) = (&self.layers[index], index as i64);
        let (_, s, group, d) = q_xsgd.size4()?;
        let attended = flash_used_segments(
            &q_xsgd.view([-1, group, d]),
            &layer.keys.unsqueeze(1),
            &layer.values.unsqueeze(1),
            [query_bounds_x, &self.bounds_lx.get(at)],
            &step.used_lx.get(at),
            [s as usize, self.longest(index, step)],
            Softmax { mask: Mask::Causal, scale },
        )?;
        Ok(attended.out.view(q_xsgd.size().as_slice()))
    }

    fn attend_one_by_one(
        &self,
        index: usize,
        step: &Step,
        q_xsgd: &Tensor,
        attention: &Attention,
    ) -> Result<Tensor> {
        let layer = &self.layers[index];
        let bounds = layer.bounds(self.room);
        let mut outs = Vec::with_capacity(layer.kept.len());
        for (x, kept) in layer.kept.iter().enumerate() {
            let before = kept + step.read[x / self.kv_heads];
            let rows = |all: &Tensor| all.narrow(0, bounds[x] as i64, before as i64 + step.s).unsqueeze(0);
            let q_sgd = attention::arranged(&q_xsgd.get(x as i64));
            let (k, v) = (rows(&layer.keys), rows(&layer.values));
            outs.push(attention::causal(&q_sgd, &k, &v, before, false, attention)?.0);
        }
        Ok(Tensor::stack(&outs, 0))
    }

    /// Keys of a layer's longest segment, new ones included.
    fn longest(&self, index: usize, step: &Step) -> usize {
        let kept = self.layers[index].kept.iter().enumerate();
        kept.map(|(x, kept)| kept + step.read[x / self.kv_heads]).max().unwrap_or(0) + step.s as usize
    }
}

/// Queries `[b, s, query_heads, d]` by the segment that they read, `[b * heads, s, group, d]`, contiguous: a
/// segment's rows are its new tokens, and its query heads the group. Nothing moves for one token.
fn by_segment(q_bsqd: &Tensor, heads: i64) -> Result<Tensor> {
    let (b, s, heads_q, d) = q_bsqd.size4()?;
    let q_bhsgd = q_bsqd.reshape([b, s, heads, heads_q / heads, d]).transpose(1, 2);
    Ok(q_bhsgd.reshape([b * heads, s, heads_q / heads, d]).contiguous())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

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
