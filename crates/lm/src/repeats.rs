//! Several independent continuations of one cache in one forward, for a tap alone.
//!
//! Their rows follow each other, so that matrix products are large; each continuation sees the
//! whole cache and itself. Nothing is written to the cache and there is no hidden state to return:
//! this is how a context is repeated to score its KV pairs. [`crate::Branches`] is for continuations
//! that go on, and that hide pairs.
//!
//! Dimension key: r row (all segments in sequence), q query head, h KV head, k cache position,
//! m hidden, d head_dim.

use std::ops::Range;

use anyhow::{Result, ensure};
use pkv_gpu::{Attention, Projected, Segments, add_attention, attend_segments};
use tch::{Kind, Tensor};

use crate::cache::KvCache;
use crate::forward::{KvStore, LayerInput};
use crate::model::LanguageModel;
use crate::placement::PerPart;

/// Called once per layer of [`LanguageModel::forward_repeats`], after rotary.
pub trait RepeatTap {
    /// Is [`RepeatView::own_lse_qr`] needed?
    fn wants_lse(&self) -> bool {
        false
    }

    /// # Errors
    /// The tap's own errors; the forward pass ends with it.
    fn layer(&mut self, view: &RepeatView) -> Result<()>;
}

/// Data of a layer's attention. Views: copy what must outlive the call.
pub struct RepeatView<'a> {
    pub layer: usize,
    /// Queries, rotary applied: `[rows, query_heads, head_dim]`, rows apart by a fixed stride that may
    /// exceed a row. Query heads of one KV head lie together.
    pub q_rqd: &'a Tensor,
    /// The rows' own keys, rotary applied: `[rows, kv_heads, head_dim]`, strided likewise.
    pub k_rhd: &'a Tensor,
    /// The rows' own values: `[rows, kv_heads, head_dim]`, strided likewise.
    pub v_rhd: &'a Tensor,
    /// The cache's keys and values: `[kv_heads, len, head_dim]`, heads apart by the cache's capacity.
    pub k_cache_hkd: &'a Tensor,
    pub v_cache_hkd: &'a Tensor,
    /// Scale of products of queries and keys.
    pub scale: f64,
    /// Natural log-sum-exp of each row's scaled logits over its own segment up to itself, the cache
    /// left out: f32 `[query_heads, rows]`, contiguous. There if the tap wants it.
    pub own_lse_qr: Option<&'a Tensor>,
    /// Rows of each segment.
    pub segments: &'a [Range<usize>],
    /// The layer's input after its norm: `[rows, hidden]`.
    pub normed_rm: &'a Tensor,
}

impl LanguageModel {
    /// Read each of `segments` as if it alone followed the cache, and show it to the tap. The cache
    /// stays as it is; the last layer ends after its tap.
    ///
    /// # Errors
    /// An empty segment, an id outside the vocabulary, or the tap's own.
    pub fn forward_repeats(
        &self,
        segments: &[&[u32]],
        cache: &KvCache,
        tap: &mut dyn RepeatTap,
    ) -> Result<()> {
        ensure!(
            !segments.is_empty() && segments.iter().all(|ids| !ids.is_empty()),
            "there is no token to read"
        );
        ensure!(cache.layers() == self.layers.len(), "the KV cache is of another model");
        let ids = segments.concat();
        let first = cache.next_position();
        let positions: Vec<f32> =
            segments.iter().flat_map(|ids| (first..first + ids.len()).map(|p| p as f32)).collect();
        let (positions, placement) = (Tensor::from_slice(&positions), self.placement());
        let on_each = placement.each(|part| pkv_gpu::upload(&positions, part.device))?;
        let rotations = self.ropes.zip(&on_each, |rope, positions| Ok(rope.at(positions)))?;
        let lengths = || segments.iter().map(|ids| ids.len());
        let segments = placement.each(|part| Segments::new(lengths(), part.device))?;
        let wants_lse = tap.wants_lse();
        let mut store = RepeatStore { cache, segments, tap, wants_lse, attention: &self.attention };
        self.run(self.embed(&self.ids(&ids))?, &rotations, &mut store, false).map(drop)
    }
}

/// A cache that is not changed, and segments that each attend to it and to themselves.
struct RepeatStore<'a> {
    cache: &'a KvCache,
    segments: PerPart<Segments>,
    tap: &'a mut dyn RepeatTap,
    wants_lse: bool,
    attention: &'a Attention,
}

impl KvStore for RepeatStore<'_> {
    fn attend(&mut self, input: &LayerInput, new: &Projected, wanted: bool) -> Result<Option<Tensor>> {
        let segments = self.segments.of(input.layer);
        let own = match wanted || self.wants_lse {
            true => Some(attend_segments(&new.q, &new.k, &new.v, segments, self.attention)?),
            false => None,
        };
        // A copy, because the rectangle is added in place.
        let own_lse_qr = own.as_ref().filter(|_| self.wants_lse).map(|own| {
            let lse = own.lse_qr.to_kind(Kind::Float);
            if wanted { lse.copy() } else { lse.contiguous() }
        });
        let (k_cache_hkd, v_cache_hkd) = (self.cache.keys(input.layer), self.cache.values(input.layer));
        self.tap.layer(&RepeatView {
            layer: input.layer,
            q_rqd: &new.q,
            k_rhd: &new.k,
            v_rhd: &new.v,
            k_cache_hkd: &k_cache_hkd,
            v_cache_hkd: &v_cache_hkd,
            scale: self.attention.scale,
            own_lse_qr: own_lse_qr.as_ref(),
            segments: &segments.ranges,
            normed_rm: input.normed,
        })?;
        let Some(mut own) = own.filter(|_| wanted) else { return Ok(None) };
        add_attention(&mut own, &new.q, &k_cache_hkd, &v_cache_hkd, self.attention)?;
        Ok(Some(own.out_rqd))
    }
}
