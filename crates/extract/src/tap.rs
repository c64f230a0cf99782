//! What prefill shows of each layer, written into the feature tensor as it passes.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position, h KV head of a layer, d head_dim.

use anyhow::{Context, Result};
use pkv_core::Channel;
use pkv_gpu::{has_elementwise, log_norms};
use pkv_lm::{LayerView, Tap};
use tch::{Kind, Tensor};

use crate::hidden::{HiddenProjection, of_context};
use crate::statistics::QueryStatistics;

/// Values shorter than this have the same feature: proxies zero some out entirely.
const VALUE_NORM_FLOOR: f64 = 1e-4;

/// Gathers the channels that one prefill gives.
pub(crate) struct FeatureTap<'a> {
    pub(crate) statistics: &'a QueryStatistics,
    pub(crate) channels: &'a [Channel],
    pub(crate) prefix: usize,
    pub(crate) hidden: Option<&'a HiddenProjection>,
    /// Do the fused kernels serve on this device, in this kind?
    pub(crate) fused: bool,
    /// `[p, c, t]`, f32.
    pub(crate) heads_pct: &'a Tensor,
}

impl Tap for FeatureTap<'_> {
    fn wants_lse(&self) -> bool {
        self.fused && !self.statistics.is_empty()
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let heads = view.k_hkd.size()[0];
        let features_hct = self.heads_pct.narrow(0, view.layer as i64 * heads, heads);
        match view.lse_qs {
            Some(lse_qs) if self.fused => {
                let q_rqd = view.q_qsd.transpose(0, 1);
                self.statistics.add_fused(&q_rqd, view.k_hkd, lse_qs, view.start, &features_hct)?;
            }
            _ => self.statistics.add(view.q_qsd, view.k_hkd, view.start, &features_hct)?,
        }
        self.norms(view, Channel::KeyNorm, view.k_hkd, f64::MIN_POSITIVE, &features_hct)?;
        self.norms(view, Channel::ValueNorm, view.v_hkd, VALUE_NORM_FLOOR, &features_hct)?;
        self.projected(view, &features_hct)
    }
}

impl FeatureTap<'_> {
    /// The map of the layer's hidden states, if its channel is chosen.
    fn projected(&self, view: &LayerView, features_hct: &Tensor) -> Result<()> {
        let Some(slot) = self.channels.iter().position(|c| *c == Channel::HiddenLinear) else {
            return Ok(());
        };
        let hidden = self.hidden.context("the projection of hidden states is absent")?;
        let _no_grad = tch::no_grad_guard();
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        let first = (view.start.max(self.prefix) - self.prefix) as i64;
        let projected_hs = hidden.layer(view.layer, &x_sm);
        features_hct.select(1, slot as i64).narrow(1, first, x_sm.size()[0]).copy_(&projected_hs);
        Ok(())
    }

    /// Log norms of the new context positions' keys or values, if the channel is chosen.
    fn norms(
        &self,
        view: &LayerView,
        channel: Channel,
        vectors_hkd: &Tensor,
        floor: f64,
        features_hct: &Tensor,
    ) -> Result<()> {
        let Some(slot) = self.channels.iter().position(|c| *c == channel) else { return Ok(()) };
        let _no_grad = tch::no_grad_guard();
        let from = view.start.max(self.prefix);
        let n = vectors_hkd.size()[1] - from as i64;
        if n <= 0 {
            return Ok(());
        }
        let new_htd = vectors_hkd.narrow(1, from as i64, n);
        let mut to_ht = features_hct.select(1, slot as i64).narrow(1, (from - self.prefix) as i64, n);
        if has_elementwise(new_htd.device(), new_htd.kind(), new_htd.size()[2]) {
            return log_norms(&new_htd, floor, &to_ht);
        }
        let norms_ht = new_htd.to_kind(Kind::Float).norm_scalaropt_dim(2.0, [-1i64], false);
        to_ht.copy_(&norms_ht.clamp_min(floor).log());
        Ok(())
    }
}
