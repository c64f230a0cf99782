//! New tokens after a ragged cache: questions of several tokens, and decoding one by one.
//!
//! Dimension key: as [`super`]; m hidden, q query head.

use anyhow::{Result, ensure};
use pkv_gpu::{PackedKv, PackedSlots, Projected, RaggedAttention, RaggedShape};
use tch::{Kind, Tensor};

use super::{Located, RaggedCache, RaggedLayer};
use crate::forward::{KvStore, LayerInput};
use crate::model::LanguageModel;
use crate::placement::PerPart;

/// Data of one forward pass, for every layer of a part.
struct Step {
    /// New tokens of each sequence.
    s: i64,
    /// The first layer of the part.
    first: usize,
    /// Positions of the new tokens, f32 `[b, s]`.
    position_bs: Tensor,
    /// Slots of new rows, i64 `[l, x * s]`.
    slot_ln: Tensor,
    /// Rows that each segment holds with the new ones, i32 `[l, x]`.
    used_lx: Tensor,
    attention: RaggedAttention,
}

impl LanguageModel {
    /// Read new tokens after every sequence of the cache, as many of each, and append theirs to it.
    ///
    /// Ids that are on the device already are taken as they are: the model itself has chosen them, and
    /// nothing is read back.
    ///
    /// # Shapes
    /// - `ids_bs`: i64 `[sequences, s]`
    /// - returns the hidden states after the final norm, `[sequences, s, hidden]`, in the model's kind
    ///
    /// # Errors
    /// An id outside the vocabulary, another number of sequences, or no memory for the new tokens; the
    /// cache is then as long as before.
    pub fn forward_ragged(&self, ids_bs: &Tensor, cache: &mut RaggedCache) -> Result<Tensor> {
        let size = ids_bs.size();
        ensure!(
            size.len() == 2 && size[0] == cache.sequences() as i64 && size[1] > 0,
            "expected ids of shape [{}, tokens], found {size:?}",
            cache.sequences()
        );
        ensure!(
            cache.layers() == self.layers.len() && cache.kv_heads() == self.shape().kv_heads,
            "the KV cache is of another model"
        );
        let hidden_bsm = self.embed(ids_bs)?;
        cache.reserve(size[1] as usize)?;
        let step = cache.step(size[1], self)?;
        let rotations = self.ropes.zip(&step, |rope, step| Ok(rope.at(&step.position_bs)))?;
        let mut store = RaggedStore { cache: &mut *cache, slot_n: Tensor::new(), step };
        let hidden_bsm = self.run(hidden_bsm, &rotations, &mut store, true)?;
        cache.advance(size[1] as usize);
        Ok(self.finish(&hidden_bsm))
    }

    /// The attention of one forward alone, all layers with the same queries, outputs dropped: for
    /// benchmarks. The new tokens' keys are whatever the rooms hold; the cache must have room for them.
    ///
    /// # Shapes
    /// - `q_bsqd`: `[sequences, s, query_heads, head_dim]`, kind and device of the cache, which is one
    ///
    /// # Errors
    /// A kernel fails.
    pub fn attend_ragged(&self, q_bsqd: &Tensor, cache: &mut RaggedCache) -> Result<()> {
        let step = cache.step(q_bsqd.size()[1], self)?;
        for index in 0..self.layers.len() {
            let _ = cache.attend(index, &step, q_bsqd)?;
        }
        Ok(())
    }
}

/// A cache and where its new tokens go.
struct RaggedStore<'a> {
    cache: &'a mut RaggedCache,
    step: PerPart<Step>,
    /// The step's rows of the layer at work.
    slot_n: Tensor,
}

impl KvStore for RaggedStore<'_> {
    fn slot(&mut self, layer: usize) -> Option<PackedSlots<'_>> {
        let step = self.step.of(layer);
        self.slot_n = step.slot_ln.get((layer - step.first) as i64);
        Some(self.cache.slot(layer, &self.step, &self.slot_n))
    }

    fn attend(&mut self, input: &LayerInput, new: &Projected, _: bool) -> Result<Option<Tensor>> {
        self.cache.attend(input.layer, &self.step, &new.q).map(Some)
    }
}

impl RaggedCache {
    fn step(&mut self, s: i64, model: &LanguageModel) -> Result<PerPart<Step>> {
        // Sequences are in step with each other: nothing goes to the device.
        let n = self.appended as i64;
        let shape = model.shape();
        let sizes = RaggedShape {
            sequences: self.sequences.len(),
            tokens: s,
            query_heads: shape.query_heads,
            kv_heads: self.kv_heads,
            head_dim: shape.head_dim,
        };
        self.located.map_mut(|located| {
            let Located { room_start_lx, kept_lx, context_end_b, space, first, .. } = located;
            let device = room_start_lx.device();
            let (slot_lx, used_lx) = (&*room_start_lx + n, &*kept_lx + (n + s));
            // The device knows positions but for a number, and nothing waits for it.
            let next_b1 = (&*context_end_b + n as f64).unsqueeze(1);
            let (slot_ln, position_bs) = match s {
                1 => (slot_lx, next_b1),
                _ => {
                    let more = |kind| Tensor::arange(s, (kind, device));
                    let slot_lxs = slot_lx.unsqueeze(-1) + more(Kind::Int64);
                    (slot_lxs.flatten(1, 2), next_b1 + more(Kind::Float))
                }
            };
            let attention = RaggedAttention::new(model.attention, sizes, device, model.kind(), space)?;
            Ok(Step { s, first: *first, position_bs, slot_ln, used_lx, attention })
        })
    }

    /// Slots of a layer's new keys and values; `slot_n` is the step's for the layer.
    fn slot<'a>(&'a self, layer: usize, step: &PerPart<Step>, slot_n: &'a Tensor) -> PackedSlots<'a> {
        let RaggedLayer { keys, values, .. } = &self.layers[layer];
        PackedSlots { k_nd: keys, v_nd: values, slot_n, tokens: step.of(layer).s as usize }
    }

    /// Attention of new tokens, whose keys and values are written: [`RaggedAttention::attend`].
    fn attend(&self, index: usize, step: &PerPart<Step>, q_bsqd: &Tensor) -> Result<Tensor> {
        let (layer, step, located) = (&self.layers[index], step.of(index), self.located.of(index));
        let at = (index - step.first) as i64;
        let kv = PackedKv {
            keys_nd: &layer.keys,
            values_nd: &layer.values,
            starts_x: &located.bounds_lx.get(at),
            lengths_x: &step.used_lx.get(at),
        };
        let mut next = 0;
        let rows = layer.kept.iter().enumerate().map(|(x, kept)| {
            let start = next;
            next += kept + self.room;
            start..start + kept + self.read(x / self.kv_heads) + step.s as usize
        });
        step.attention.attend(q_bsqd, &kv, rows)
    }

    /// Count `new` tokens that every layer has written.
    fn advance(&mut self, new: usize) {
        self.appended += new;
    }
}
