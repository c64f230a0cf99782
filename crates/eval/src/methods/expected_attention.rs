//! Expected Attention: the attention that the next queries are expected to pay, from the statistics of those
//! so far.
//!
//! Queries before their rotation are taken for draws from one normal distribution per head. Rotated to the
//! positions that come next and averaged over them, its mean and covariance give the expected attention
//! weight of every key. Both are sums over positions, so a [`QueryMoments`] needs one matrix per head however
//! long the context is.
//!
//! Dimension key: q query head, h KV head, g query heads per KV head, s new token, k cached position (prefix
//! and context, sinks left out), d and e head_dim, t context position.

use anyhow::{Result, ensure};
use pkv_lm::{LayerView, RopeConfig, Tap};
use pkv_recipe::MethodName;
use tch::{Device, Kind, Tensor};

use super::method::{Method, Needs, Ready, Watch};
use super::view::ContextView;

pub const METHOD: Method = Method {
    name: MethodName::of("expected-attention"),
    meaning: "the attention that later queries are expected to pay, if they are distributed as those of the context are, \
              times the value's norm",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: ("tests/goldens/make_goldens.py", "\"expected-attention\""),
    start: |setup| {
        let (rope, head_dim) =
            (setup.target.model.config().rope.clone(), setup.target.model.shape().head_dim);
        Ready::watches(move || QueryMoments { rope: rope.clone(), head_dim, layers: Vec::new() }).start()
    },
};

/// Positions after the context that queries are expected at.
const FUTURE: i64 = 512;
/// First positions, of the prefix where there is one: always kept, and neither their queries nor their keys
/// count.
const SINKS: i64 = 4;

/// Sums over the queries of a context, before their rotation.
struct QueryMoments {
    rope: RopeConfig,
    head_dim: usize,
    layers: Vec<Moments>,
}

/// Of one layer, f64.
struct Moments {
    queries: i64,
    /// Scale of products of queries and keys.
    scale: f64,
    sum_qd: Tensor,
    sum_qde: Tensor,
}

impl Tap for QueryMoments {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let skipped = (SINKS - view.start as i64).clamp(0, view.q_qsd.size()[1]);
        let queries = view.q_qsd.size()[1] - skipped;
        let rotated_qsd = view.q_qsd.narrow(1, skipped, queries).to_kind(Kind::Float);
        let plain_qsd = self.unrotated(&rotated_qsd, view.start as i64 + skipped).to_kind(Kind::Double);
        let sum_qd = plain_qsd.sum_dim_intlist(1, false, Kind::Double);
        let sum_qde = plain_qsd.transpose(1, 2).matmul(&plain_qsd);
        match self.layers.get_mut(view.layer) {
            Some(moments) => {
                moments.queries += queries;
                moments.sum_qd += sum_qd;
                moments.sum_qde += sum_qde;
            }
            None => {
                ensure!(view.layer == self.layers.len(), "layer {} came out of order", view.layer);
                self.layers.push(Moments { queries, scale: view.scale, sum_qd, sum_qde });
            }
        }
        Ok(())
    }
}

impl QueryMoments {
    /// Cosine and sine at each of `positions` from `first` on, f32 `[positions, head_dim / 2]`; the same
    /// numbers that the model rotates by.
    fn rotation(&self, first: i64, positions: i64, device: Device) -> [Tensor; 2] {
        let frequencies_d =
            Tensor::from_slice(&self.rope.frequencies(self.head_dim)).to_kind(Kind::Float).to_device(device);
        let at_s1 = Tensor::arange_start(first, first + positions, (Kind::Float, device)).unsqueeze(-1);
        let angles_sd = at_s1 * frequencies_d;
        [angles_sd.cos(), angles_sd.sin()]
    }

    /// Queries as they were before their rotation, `first` being the position of the first.
    fn unrotated(&self, q_qsd: &Tensor, first: i64) -> Tensor {
        let [cos_sd, sin_sd] = self.rotation(first, q_qsd.size()[1], q_qsd.device());
        let half = q_qsd.size()[2] / 2;
        let (x, y) = (q_qsd.narrow(2, 0, half), q_qsd.narrow(2, half, half));
        let back = Tensor::cat(&[&x * &cos_sd + &y * &sin_sd, &y * &cos_sd - &x * &sin_sd], 2);
        // YaRN's factor was multiplied in with the rotation.
        back / self.rope.attention_factor()
    }

