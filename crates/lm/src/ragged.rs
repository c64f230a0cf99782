//! A KV cache that pruning has made smaller in memory: every KV head of every layer has its own length.
//!
//! The kept pairs of a layer lie packed in one matrix of rows, KV head after KV head. Keys keep the
//! rotary positions they were computed with; what is read next gets the true next position. After
//! each KV head's pairs there is room for a block of further tokens, and all rooms grow together.
//! A cache may hold several sequences, which then decode as one batch. How attention reads it is the subject
//! of `pkv_gpu::RaggedAttention`, the forward pass is [`forward`]'s, sequences that share a context are
//! [`rows`]'s; which pairs are kept is `prune`'s.
//!
//! Dimension key: l layer (of a part), b sequence, h KV head, x segment (sequence x KV head, sequence-major),
//! t position of the full cache, s new token, n row of a layer's packed storage, d head_dim.

mod forward;
mod rows;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_gpu::DecodeSpace;
use tch::{Device, Kind, Tensor};

use crate::cache::KvCache;
use crate::placement::{PerPart, Placement};

/// Rooms grow by whole blocks of this many tokens: 0.8% of a context of 32,768.
pub(crate) const ROOM_BLOCK: usize = 256;

/// The room that a cache makes for `tokens`.
pub(crate) fn room_for(tokens: usize) -> usize {
    tokens.max(1).next_multiple_of(ROOM_BLOCK)
}

/// Kept KV pairs of one or several contexts, and the tokens read since.
#[derive(Debug)]
pub struct RaggedCache {
    layers: Vec<RaggedLayer>,
    kv_heads: usize,
    /// Tokens that every segment has room for, beside its kept pairs.
    room: usize,
    sequences: Vec<Sequence>,
    /// Tokens that every sequence has read since they were last counted one by one.
    appended: usize,
    /// On each device, for its layers.
    located: PerPart<Located>,
}

/// Where the segments of a part's layers lie, as its device knows it.
#[derive(Debug)]
struct Located {
    /// First row of each segment, its kept pairs and settled tokens passed, i64 `[l, x]`.
    room_start_lx: Tensor,
    /// Kept pairs and settled tokens of each segment, i32 `[l, x]`.
    kept_lx: Tensor,
    /// First row of each segment and the end of the last, i32 `[l, x + 1]`.
    bounds_lx: Tensor,
    /// Position after each context and its settled tokens, evicted or not, f32 `[b]`.
    context_end_b: Tensor,
    /// Workspace of the kernel for one new token per sequence, once it has run.
    space: Option<DecodeSpace>,
    /// The first layer of the part.
    first: usize,
}

/// Packed rows of one layer.
#[derive(Debug)]
struct RaggedLayer {
    /// `[n, d]`, rotary applied.
    keys: Tensor,
    values: Tensor,
    /// Kept pairs of each segment.
    kept: Vec<usize>,
}

/// Lengths and position of one sequence.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    /// Tokens read since the context, as far as sequences were not in step with each other.
    settled: usize,
    /// The position after the context, evicted or not.
    context_end: usize,
}

impl RaggedLayer {
    /// First row of each segment, and the end of the last.
    fn bounds(&self, room: usize) -> Vec<usize> {
        let mut end = 0;
        let mut bounds = vec![0];
        bounds.extend(self.kept.iter().map(|kept| {
            end += kept + room;
            end
        }));
        bounds
    }
}

impl RaggedCache {
    /// Keep the chosen KV pairs of a full cache and give the rest of its memory back.
    ///
    /// One layer at a time: beyond the full cache only one layer's kept pairs are held twice.
    /// `room` is what each KV head can take of further tokens before anything must be moved; it is
    /// rounded up to a block.
    ///
    /// # Shapes
    /// - `keep_lht`: bool `[layers, kv_heads, cache.len()]`, true = keep; any device
    ///
    /// # Errors
    /// The mask is of another shape or kind, or there is no memory for a layer.
    pub fn prune(cache: KvCache, keep_lht: &Tensor, room: usize) -> Result<Self> {
        let (layers, len) = (cache.layers(), cache.len());
        let heads = if layers == 0 { 0 } else { cache.keys(0).size()[0] as usize };
        let expected = [layers as i64, heads as i64, len as i64];
        ensure!(
            keep_lht.size() == expected && keep_lht.kind() == Kind::Bool,
            "expected a bool keep mask of shape {expected:?}, found {:?} of shape {:?}",
            keep_lht.kind(),
            keep_lht.size()
        );
        let kept_lh = keep_lht.sum_dim_intlist(-1, false, Kind::Int64).to_device(Device::Cpu);
        let kept: Vec<Vec<i64>> = Vec::try_from(&kept_lh)?;
        Self::pack(cache, room, |layer, room| {
            let keep_ht = keep_lht.get(layer as i64);
            // Rows of the room are copies of some position: they are overwritten before they are read.
            let room_hr = Tensor::ones([heads as i64, room as i64], (Kind::Bool, keep_ht.device()));
            let chosen_n2 = Tensor::cat(&[&keep_ht, &room_hr], 1).nonzero();
            let position_n = chosen_n2.select(1, 1).clamp_max(len as i64 - 1);
            (chosen_n2.select(1, 0), position_n, kept[layer].iter().map(|n| *n as usize).collect())
        })
    }

