//! Features chunk by chunk, as the proxy reads its context.
//!
//! Not every feature is final before the end. Norms, surprisal and positions settle with their
//! token, the window's channels `window_tokens` later; all others depend on the context's end, or on that of
//! their scoring chunk, and are called final at the context's. With the default
//! channels everything therefore settles at the end; with the window's, norms and globals alone, all
//! but the last `window_tokens` settle while the proxy reads on.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position.

use anyhow::{Result, ensure};
use pkv_core::{Final, GlobalChannel, Pass, hinted};
use pkv_gpu::wants_lse;
use pkv_lm::{Chunks, KvCache, LayerRows, LayerView, NoTap, Tap, prefill_chunk};
use tch::Tensor;

use crate::channels::UnrunReplay;
use crate::extractor::{ContextFeatures, Extractor};
use crate::globals::{Surprisal, globals};
use crate::statistics::{LOG_LIMIT, QueryStatistics};
use crate::tap::FeatureTap;

/// A context that is being read.
pub struct FeatureStream<'e, 'm> {
    extractor: &'e Extractor<'m>,
    /// Prefix and context.
    ids: Vec<u32>,
    chunks: Chunks,
    cache: KvCache,
    statistics: QueryStatistics,
    surprisal: Option<Surprisal>,
    unrun: Option<UnrunReplay>,
    /// Maxima and sums so far, where the layers are. The fused kernel folds into every position, so features
    /// that others read already must not lie here; where none is final before the end, home is `heads_pct`
    /// itself.
    gathered_pct: LayerRows,
    heads_pct: Tensor,
    globals_ct: Tensor,
    settled: usize,
    /// Some features are final before the context's end.
    early: bool,
}

impl<'m> Extractor<'m> {
    /// Begin to read a context, given without the prefix.
    ///
    /// # Errors
    /// The context is empty.
    pub fn stream(&self, context: &[u32]) -> Result<FeatureStream<'_, 'm>> {
        self.stream_with_room(context, 0)
    }

    /// As [`Extractor::stream`], into a cache with room for `capacity` positions, or for the context if that
    /// is less.
    pub(crate) fn stream_with_room(&self, context: &[u32], capacity: usize) -> Result<FeatureStream<'_, 'm>> {
        ensure!(
            !context.is_empty(),
            hinted(
                "an empty context has no features: it has no KV pairs",
                "leave documents without tokens out of the manifest"
            )
        );
        let _no_grad = tch::no_grad_guard();
        let ids = [&self.prefix, context].concat();
        let statistics = QueryStatistics::new(&self.extract, self.prefix.len(), context.len());
        let wanted = self.extract.globals.contains(&GlobalChannel::Surprisal);
        let surprisal = wanted.then(|| Surprisal::new(self.model, &ids, self.prefix.len()));
        let room = || statistics.zeros(self.model.shape().total_kv_heads(), self.model.device());
        let heads_pct = room();
        let at_end = self.extract.channels.iter().any(|c| c.pass().is_final() == Final::AtEnd);
        let moved = self.extract.channels.iter().any(|c| c.pass() == Pass::ScoringChunk);
        let in_pieces = prefill_chunk(0, ids.len(), self.extract.prefill_chunk_tokens).end < ids.len();
        // What is collected from other devices before the end would make them wait for home's chunk.
        let early = in_pieces
            && !at_end
            && !self.model.placement().is_split()
            && statistics.settled(context.len() - 1) > 0;
        Ok(FeatureStream {
            chunks: Chunks::new(ids.len(), self.extract.prefill_chunk_tokens),
            cache: self.model.new_cache(ids.len().max(capacity)),
            gathered_pct: LayerRows::new(
                self.model.placement(),
                if early { room() } else { heads_pct.shallow_clone() },
            )?,
            heads_pct,
            globals_ct: globals(
                &self.extract.globals,
                surprisal.as_ref(),
                context.len(),
                self.model.device(),
            )?,
            extractor: self,
            ids,
            statistics,
            surprisal,
            unrun: moved
                .then(|| UnrunReplay::new(self.model, &self.requests, self.prefix.len(), context.len())),
            settled: 0,
            early,
        })
    }
}

impl FeatureStream<'_, '_> {
    /// Read one prefill chunk; true while there is more to read.
    ///
    /// # Errors
    /// The model fails on it.
    pub fn step(&mut self) -> Result<bool> {
        self.step_beside(&mut NoTap)
    }

