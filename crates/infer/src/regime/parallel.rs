//! The proxy's side beside the target: on streams of one device, or on a device of its own.
//!
//! The source lives in a thread of its own. The target works in the caller's thread on its current
//! stream, so that the cache that it makes is of the same allocator pool as what is made of it.

use std::sync::Arc;

use anyhow::Result;

use super::{PrefillInput, Prefilled, Regime, RegimeName};
use crate::lane::Lane;
use crate::proxy::{ScoreSource, Situation};
use crate::timeline::Timeline;
use crate::worker::Worker;

/// Both at once.
pub struct Parallel {
    name: RegimeName,
    source: Worker<Box<dyn ScoreSource>>,
    /// One stream for all contexts: libtorch's allocator keeps free memory by stream.
    lane: Lane,
}

impl Parallel {
    /// One device for both.
    ///
    /// # Errors
    /// The system has no thread left, or the GPU no stream.
    pub fn streams(source: impl ScoreSource + 'static) -> Result<Self> {
        Self::new(RegimeName::Streams, source)
    }

    /// The source on a device of its own.
    ///
    /// # Errors
    /// The system has no thread left, or the GPU no stream.
    pub fn dual(source: impl ScoreSource + 'static) -> Result<Self> {
        Self::new(RegimeName::Dual, source)
    }

    fn new(name: RegimeName, source: impl ScoreSource + 'static) -> Result<Self> {
        let lane = Lane::beside("proxy", source.device())?;
        Ok(Self { name, source: Worker::new("proxy", Box::new(source) as Box<dyn ScoreSource>)?, lane })
    }
}

impl Regime for Parallel {
    fn name(&self) -> RegimeName {
        self.name
    }

    fn prefill(&mut self, context: &PrefillInput) -> Result<Prefilled> {
        context.check()?;
        let lane = Lane::here("target", context.target.device())?;
        // Weights were loaded on this stream; the other one may read them from here on.
        lane.settle()?;
        let timeline = Arc::new(Timeline::new(false));
        if let tch::Device::Cuda(gpu) = lane.device() {
            pkv_gpu::reset_peak(gpu)?;
        }
        let (proxy_lane, tokens) = (self.lane, context.tokens.to_vec());
        let (shared, stop) = (Arc::clone(&timeline), context.stop.clone());
        let pending = self.source.start(move |source| {
            let _current = proxy_lane.enter()?;
            source.score(&tokens, &Situation { timeline: shared, lane: proxy_lane, stop })
        });
        let full = timeline.time(&lane, "prefill", || context.prefill_target());
        let done = timeline.secs();
        // Also where the target failed: the source must not outlive the call.
        let given = pending.wait();
        let waited = timeline.secs() - done;
        context.finish(full?, given, &lane, timeline, waited)
    }
}