    /// All KV pairs of a full cache, in a cache that grows: where nothing may be evicted.
    ///
    /// # Errors
    /// There is no memory for a second copy of one layer.
    pub fn whole(cache: KvCache, room: usize) -> Result<Self> {
        let len = cache.len() as i64;
        Self::pack(cache, room, |_, room| {
            let options = (Kind::Int64, Device::Cpu);
            let rows = len + room as i64;
            (Tensor::empty([0], options), Tensor::arange(rows, options).clamp_max(len - 1), Vec::new())
        })
    }

    /// `choose(layer, room)` names KV head and position of every packed row, and the pairs kept of
    /// each head; no heads at all mean the same positions in all of them.
    fn pack(
        cache: KvCache,
        room: usize,
        choose: impl Fn(usize, usize) -> (Tensor, Tensor, Vec<usize>),
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (len, context_end) = (cache.len(), cache.next_position());
        ensure!(len > 0, "an empty KV cache has nothing to keep");
        let room = room_for(room);
        let (placement, keys, values) = cache.into_layers();
        let heads = keys.first().map_or(0, |k| k.size()[0]) as usize;
        let mut layers = Vec::with_capacity(keys.len());
        for (index, (k_htd, v_htd)) in keys.into_iter().zip(values).enumerate() {
            let (head_n, position_n, kept) = choose(index, room);
            let device = k_htd.device();
            // A head has more rows than positions: caches are allocated in blocks.
            let (rows, d) = (k_htd.size()[1], k_htd.size()[2]);
            let all_heads = kept.is_empty();
            let row_n = if all_heads {
                position_n.to_device(device)
            } else {
                (head_n * rows + position_n).to_device(device)
            };
            let pick = |full_htd: Tensor| -> Result<Tensor> {
                let picked = if all_heads {
                    full_htd.f_index_select(1, &row_n)?.view([-1, d])
                } else {
                    full_htd.view([-1, d]).f_index_select(0, &row_n)?
                };
                Ok(picked)
            };
            let packed = || format!("packing the kept KV pairs of layer {index}");
            // Each full tensor goes as soon as it was read.
            layers.push(RaggedLayer {
                keys: pick(k_htd).with_context(packed)?,
                values: pick(v_htd).with_context(packed)?,
                kept: if all_heads { vec![len; heads] } else { kept },
            });
        }
        Self::assemble(&placement, layers, heads, room, vec![Sequence { settled: 0, context_end }])
    }