    /// As [`FeatureStream::step`]; `beside` sees the chunk, too.
    pub(crate) fn step_beside(&mut self, beside: &mut dyn Tap) -> Result<bool> {
        if self.chunks.is_done() {
            return Ok(false);
        }
        let _no_grad = tch::no_grad_guard();
        let Extractor { model, prefix, extract, hidden, .. } = self.extractor;
        let wants_lse =
            !self.statistics.is_empty() && wants_lse(model.device(), model.kind(), model.shape().head_dim);
        let features = FeatureTap {
            statistics: &self.statistics,
            channels: &extract.channels,
            prefix: prefix.len(),
            hidden: *hidden,
            unrun: self.unrun.as_mut(),
            wants_lse,
            heads_pct: &self.gathered_pct,
        };
        let mut tap = Both { features, beside };
        let Self { ids, chunks, cache, surprisal, .. } = self;
        chunks.read(&mut tap, |chunk, tap| {
            let (start, new) = (chunk.start, model.ids(&ids[chunk]));
            // Where memory ran out after a forward, its tokens are read again.
            cache.truncate(start);
            match surprisal.as_mut() {
                Some(surprisal) => {
                    let hidden_sm = model.forward(&new, cache, tap)?;
                    surprisal.add(model, &hidden_sm, start)
                }
                // Keys and values of the last layer are in the cache all the same.
                None => model.forward_for_tap(&new, cache, tap),
            }
        })?;
        self.settle(self.cache.len())?;
        Ok(!self.chunks.is_done())
    }

    /// Turn what no later token changes into features, once the first `read` ids were read.
    fn settle(&mut self, read: usize) -> Result<()> {
        let prefix = self.extractor.prefix.len();
        let at_end = read == self.ids.len();
        let settled = match at_end || self.early {
            true => self.statistics.settled(read.saturating_sub(prefix)),
            false => 0,
        };
        if settled <= self.settled {
            return Ok(());
        }
        let range = self.settled..settled;
        let part = |all: &Tensor| all.narrow(-1, range.start as i64, range.len() as i64);
        self.gathered_pct.collect(range.clone());
        if self.early {
            part(&self.heads_pct).copy_(&part(self.gathered_pct.home()));
        }
        let shape = self.extractor.model.shape();
        self.statistics.finish_range(&self.heads_pct, shape.kv_heads, shape.group(), range.clone())?;
        if at_end {
            self.extractor.of_keys(&self.cache, &self.heads_pct)?;
            self.extractor.reconstruction(&self.ids[prefix..], &self.cache, &self.heads_pct)?;
        }
        let _ = part(&self.heads_pct).clamp_(-LOG_LIMIT, LOG_LIMIT);
        let row = self.extractor.extract.globals.iter().position(|c| *c == GlobalChannel::Surprisal);
        if let (Some(row), Some(surprisal)) = (row, &self.surprisal) {
            part(&self.globals_ct.get(row as i64)).copy_(&part(&surprisal.nats_t));
        }
        self.settled = settled;
        Ok(())
    }

    /// Context positions whose features are final: those from the first on.
    pub fn settled(&self) -> usize {
        self.settled
    }

    /// `[p, c, t]`, f32; shares memory with the stream, which goes on writing after [`Self::settled`].
    pub fn heads_pct(&self) -> Tensor {
        self.heads_pct.shallow_clone()
    }

    /// `[c, t]`, f32; shares memory as well.
    pub fn globals_ct(&self) -> Tensor {
        self.globals_ct.shallow_clone()
    }

    /// The model's cache of prefix and context, and the features. Final where [`Self::settled`] says so.
    pub fn into_cache_and_features(self) -> (KvCache, ContextFeatures) {
        (self.cache, ContextFeatures { heads_pct: self.heads_pct, globals_ct: self.globals_ct })
    }

    /// The features; the model's cache is dropped. Final where [`Self::settled`] says so.
    pub fn into_features(self) -> ContextFeatures {
        ContextFeatures { heads_pct: self.heads_pct, globals_ct: self.globals_ct }
    }
}

/// Features and a second tap on one forward pass.
struct Both<'a, 'b> {
    features: FeatureTap<'a>,
    beside: &'b mut dyn Tap,
}

impl Tap for Both<'_, '_> {
    fn wants_lse(&self) -> bool {
        self.features.wants_lse() || self.beside.wants_lse()
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.features.layer(view)?;
        self.beside.layer(view)
    }
}
