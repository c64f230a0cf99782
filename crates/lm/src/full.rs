//! Forward pass of one sequence over its full cache, with taps.
//!
//! Dimension key: h KV head, k cached position, q query head, s new token, d head_dim, m hidden.

use anyhow::{Result, ensure};
use pkv_gpu::{Attention, Projected, arranged, attend};
use tch::Tensor;

use crate::cache::KvCache;
use crate::forward::{KvStore, LayerInput};
use crate::model::LanguageModel;
use crate::tap::{LayerView, Tap};

impl LanguageModel {
    /// Read new tokens after those in the cache, and append theirs to it.
    ///
    /// # Shapes
    /// - `ids`: i64 `[s]`, best on the host; ids that are on a GPU already are not checked, because that
    ///   would wait for it
    /// - returns the hidden states after the final norm, `[s, hidden]`, in the model's kind, at home
    ///
    /// # Errors
    /// No room in the cache, an id outside the vocabulary, or the tap's own; the cache is then as long
    /// as before.
    pub fn forward(&self, ids: &Tensor, cache: &mut KvCache, tap: &mut dyn Tap) -> Result<Tensor> {
        let hidden = self.read(ids, cache, tap, true)?;
        Ok(self.finish(&hidden))
    }

    /// Like [`LanguageModel::forward`], for taps alone: the last layer ends after its tap, so there
    /// is neither its attention output nor its feed-forward, and no hidden state to return.
    pub fn forward_for_tap(&self, ids: &Tensor, cache: &mut KvCache, tap: &mut dyn Tap) -> Result<()> {
        self.read(ids, cache, tap, false).map(drop)
    }

    /// The attention of one forward alone, all layers with the same queries, outputs dropped: for benchmarks.
    /// The new tokens' keys are whatever the cache's room holds.
    ///
    /// # Shapes
    /// - `q_sqd`: `[s, query_heads, head_dim]`, kind and device of the cache, which is one
    ///
    /// # Errors
    /// No room in the cache, or a kernel fails.
    pub fn attend_full(&self, q_sqd: &Tensor, cache: &KvCache) -> Result<()> {
        let new = q_sqd.size()[0] as usize;
        cache.check_room(new)?;
        for index in 0..self.layers.len() {
            let (k_hkd, v_hkd) = cache.with_new(index, new);
            let _ = attend(q_sqd, &k_hkd, &v_hkd, cache.len(), false, &self.attention)?;
        }
        Ok(())
    }

    fn read(&self, ids: &Tensor, cache: &mut KvCache, tap: &mut dyn Tap, complete: bool) -> Result<Tensor> {
        ensure!(ids.dim() == 1, "token ids must be one sequence, not of shape {:?}", ids.size());
        let s = ids.numel();
        cache.check_room(s)?;
        ensure!(cache.layers() == self.layers.len(), "the KV cache is of another model");
        let hidden_sm = self.embed(ids)?;
        let first = cache.next_position();
        let rotations = self.ropes.map(|rope| Ok(rope.range(first, s)))?;
        let wants_lse = tap.wants_lse();
        let mut store = FullStore { cache: &mut *cache, tap, wants_lse, s, attention: &self.attention };
        let hidden_sm = self.run(hidden_sm, &rotations, &mut store, complete)?;
        cache.advance(s);
        Ok(hidden_sm)
    }
}

/// A cache, `s` new tokens after what it holds.
struct FullStore<'a> {
    cache: &'a mut KvCache,
    tap: &'a mut dyn Tap,
    wants_lse: bool,
    s: usize,
    attention: &'a Attention,
}

impl KvStore for FullStore<'_> {
    fn attend(&mut self, input: &LayerInput, new: &Projected, wanted: bool) -> Result<Option<Tensor>> {
        let (layer, start) = (input.layer, self.cache.len());
        self.cache.write(layer, &new.k.transpose(0, 1), &new.v.transpose(0, 1));
        let (k_hkd, v_hkd) = self.cache.with_new(layer, self.s);
        let q_sqd = arranged(&new.q);
        let (attended, lse_qs) = match wanted || self.wants_lse {
            true => attend(&q_sqd, &k_hkd, &v_hkd, start, self.wants_lse, self.attention)
                .map(|(out, lse)| (Some(out), lse))?,
            false => (None, None),
        };
        self.tap.layer(&LayerView {
            layer,
            q_qsd: &q_sqd.transpose(0, 1),
            k_hkd: &k_hkd,
            v_hkd: &v_hkd,
            start,
            scale: self.attention.scale,
            hidden_sm: input.hidden,
            normed_sm: input.normed,
            lse_qs: lse_qs.as_ref(),
        })?;
        Ok(attended)
    }
}
