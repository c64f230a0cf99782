//! Sequences that share a context: made from a full cache, which is not changed, cut at their own ends, and
//! dropped.
//!
//! Dimension key: as [`super`]; n keep mask, c packed row of a layer.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{RaggedCache, RaggedLayer, Sequence, room_for};
use crate::cache::KvCache;

impl RaggedCache {
    /// `questions` sequences for each keep mask, mask-major, each with its own copy of the pairs that its
    /// mask keeps.
    ///
    /// A few operations do a layer, however many masks there are.
    ///
    /// # Shapes
    /// - `keep_nlht`: bool `[masks, layers, kv_heads, cache.len()]`, true = keep; any device
    ///
    /// # Errors
    /// The mask is of another shape or kind, or there is no memory for a layer.
    pub fn branch(cache: &KvCache, keep_nlht: &Tensor, questions: usize, room: usize) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (layers, len) = (cache.layers(), cache.len() as i64);
        ensure!(len > 0 && layers > 0, "an empty KV cache has nothing to keep");
        let (heads, _, d) = cache.keys(0).size3()?;
        let size = keep_nlht.size();
        ensure!(
            size.len() == 4 && size[1..] == [layers as i64, heads, len] && keep_nlht.kind() == Kind::Bool,
            "expected bool keep masks of shape [masks, {layers}, {heads}, {len}], found {:?} of shape {size:?}",
            keep_nlht.kind()
        );
        let (masks, q) = (size[0], questions as i64);
        let room = room_for(room);
        let of_row = |x: &Tensor, width: i64| {
            x.unsqueeze(1).expand([masks, q, heads, width], false).reshape([masks * q, heads, width])
        };
        let kept_lx = keep_nlht.sum_dim_intlist(-1, false, Kind::Int64).transpose(0, 1).unsqueeze(2);
        let kept_lx = kept_lx.expand([layers as i64, masks, q, heads], false).reshape([layers as i64, -1]);
        let kept: Vec<Vec<i64>> = Vec::try_from(kept_lx.to_device(Device::Cpu))?;
        let rooms = cache
            .placement()
            .each(|part| Ok(Tensor::ones([masks, heads, room as i64], (Kind::Bool, part.device))))?;
        let mut packed = Vec::with_capacity(layers);
        for (index, kept) in kept.into_iter().enumerate() {
            let room_nhr = rooms.of(index);
            let keep_nht = keep_nlht.select(1, index as i64).to_device(room_nhr.device());
            let keep_nht = Tensor::cat(&[&keep_nht, room_nhr], -1);
            let chosen_c3 = of_row(&keep_nht, len + room as i64).nonzero();
            // Rows of the room are copies of the last position: they are overwritten before they are read.
            let row_c = chosen_c3.select(1, 1) * len + chosen_c3.select(1, 2).clamp_max(len - 1);
            let pick = |full_htd: Tensor| -> Result<Tensor> {
                full_htd
                    .contiguous()
                    .view([-1, d])
                    .f_index_select(0, &row_c)
                    .with_context(|| format!("packing the kept KV pairs of layer {index}"))
            };
            packed.push(RaggedLayer {
                keys: pick(cache.keys(index))?,
                values: pick(cache.values(index))?,
                kept: kept.into_iter().map(|n| n as usize).collect(),
            });
        }
        let sequence = Sequence { settled: 0, context_end: cache.next_position() };
        let sequences = vec![sequence; (masks * q) as usize];
        Self::assemble(cache.placement(), packed, heads as usize, room, sequences)
    }

    /// Drop what each sequence has read since its context from `tokens[b]` on; none has read less.
    pub(crate) fn truncate(&mut self, tokens: &[usize]) {
        self.appended = 0;
        self.sequences.iter_mut().zip(tokens).for_each(|(s, new)| s.settled = *new);
        self.index();
    }

    /// Keep these sequences alone, in the order given, and give the others' memory back.
    ///
    /// # Errors
    /// There is no memory for a second copy of one layer; the cache is then of no more use.
    pub(crate) fn retain(&mut self, rows: &[usize]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let segments: Vec<usize> =
            rows.iter().flat_map(|row| row * self.kv_heads..(row + 1) * self.kv_heads).collect();
        self.settle();
        for layer in &mut self.layers {
            let device = layer.keys.device();
            let bounds = layer.bounds(self.room);
            let kept: Vec<usize> = segments.iter().map(|&x| layer.kept[x]).collect();
            // Each new segment's rows lie this far from where they were.
            let (mut moved, mut lengths, mut end) = (Vec::new(), Vec::new(), 0);
            for (x, kept) in segments.iter().zip(&kept) {
                moved.push(bounds[*x] as i64 - end);
                lengths.push((kept + self.room) as i64);
                end += (kept + self.room) as i64;
            }
            let on = |numbers: &[i64]| pkv_gpu::upload(&Tensor::from_slice(numbers), device);
            let moved_c = on(&moved)?.f_repeat_interleave_self_tensor(&on(&lengths)?, 0, end)?;
            let row_c = moved_c + Tensor::arange(end, (Kind::Int64, device));
            layer.keys =
                layer.keys.f_index_select(0, &row_c).context("packing the KV pairs of rows that go on")?;
            layer.values = layer.values.f_index_select(0, &row_c)?;
            layer.kept = kept;
        }
        self.sequences = rows.iter().map(|&row| self.sequences[row]).collect();
        // Their size is that of the old rows.
        self.located.iter_mut().for_each(|(_, located)| located.space = None);
        self.index();
        Ok(())
    }

    /// Tokens that each sequence has read since its context.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        (0..self.sequences()).map(|row| self.read(row)).collect()
    }
}