    /// Several sequences as one batch, in the order given; they decode together.
    ///
    /// # Errors
    /// There is none, or they are of different models.
    pub fn join(caches: Vec<Self>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let room = caches.iter().map(|c| c.room).max().context("there is no cache to join")?;
        let (n_layers, heads) = (caches[0].layers.len(), caches[0].kv_heads);
        let placement = caches[0].placement().clone();
        let d = |c: &Self| c.layers.first().map(|l| l.keys.size()[1]);
        for c in &caches {
            ensure!(
                c.layers.len() == n_layers
                    && c.kv_heads == heads
                    && d(c) == d(&caches[0])
                    && *c.placement() == placement,
                "caches of different models cannot be one batch: {} layers of {} KV heads, and {n_layers} of {heads}",
                c.layers.len(),
                c.kv_heads
            );
        }
        let mut sequences = Vec::new();
        let mut sources = Vec::new();
        for mut cache in caches {
            cache.set_room(room)?;
            cache.settle();
            sequences.extend_from_slice(&cache.sequences);
            sources.push(cache.layers.into_iter());
        }
        let mut layers = Vec::with_capacity(n_layers);
        for _ in 0..n_layers {
            let parts: Vec<RaggedLayer> = sources.iter_mut().filter_map(Iterator::next).collect();
            let cat = |of: &dyn Fn(&RaggedLayer) -> Tensor| {
                Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0)
            };
            layers.push(RaggedLayer {
                keys: cat(&|p| p.keys.shallow_clone()),
                values: cat(&|p| p.values.shallow_clone()),
                kept: parts.iter().flat_map(|p| p.kept.iter().copied()).collect(),
            });
        }
        Self::assemble(&placement, layers, heads, room, sequences)
    }

    fn assemble(
        placement: &Placement,
        layers: Vec<RaggedLayer>,
        kv_heads: usize,
        room: usize,
        sequences: Vec<Sequence>,
    ) -> Result<Self> {
        let located = placement.each(|part| {
            let nothing = |kind| Tensor::empty([0], (kind, part.device));
            Ok(Located {
                room_start_lx: nothing(Kind::Int64),
                kept_lx: nothing(Kind::Int),
                bounds_lx: nothing(Kind::Int),
                context_end_b: nothing(Kind::Float),
                space: None,
                first: part.layers.start,
            })
        })?;
        let mut cache = Self { layers, kv_heads, room, sequences, appended: 0, located };
        cache.index();
        Ok(cache)
    }

    /// Tell the devices where segments lie.
    fn index(&mut self) {
        let Self { layers, kv_heads, room, sequences, located, .. } = self;
        let ends: Vec<f32> = sequences.iter().map(|s| (s.context_end + s.settled) as f32).collect();
        for (part, located) in located.iter_mut() {
            let (mut starts, mut kept, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
            for layer in &layers[part.layers.clone()] {
                let edges = layer.bounds(*room);
                for (x, before) in layer.kept.iter().enumerate() {
                    let before = before + sequences[x / *kv_heads].settled;
                    starts.push((edges[x] + before) as i64);
                    kept.push(before as i32);
                }
                bounds.extend(edges.iter().map(|edge| *edge as i32));
            }
            let (l, device) = (part.layers.len() as i64, part.device);
            located.room_start_lx = Tensor::from_slice(&starts).view([l, -1]).to_device(device);
            located.kept_lx = Tensor::from_slice(&kept).view([l, -1]).to_device(device);
            located.bounds_lx = Tensor::from_slice(&bounds).view([l, -1]).to_device(device);
            located.context_end_b = Tensor::from_slice(&ends).to_device(device);
        }
    }

    /// Where its layers are.
    pub const fn placement(&self) -> &Placement {
        self.located.placement()
    }

    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Sequences that decode together.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Kept pairs of each segment of a layer: sequence-major, KV heads inside; read tokens not counted.
    pub fn kept(&self, layer: usize) -> &[usize] {
        &self.layers[layer].kept
    }

    /// Kept pairs of all layers, KV heads and sequences.
    pub fn kept_pairs(&self) -> usize {
        self.layers.iter().map(|l| l.kept.iter().sum::<usize>()).sum()
    }

    /// The position that the next token of a sequence gets: how many tokens it has read, evicted or not.
    pub fn next_position(&self, sequence: usize) -> usize {
        self.sequences[sequence].context_end + self.read(sequence)
    }

    /// Tokens that a sequence has read since its context.
    fn read(&self, sequence: usize) -> usize {
        self.sequences[sequence].settled + self.appended
    }

    /// Count what was read in each sequence, so that sequences may differ; [`RaggedCache::index`] tells the
    /// device.
    fn settle(&mut self) {
        let appended = std::mem::take(&mut self.appended);
        self.sequences.iter_mut().for_each(|s| s.settled += appended);
    }

    /// Bytes of keys and values, rooms included.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        self.layers.iter().map(|l| of(&l.keys) + of(&l.values)).sum()
    }

    /// Forget what was read since the contexts, so that the next question meets what the first met.
    pub fn rewind(&mut self) {
        self.appended = 0;
        if self.sequences.iter().any(|s| s.settled > 0) {
            self.sequences.iter_mut().for_each(|s| s.settled = 0);
            self.index();
        }
    }

    /// Make room for `tokens` further tokens of every sequence; nothing if there is room.
    ///
    /// # Errors
    /// The device has no memory for a larger copy of one layer; the cache is then as it was.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let read = (0..self.sequences.len()).map(|b| self.read(b)).max().unwrap_or(0);
        if read + tokens <= self.room {
            return Ok(());
        }
        self.set_room((read + tokens).next_multiple_of(ROOM_BLOCK)).with_context(|| {
            hinted(
                format!(
                    "making room for {tokens} tokens behind {} KV pairs, {} MiB",
                    self.kept_pairs(),
                    self.bytes() >> 20
                ),
                "keep less of the cache (`--retain`), ask shorter questions, or allow shorter answers",
            )
            .environment()
        })
    }

    /// Give all segments `room`, which is not less than they have.
    fn set_room(&mut self, room: usize) -> Result<()> {
        if room <= self.room {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let heads = self.kv_heads;
        let mut grown = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (old, new) = (layer.bounds(self.room), layer.bounds(room));
            let rows = new.last().copied().unwrap_or(0) as i64;
            let wider = |packed: &Tensor| -> Result<Tensor> {
                let out = Tensor::f_empty([rows, packed.size()[1]], (packed.kind(), packed.device()))?;
                for (x, kept) in layer.kept.iter().enumerate() {
                    let used = (kept + self.read(x / heads)) as i64;
                    out.narrow(0, new[x] as i64, used).copy_(&packed.narrow(0, old[x] as i64, used));
                }
                Ok(out)
            };
            grown.push((wider(&layer.keys)?, wider(&layer.values)?));
        }
        for (layer, (keys, values)) in self.layers.iter_mut().zip(grown) {
            (layer.keys, layer.values) = (keys, values);
        }
        self.room = room;
        self.index();
        Ok(())
    }
}
