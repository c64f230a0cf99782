//! How well a prediction agrees with KVzip's scores.
//!
//! At a budget: [`KeptAgreement`] of two keep masks. Over the whole ranking: Spearman's and
//! Kendall's coefficients per KV head, and the squared correlation with KVzip's log scores, computed in f64 on the CPU so that
//! they are exact.

mod log_r2;
mod rank;
mod reference;

use anyhow::{Result, ensure};
use pkv_core::{Policy, RetentionRatio};
use tch::{Device, Kind, Tensor};

use crate::{keep_mask, token_scores};
pub use log_r2::{LOG_FLOOR, log_r2};
pub use rank::{average_ranks, kendall_tau_b, spearman};
pub use reference::{Agreement, Budgets, Reference};

/// Two keep masks of one budget: the prediction's beside KVzip's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KeptAgreement {
    /// |kept by both| / |kept by KVzip|.
    pub recall: f64,
    /// Share of the sum of all of KVzip's scores that the prediction keeps.
    pub mass: f64,
    /// The same, over the share that KVzip itself keeps.
    pub mass_of_oracle: f64,
    /// Kept / all KV pairs, after rounding to whole pairs.
    pub realised_ratio: f64,
}

impl KeptAgreement {
    /// Prune by `predicted_lht` and by `oracle_lht`, and compare.
    ///
    /// # Shapes
    /// - `predicted_lht`, `oracle_lht`: `[.., positions]`, higher means keep, on any scale
    /// - `mass_lht`: the same, KVzip's raw scores in [0, 1]: what mass is counted in
    ///
    /// # Errors
    /// The shapes differ, or there is no KV pair.
    pub fn new(
        predicted_lht: &Tensor,
        oracle_lht: &Tensor,
        mass_lht: &Tensor,
        policy: Policy,
        ratio: RetentionRatio,
    ) -> Result<Self> {
        Ok(Self::at_ratios(predicted_lht, oracle_lht, mass_lht, policy, &[ratio])?.remove(0))
    }

    /// [`Self::new`] at every one of `ratios`; what they share is computed once.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn at_ratios(
        predicted_lht: &Tensor,
        oracle_lht: &Tensor,
        mass_lht: &Tensor,
        policy: Policy,
        ratios: &[RetentionRatio],
    ) -> Result<Vec<Self>> {
        same_shape(predicted_lht, oracle_lht)?;
        same_shape(mass_lht, oracle_lht)?;
        let mass_lht = mass_lht.to_kind(Kind::Double);
        if policy == Policy::Token {
            // All heads keep the same positions: one row of positions tells all there is, and ranks every head once.
            let positions = mass_lht.size().last().copied().unwrap_or(1);
            let mass_t = mass_lht.reshape([-1, positions]).sum_dim_intlist(0, false, Kind::Double);
            let (ours_t, theirs_t) = (token_scores(predicted_lht), token_scores(oracle_lht));
            return Ok(Self::of_rows(&ours_t, &theirs_t, &mass_t, Policy::Pair, ratios));
        }
        Ok(Self::of_rows(predicted_lht, oracle_lht, &mass_lht, policy, ratios))
    }

    fn of_rows(
        predicted: &Tensor,
        oracle: &Tensor,
        mass: &Tensor,
        policy: Policy,
        ratios: &[RetentionRatio],
    ) -> Vec<Self> {
        let at = |&ratio: &RetentionRatio| {
            let (ours, theirs) = (keep_mask(predicted, policy, ratio), keep_mask(oracle, policy, ratio));
            let (kept, of) = (self::mass(mass, &ours), self::mass(mass, &theirs));
            Self {
                recall: recall(&ours, &theirs),
                mass: kept,
                mass_of_oracle: if of > 0.0 { kept / of } else { 0.0 },
                realised_ratio: realised_ratio(&ours),
            }
        };
        ratios.iter().map(at).collect()
    }
}

/// |kept by both| / |kept by the oracle|; masks of equal shape, bool. 0 if the oracle keeps nothing.
pub fn recall(keep: &Tensor, oracle_keep: &Tensor) -> f64 {
    let both = count(&keep.logical_and(oracle_keep));
    if both == 0.0 { 0.0 } else { both / count(oracle_keep) }
}

/// Share of the sum of `scores` (raw, not log-odds) under the mask `keep`; summed in f64. 0 if the sum is.
pub fn mass(scores: &Tensor, keep: &Tensor) -> f64 {
    let scores = scores.to_kind(Kind::Double);
    let total = scores.sum(Kind::Double).double_value(&[]);
    let kept = scores.where_self(keep, &scores.zeros_like()).sum(Kind::Double).double_value(&[]);
    if total > 0.0 { kept / total } else { 0.0 }
}

/// Kept / all of a mask; 0 of an empty one.
pub fn realised_ratio(keep: &Tensor) -> f64 {
    if keep.numel() == 0 { 0.0 } else { count(keep) / keep.numel() as f64 }
}

