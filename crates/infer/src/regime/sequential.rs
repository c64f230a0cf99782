//! The proxy's side first, then the target: one device, nothing at the same time.
//!
//! The proxy's cache and features are gone before the target's cache is made, so that the peak is the
//! target's prefill beside the proxy's weights and the scores.

use std::sync::Arc;

use anyhow::Result;

use super::{PrefillInput, Prefilled, Regime, RegimeName};
use crate::lane::Lane;
use crate::proxy::{ScoreSource, Situation};
use crate::timeline::Timeline;
use crate::worker::caught;

/// One after the other.
pub struct Sequential {
    source: Box<dyn ScoreSource>,
}

impl Sequential {
    pub fn new(source: impl ScoreSource + 'static) -> Self {
        Self { source: Box::new(source) }
    }
}

impl Regime for Sequential {
    fn name(&self) -> RegimeName {
        RegimeName::Sequential
    }

    fn prefill(&mut self, context: &PrefillInput) -> Result<Prefilled> {
        context.check()?;
        let timeline = Arc::new(Timeline::new(true));
        let at = Situation {
            timeline: Arc::clone(&timeline),
            lane: Lane::here("proxy", self.source.device())?,
            stop: context.stop.clone(),
        };
        let given = caught(|| self.source.score(context.tokens, &at));
        let lane = Lane::here("target", context.target.device())?;
        let full = timeline.time(&lane, "prefill", || context.prefill_target())?;
        context.finish(full, given, &lane, timeline, 0.0)
    }
}
