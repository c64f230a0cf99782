//! Attention of new tokens over KV heads of different lengths, without padding.
//!
//! Each KV head of each sequence is a sequence of its own to the kernel, with the group of query heads
//! that share it. Where there is a kernel for many lengths at once (CUDA, half precision), one call
//! does a layer; elsewhere every KV head has its own call.
//!
//! Dimension key: as [`super`]; q query head, g query heads per KV head.

use pkv_gpu::{Mask, flash_used_segments, has_fused_attention};
use tch::Tensor;

use super::RaggedCache;
use super::forward::Step;
use crate::attention;

impl RaggedCache {
    /// Attention of new tokens, whose keys and values are written, over all that came before them and
    /// over themselves, causally.
    ///
    /// # Shapes
    /// - `q_bqsd`: `[b, query_heads, s, d]`, rotary applied, contiguous
    /// - returns `[b, query_heads, s, d]`, same kind
    pub(super) fn attend(&self, layer: usize, step: &Step, q_bqsd: &Tensor) -> Tensor {
        match has_fused_attention(q_bqsd) {
            true => self.attend_at_once(layer, step, q_bqsd),
            false => self.attend_one_by_one(layer, step, q_bqsd),
        }
    }

    fn attend_at_once(&self, index: usize, step: &Step, q_bqsd: &Tensor) -> Tensor {
        let layer = &self.layers[index];
        let (b, heads_q, s, d) = q_bqsd.size4().expect("queries have four axes");
        let (heads, at) = (self.kv_heads as i64, index as i64);
        let group = heads_q / heads;
        // A segment's rows are its new tokens, and its query heads the group: nothing moves for one token.
        let q_rgd = q_bqsd.view([b * heads, group, s, d]).transpose(1, 2).reshape([-1, group, d]);
        let longest = self.longest(index, step);
        let attended = flash_used_segments(
            &q_rgd,
            &layer.keys.unsqueeze(1),
            &layer.values.unsqueeze(1),
            [&step.query_bounds_x, &self.bounds_lx.get(at)],
            &step.used_lx.get(at),
            [s as usize, longest],
            Mask::Causal,
        );
        // Shapes and kinds were made here: what is left is a kernel that does not start.
        let out_rgd = attended.expect("the kernel takes these queries").out;
        out_rgd.view([b * heads, s, group, d]).transpose(1, 2).reshape([b, heads_q, s, d])
    }

    fn attend_one_by_one(&self, index: usize, step: &Step, q_bqsd: &Tensor) -> Tensor {
        let layer = &self.layers[index];
        let (b, heads_q, s, d) = q_bqsd.size4().expect("queries have four axes");
        let group = heads_q / self.kv_heads as i64;
        let q_xgsd = q_bqsd.view([-1, group, s, d]);
        let bounds = layer.bounds(self.room);
        let outs: Vec<Tensor> = layer
            .kept
            .iter()
            .enumerate()
            .map(|(x, kept)| {
                let before = kept + step.appended[x / self.kv_heads];
                let rows = |all: &Tensor| all.narrow(0, bounds[x] as i64, before as i64 + s).unsqueeze(0);
                attention::causal(&q_xgsd.get(x as i64), &rows(&layer.keys), &rows(&layer.values), before)
            })
            .collect();
        Tensor::stack(&outs, 0).view([b, heads_q, s, d])
    }

    /// Keys of a layer's longest segment, new ones included.
    fn longest(&self, index: usize, step: &Step) -> usize {
        let kept = self.layers[index].kept.iter().enumerate();
        kept.map(|(x, kept)| kept + step.appended[x / self.kv_heads]).max().unwrap_or(0) + step.s as usize
    }
}
