//! The KV cache: keys and values of all layers, allocated once.
//!
//! Dimension key: l layer, h KV head, t position, d head_dim, k kept position.

use anyhow::{Result, ensure};
use pkv_core::{ModelShape, hinted};
use tch::{Kind, Tensor};

use crate::layer::bytes;
use crate::placement::Placement;

/// Keys (rotary applied) and values of one sequence, up to a fixed capacity.
#[derive(Debug)]
pub struct KvCache {
    placement: Placement,
    /// One `[kv_heads, rows, head_dim]` per layer, on its device; at least `capacity` rows.
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    len: usize,
    capacity: usize,
    /// Position of the next token: `len`, unless pairs were evicted.
    next_position: usize,
}

impl KvCache {
    pub(crate) fn new(shape: ModelShape, capacity: usize, placement: &Placement, kind: Kind) -> Self {
        // cuDNN plans anew for other strides: contexts of like length shall have the same. On a CPU it only
        // makes sure that tests meet what a GPU meets.
        let rows = capacity.next_multiple_of(1024);
        let size = [shape.kv_heads as i64, rows as i64, shape.head_dim as i64];
        let layers = || (0..shape.layers).map(|l| Tensor::empty(size, (kind, placement.of(l)))).collect();
        Self {
            placement: placement.clone(),
            keys: layers(),
            values: layers(),
            len: 0,
            capacity,
            next_position: 0,
        }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The position that the next token gets: how many tokens were read, evicted or not.
    pub fn next_position(&self) -> usize {
        self.next_position
    }

    /// Forget everything from position `len` on; nothing if the cache is not longer.
    pub fn truncate(&mut self, len: usize) {
        let dropped = self.len.saturating_sub(len);
        self.len -= dropped;
        self.next_position -= dropped;
    }

    /// A view of the first `len` positions, which shares this cache's memory: to read from, not to append to.
    pub fn first(&self, len: usize) -> Self {
        let dropped = self.len.saturating_sub(len);
        let views = |all: &[Tensor]| all.iter().map(Tensor::shallow_clone).collect();
        let len = self.len - dropped;
        Self {
            placement: self.placement.clone(),
            keys: views(&self.keys),
            values: views(&self.values),
            len,
            capacity: len,
            next_position: self.next_position - dropped,
        }
    }

    /// Keys of a layer, rotary applied: a view `[kv_heads, len, head_dim]`.
    pub fn keys(&self, layer: usize) -> Tensor {
        self.keys[layer].narrow(1, 0, self.len as i64)
    }

    /// Values of a layer: a view `[kv_heads, len, head_dim]`.
    pub fn values(&self, layer: usize) -> Tensor {
        self.values[layer].narrow(1, 0, self.len as i64)
    }

    pub fn layers(&self) -> usize {
        self.keys.len()
    }

    /// Where its layers are.
    pub const fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Bytes of keys and values, room included, of each part of the placement.
    pub fn bytes(&self) -> Vec<usize> {
        let of = |all: &[Tensor]| all.iter().map(bytes).sum::<usize>();
        let parts = self.placement.parts().iter().map(|part| part.layers.clone());
        parts.map(|layers| of(&self.keys[layers.clone()]) + of(&self.values[layers])).collect()
    }

    /// A cache that holds only the chosen KV pairs; what it reads next keeps its true position.
    ///
    /// Every KV head keeps the same number of pairs. `spare` is the room for further tokens.
    ///
    /// # Shapes
    /// - `kept_lhk`: i64 `[layers, kv_heads, kept]`, positions below `len`, any device
    pub fn evict(&self, kept_lhk: &Tensor, spare: usize) -> Result<Self> {
        let heads = self.keys.first().map_or(0, |k| k.size()[0]);
        let size = kept_lhk.size();
        ensure!(
            size.len() == 3 && size[0] == self.layers() as i64 && size[1] == heads,
            "expected positions to keep of shape [{}, {heads}, kept], found {size:?}",
            self.layers()
        );
        let kept = size[2] as usize;
        let pick = |all: &[Tensor]| -> Vec<Tensor> {
            let one = |(layer, full): (usize, &Tensor)| {
                let (heads, d) = (full.size()[0], full.size()[2]);
                let out = Tensor::empty([heads, (kept + spare) as i64, d], (full.kind(), full.device()));
                let kept_hk = kept_lhk.get(layer as i64).to_device(full.device());
                let index = kept_hk.unsqueeze(-1).expand([heads, kept as i64, d], false);
                out.narrow(1, 0, kept as i64).copy_(&full.gather(1, &index, false));
                out
            };
            all.iter().enumerate().map(one).collect()
        };
        Ok(Self {
            placement: self.placement.clone(),
            keys: pick(&self.keys),
            values: pick(&self.values),
            len: kept,
            capacity: kept + spare,
            next_position: self.next_position,
        })
    }

    /// Hold `len` positions of normal noise, whatever was there.
    pub(crate) fn fill_with_noise(&mut self, len: usize) {
        let _no_grad = tch::no_grad_guard();
        for part in self.keys.iter_mut().chain(&mut self.values) {
            let _ = part.normal_(0.0, 1.0);
        }
        (self.len, self.next_position) = (len, len);
    }

    /// Keys and values of all layers, `[kv_heads, rows, head_dim]` each, of which the first [`KvCache::len`]
    /// rows are held, and where they are.
    pub(crate) fn into_layers(self) -> (Placement, Vec<Tensor>, Vec<Tensor>) {
        (self.placement, self.keys, self.values)
    }

    /// Refuse to read `new` more tokens if there is no room for them.
    pub(crate) fn check_room(&self, new: usize) -> Result<()> {
        ensure!(
            self.len + new <= self.capacity,
            hinted(
                format!(
                    "the KV cache holds {} of {} positions; {new} more do not fit",
                    self.len, self.capacity
                ),
                "make the cache with a larger capacity"
            )
        );
        Ok(())
    }

    /// Write new keys and values `[kv_heads, s, head_dim]` of a layer after the present ones.
    pub(crate) fn write(&mut self, layer: usize, k_hsd: &Tensor, v_hsd: &Tensor) {
        let (start, s) = (self.len as i64, k_hsd.size()[1]);
        self.keys[layer].narrow(1, start, s).copy_(k_hsd);
        self.values[layer].narrow(1, start, s).copy_(v_hsd);
    }

    /// Keys and values of a layer with `new` positions that were written but not yet counted.
    pub(crate) fn with_new(&self, layer: usize, new: usize) -> (Tensor, Tensor) {
        let len = (self.len + new) as i64;
        (self.keys[layer].narrow(1, 0, len), self.values[layer].narrow(1, 0, len))
    }

    /// Count `new` positions that every layer has written.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
        self.next_position += new;
    }
}