/// Spearman's coefficient of every KV head, in flat order.
///
/// # Shapes
/// - `a_lht`, `b_lht`: `[.., positions]`, any float kind, any device
///
/// # Errors
/// The shapes differ, or there is no KV pair.
pub fn spearman_per_head(a_lht: &Tensor, b_lht: &Tensor) -> Result<Vec<f64>> {
    per_head(a_lht, b_lht, spearman)
}

/// Kendall's tau-b of every KV head, in flat order; as [`spearman_per_head`].
pub fn kendall_per_head(a_lht: &Tensor, b_lht: &Tensor) -> Result<Vec<f64>> {
    per_head(a_lht, b_lht, kendall_tau_b)
}

fn per_head(a_lht: &Tensor, b_lht: &Tensor, f: fn(&[f32], &[f32]) -> f64) -> Result<Vec<f64>> {
    same_shape(a_lht, b_lht)?;
    let positions = a_lht.size().last().copied().unwrap_or(1) as usize;
    let rows = |t: &Tensor| -> Result<Vec<f32>> {
        Ok(Vec::try_from(t.detach().to_device(Device::Cpu).to_kind(Kind::Float).reshape([-1]))?)
    };
    let (a, b) = (rows(a_lht)?, rows(b_lht)?);
    Ok(a.chunks(positions).zip(b.chunks(positions)).map(|(a, b)| f(a, b)).collect())
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    ensure!(a.size() == b.size(), "comparing scores of shape {:?} with scores of {:?}", a.size(), b.size());
    ensure!(a.numel() > 0, "comparing scores of shape {:?}, which hold no KV pair", a.size());
    Ok(())
}

fn count(mask: &Tensor) -> f64 {
    mask.sum(Kind::Int64).int64_value(&[]) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_gpu::DeviceChoice;

    #[test]
    fn agreement_counts_pairs_and_mass() {
        let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
        let tensor = |x: &[f32]| Tensor::from_slice(x).reshape([1, 2, 4]).to(device);
        let oracle = tensor(&[0.9, 0.1, 0.0, 0.5, 0.3, 0.2, 0.0, 0.0]);
        let predicted = tensor(&[9.0, 8.0, -1.0, 0.0, 5.0, 0.0, 7.0, -2.0]);
        let half = RetentionRatio::new(0.5).unwrap();
        let got = KeptAgreement::new(&predicted, &oracle, &oracle, Policy::Pair, half).unwrap();
        // KVzip keeps 0 3 4 5, the prediction 0 1 4 6.
        assert_eq!((got.recall, got.realised_ratio), (0.5, 0.5));
        assert!((got.mass - 1.3 / 2.0).abs() < 1e-6, "{got:?}");
        assert!((got.mass_of_oracle - 1.3 / 1.9).abs() < 1e-6, "{got:?}");
        let own = KeptAgreement::new(&oracle, &oracle, &oracle, Policy::Token, half).unwrap();
        assert_eq!((own.recall, own.mass_of_oracle), (1.0, 1.0));
        assert!(
            KeptAgreement::new(&predicted.reshape([2, 4]), &oracle, &oracle, Policy::Pair, half).is_err()
        );
    }

    #[test]
    fn what_is_computed_once_equals_whole_masks() {
        tch::manual_seed(3);
        let random = || Tensor::rand([3, 2, 50], (Kind::Float, Device::Cpu));
        let (predicted, oracle) = (random(), random());
        let ratios = [0.5, 0.1, 0.02].map(|r| RetentionRatio::new(r).unwrap());
        for policy in Policy::OF_SCORES {
            let got = KeptAgreement::at_ratios(&predicted, &oracle, &oracle, policy, &ratios).unwrap();
            for (got, &ratio) in got.iter().zip(&ratios) {
                let (ours, theirs) =
                    (keep_mask(&predicted, policy, ratio), keep_mask(&oracle, policy, ratio));
                let (kept, of) = (mass(&oracle, &ours), mass(&oracle, &theirs));
                assert_eq!(got.recall, recall(&ours, &theirs), "{policy:?}");
                assert_eq!(got.realised_ratio, realised_ratio(&ours), "{policy:?}");
                assert!((got.mass - kept).abs() < 1e-12 && (got.mass_of_oracle - kept / of).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn heads_are_ranked_on_their_own() {
        let a = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 3.0, 2.0, 1.0]).reshape([1, 2, 3]);
        let b = Tensor::from_slice(&[10.0f32, 20.0, 30.0, 10.0, 20.0, 30.0]).reshape([1, 2, 3]);
        assert_eq!(spearman_per_head(&a, &b).unwrap(), [1.0, -1.0]);
        assert_eq!(kendall_per_head(&a, &b).unwrap(), [1.0, -1.0]);
        assert!(spearman_per_head(&a, &b.reshape([3, 2])).is_err());
    }
}
