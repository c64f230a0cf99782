//! `[loss]`: the multi-granularity hybrid loss.

use anyhow::{Context, Result, ensure};
use pkv_core::RetentionRatio;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Weights of the five terms; a weight of 0 turns a term off.
///
/// Defaults are the lean set: on the tiny pair the rank, mass and cosine terms showed no gain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LossSection {
    /// Multi-ratio binary cross-entropy: best recall at 1-2% kept.
    pub binary: f64,
    /// Its retention ratios.
    pub binary_ratios: Vec<f64>,
    /// Value-weighted squared error on standardized log-odds.
    pub value_mse: f64,
    /// Logistic pair-wise rank loss inside the top of each context.
    pub fine: f64,
    /// Sampling of the `fine` term.
    pub fine_pairs: FineLoss,
    /// Mass-aware global rank: cross-entropy of normalized scores and a softmax of predictions.
    pub global: f64,
    /// 1 - cosine of predicted and true scores.
    pub cosine: f64,
}

/// Sampling of the `fine` term.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FineLoss {
    /// Share of a context's KV pairs that counts as its top.
    pub top: f64,
    /// Random pairs per context and step.
    pub pairs: usize,
}

impl Default for FineLoss {
    fn default() -> Self {
        Self { top: 0.2, pairs: 4096 }
    }
}

impl Default for LossSection {
    fn default() -> Self {
        Self {
            binary: 1.0,
            binary_ratios: vec![0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01],
            value_mse: 0.3,
            fine: 0.0,
            fine_pairs: FineLoss::default(),
            global: 0.0,
            cosine: 0.0,
        }
    }
}

impl LossSection {
    pub(crate) fn check(&self) -> Result<()> {
        let weights = [
            ("binary", self.binary),
            ("value_mse", self.value_mse),
            ("fine", self.fine),
            ("global", self.global),
            ("cosine", self.cosine),
        ];
        for (name, w) in weights {
            ensure!(w >= 0.0 && w.is_finite(), "`loss.{name}` is {w}; a weight is 0 or more");
        }
        ensure!(
            weights.iter().any(|(_, w)| *w > 0.0),
            "every term of `loss` is off; nothing would be learnt"
        );
        ensure!(self.binary == 0.0 || !self.binary_ratios.is_empty(), "`loss.binary_ratios` is empty");
        for (i, &r) in self.binary_ratios.iter().enumerate() {
            RetentionRatio::new(r).with_context(|| format!("`loss.binary_ratios[{i}]` is {r}"))?;
            ensure!(r < 1.0, "`loss.binary_ratios[{i}]` is 1: keeping everything teaches nothing");
        }
        let top = self.fine_pairs.top;
        ensure!(top > 0.0 && top <= 1.0, "`loss.fine_pairs.top` is {top}; it is a share, 0 < top <= 1");
        ensure!(self.fine_pairs.pairs > 0, "`loss.fine_pairs.pairs` is 0");
        Ok(())
    }
}