    /// The mean rotation over the positions from `first` on, f64 `[d, e]`: a query times its transpose is
    /// rotated.
    fn mean_rotation(&self, first: i64, device: Device) -> Tensor {
        let factor = self.rope.attention_factor();
        let [cos_dd, sin_dd] = self.rotation(first, FUTURE, device).map(|x| {
            (x.to_kind(Kind::Double).mean_dim([0].as_slice(), false, Kind::Double) * factor).diag(0)
        });
        let upper = Tensor::cat(&[&cos_dd, &sin_dd.neg()], 1);
        Tensor::cat(&[upper, Tensor::cat(&[&sin_dd, &cos_dd], 1)], 0)
    }
}

impl Watch for QueryMoments {
    /// # Shapes
    /// - returns `[layers, KV heads, context positions]`, f32
    fn scores(self: Box<Self>, view: &ContextView) -> Result<Tensor> {
        let (cache, prefix) = view.prefilled()?;
        ensure!(!self.layers.is_empty(), "Expected Attention needs a prefill to look at");
        let (cached, sinks) = (cache.len() as i64, SINKS.min(cache.len() as i64));
        let rotations = cache.placement().each(|part| Ok(self.mean_rotation(cached, part.device)))?;
        let layer = |(index, moments): (usize, &Moments)| {
            let [k_hkd, v_hkd] =
                [cache.keys(index), cache.values(index)].map(|x| x.narrow(1, sinks, cached - sinks));
            let scores_hk = moments.scores(rotations.of(index), &k_hkd, &v_hkd)?;
            // Sinks come before all others of the layer.
            let most = if scores_hk.numel() > 0 { scores_hk.max().double_value(&[]) } else { 0.0 };
            let size = [scores_hk.size()[0], sinks];
            let sinks_hk = Tensor::full(size, most + 1.0, (Kind::Float, scores_hk.device()));
            Ok(Tensor::cat(&[sinks_hk, scores_hk], 1).narrow(1, prefix as i64, cached - prefix as i64))
        };
        let layers = self.layers.iter().enumerate().map(layer).collect::<Result<Vec<_>>>()?;
        Ok(cache.placement().stack(&layers))
    }
}

impl Moments {
    /// Scores of one layer's keys.
    ///
    /// The expected weight of key k is exp(s mean . k + s^2 k' covariance k / 2), s being the scale of
    /// products, relative to all keys; its mean over a KV head's query heads is multiplied with the value's
    /// norm.
    ///
    /// # Shapes
    /// - `rotation_de`: f64, the mean rotation of later positions
    /// - `k_hkd`, `v_hkd`: the cache without its sinks, rotary applied to keys
    /// - returns f32 `[KV heads, k]`
    ///
    /// # Source
    /// Expected Attention (arXiv 2510.00636); `presses/expected_attention_press.py` in NVIDIA/kvpress 0.5.5
    /// with its defaults (512 positions, 4 sinks, covariance, value norms, epsilon 0). Differs: queries are
    /// rotated back by the angles that the model rotated them by instead of projected a second time, moments
    /// are f64 and summed chunk by chunk, all else is f32 whatever the model's kind; a context of sinks alone
    /// is kept, where kvpress stops.
    fn scores(&self, rotation_de: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor) -> Result<Tensor> {
        let (kv_heads, keys, _) = k_hkd.size3()?;
        if keys == 0 {
            return Ok(Tensor::zeros([kv_heads, 0], (Kind::Float, k_hkd.device())));
        }
        ensure!(self.queries > 0, "no query was seen");
        let (groups, scale) = (self.sum_qd.size()[0] / kv_heads, self.scale);
        let mean_qd = &self.sum_qd / self.queries as f64;
        let covariance_qde =
            &self.sum_qde / self.queries as f64 - mean_qd.unsqueeze(2) * mean_qd.unsqueeze(1);
        let back_de = rotation_de.transpose(0, 1);
        let mean_qd = (mean_qd.matmul(&back_de) * scale).to_kind(Kind::Float);
        let covariance_qde = (rotation_de.matmul(&covariance_qde.matmul(&back_de)) * (scale * scale / 2.0))
            .to_kind(Kind::Float);
        // A KV head at a time: the products are as large as its keys for each query head.
        let head = |h: i64| {
            let k_kd = k_hkd.get(h).to_kind(Kind::Float);
            let mean_gd = mean_qd.narrow(0, h * groups, groups);
            let spread_gkd = k_kd.matmul(&covariance_qde.narrow(0, h * groups, groups)) * &k_kd;
            let logits_gk =
                mean_gd.matmul(&k_kd.transpose(0, 1)) + spread_gkd.sum_dim_intlist(-1, false, Kind::Float);
            let norm_k = v_hkd.get(h).to_kind(Kind::Float).norm_scalaropt_dim(2, [-1], false);
            logits_gk.softmax(-1, Kind::Float).mean_dim([0].as_slice(), false, Kind::Float) * norm_k
        };
        Ok(Tensor::stack(&(0..kv_heads).map(head).collect::<Vec<_>>(), 0))
    }
}
