//! The prefill tap: writes each layer's features into the feature tensor.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position, h KV head of a layer, d head_dim, s new context position.

use crate::channels::{Compute, NewPositions, UnrunReplay, chosen};
use crate::hidden::HiddenProjection;
use crate::statistics::QueryStatistics;
use anyhow::Result;
use pkv_core::Channel;
use pkv_gpu::Products;
use pkv_lm::{LayerRows, LayerView, Tap};

/// Gathers the channels that one prefill gives.
pub(crate) struct FeatureTap<'a> {
    pub(crate) statistics: &'a QueryStatistics,
    pub(crate) channels: &'a [Channel],
    pub(crate) prefix: usize,
    pub(crate) hidden: Option<&'a HiddenProjection>,
    /// Present if a channel moves the queries of scoring chunks.
    pub(crate) unrun: Option<&'a mut UnrunReplay>,
    /// Do the statistics want the log-sum-exps of queries?
    pub(crate) wants_lse: bool,
    /// `[p, c, t]`, f32.
    pub(crate) heads_pct: &'a LayerRows,
}

impl Tap for FeatureTap<'_> {
    fn wants_lse(&self) -> bool {
        self.wants_lse
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let features_hct = self.heads_pct.layer(view.layer);
        let q_rqd = view.q_qsd.transpose(0, 1);
        let of = Products { q_rqd: &q_rqd, k_hkd: view.k_hkd, scale: view.scale };
        self.statistics.add(of, view.lse_qs, view.start, &features_hct)?;
        let new = NewPositions { view, prefix: self.prefix, hidden: self.hidden };
        let row = |slot: i64, first: usize, n: usize| {
            features_hct.select(1, slot).narrow(1, first as i64, n as i64)
        };
        if new.len() > 0 {
            for (slot, compute) in chosen(self.channels) {
                if let Compute::Layer(compute) = compute {
                    compute(&new, &mut row(slot, new.first() - self.prefix, new.len()))?;
                }
            }
        }
        if let Some(unrun) = &mut self.unrun {
            let channels = self.channels;
            unrun.layer(view, &mut |at, scores| {
                for (slot, compute) in chosen(channels) {
                    if let Compute::ScoringChunk(values) = compute {
                        row(slot, at.start, at.len()).copy_(&values(scores));
                    }
                }
            })?;
        }
        Ok(())
    }
}
