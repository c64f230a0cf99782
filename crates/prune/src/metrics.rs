//! Agreement of a prediction with KVzip's scores.
//!
//! At a budget: [`KeptAgreement`] of two keep masks, the one definition for validations and evaluations. Over
//! the whole ranking: Spearman's and Kendall's coefficients per KV head, and the squared correlation with
//! KVzip's log scores, computed in f64 on the CPU, or by exact counts where the scores are ([`HeadRanks`]).

mod log_r2;
mod rank;
mod reference;

use anyhow::{Result, ensure};
use pkv_core::{Policy, RetentionRatio};
use tch::{Device, Kind, Tensor};

use crate::{keep_mask, token_scores};
pub use log_r2::{LOG_FLOOR, log_r2, log_r2_of, log_scores};
pub use rank::{average_ranks, kendall_tau_b, spearman};
pub use reference::{Agreement, Budgets, HeadRanks, Reference};

/// Two keep masks of one budget: the prediction's beside KVzip's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KeptAgreement {
    /// |kept by both| / |kept by KVzip|.
    pub recall: f64,
    /// Share of the sum of all of KVzip's scores that the prediction keeps.
    pub mass: f64,
    /// The same, over the share that KVzip itself keeps. Where KVzip keeps no mass there is none to lose: 1,
    /// as KVzip's own ranking has everywhere.
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
            // All heads keep the same positions: one row of positions tells all there is, and ranks every
            // head once.
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
            OracleKept::new(keep_mask(oracle, policy, ratio), mass)
                .agreement(&keep_mask(predicted, policy, ratio))
        };
        ratios.iter().map(at).collect()
    }

    fn of(sums: &Sums) -> Self {
        let s = sums;
        let (mass, of) = (share(s.mass, s.all_mass), share(s.oracle_mass, s.all_mass));
        Self {
            recall: share(s.both, s.oracle_kept),
            mass,
            mass_of_oracle: if of > 0.0 { mass / of } else { 1.0 },
            realised_ratio: share(s.kept, s.pairs),
        }
    }
}

/// Counts and sums of a comparison, before any quotient.
struct Sums {
    /// KV pairs: kept by both, by the prediction, by KVzip, and all.
    both: f64,
    kept: f64,
    oracle_kept: f64,
    pairs: f64,
    /// KVzip's scores: of the pairs that the prediction keeps, that KVzip keeps, and of all.
    mass: f64,
    oracle_mass: f64,
    all_mass: f64,
}

/// KV pairs that KVzip keeps of a context at one budget, to compare predictions' masks with.
#[derive(Debug)]
pub struct OracleKept {
    keep: Tensor,
    /// KVzip's raw scores, f64.
    mass: Tensor,
    kept: f64,
    kept_mass: f64,
    all_mass: f64,
}

impl OracleKept {
    /// # Shapes
    /// - `keep`: KVzip's mask, bool; `mass`: its raw scores, the same shape
    pub fn new(keep: Tensor, mass: &Tensor) -> Self {
        let mass = mass.to_kind(Kind::Double);
        let all_mass = mass.sum(Kind::Double).double_value(&[]);
        let (kept, kept_mass) = (count(&keep), under(&mass, &keep).double_value(&[]));
        Self { keep, mass, kept, kept_mass, all_mass }
    }

    pub const fn keep(&self) -> &Tensor {
        &self.keep
    }

    /// A prediction's mask beside KVzip's, of the same shape.
    pub fn agreement(&self, keep: &Tensor) -> KeptAgreement {
        KeptAgreement::of(&Sums {
            both: count(&keep.logical_and(&self.keep)),
            kept: count(keep),
            oracle_kept: self.kept,
            pairs: keep.numel() as f64,
            mass: under(&self.mass, keep).double_value(&[]),
            oracle_mass: self.kept_mass,
            all_mass: self.all_mass,
        })
    }
}

/// 0 of nothing.
fn share(part: f64, of: f64) -> f64 {
    if of > 0.0 { part / of } else { 0.0 }
}

/// The sum of `mass` (f64) under a mask.
fn under(mass: &Tensor, keep: &Tensor) -> Tensor {
    mass.where_self(keep, &mass.zeros_like()).sum(Kind::Double)
}

/// |kept by both| / |kept by the oracle|; masks of equal shape, bool. 0 if the oracle keeps nothing.
pub fn recall(keep: &Tensor, oracle_keep: &Tensor) -> f64 {
    share(count(&keep.logical_and(oracle_keep)), count(oracle_keep))
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

    /// Which of a policy's competitors are kept, as plainly as it can be said: the best `count` of each
    /// group, of equal ones the first.
    fn naive_mask(scores: &[f64], heads: usize, policy: Policy, ratio: RetentionRatio) -> Vec<bool> {
        let positions = scores.len() / heads;
        let better = |scores: &[f64], i: usize| {
            let before = |j: usize| scores[j] > scores[i] || (scores[j] == scores[i] && j < i);
            (0..scores.len()).filter(|&j| before(j)).count()
        };
        let top = |scores: &[f64]| -> Vec<bool> {
            let count = ratio.count(scores.len());
            (0..scores.len()).map(|i| better(scores, i) < count).collect()
        };
        match policy {
            Policy::Pair => top(scores),
            Policy::PairFloor => {
                let place = |i: usize| {
                    let head = &scores[i / positions * positions..][..positions];
                    (better(scores, i) + 1).min(5 * heads * (better(head, i % positions) + 1))
                };
                top(&(0..scores.len()).map(|i| -(place(i) as f64)).collect::<Vec<_>>())
            }
            Policy::PairUniform => scores.chunks(positions).flat_map(top).collect(),
            Policy::Token => {
                let of_position = |t: usize| -> f64 {
                    let ranks = |h: usize| {
                        let row = &scores[h * positions..][..positions];
                        row.iter().filter(|&&x| x < row[t]).count() as f64
                            + row.iter().filter(|&&x| x == row[t]).count() as f64 / 2.0
                    };
                    (0..heads).map(ranks).sum()
                };
                let kept = top(&(0..positions).map(of_position).collect::<Vec<_>>());
                (0..heads).flat_map(|_| kept.clone()).collect()
            }
            Policy::PairBudget | Policy::PairKeydiff => unreachable!("not among those of scores"),
        }
    }

    /// [`KeptAgreement`] by its words, pair by pair in f64.
    fn naive(ours: &[bool], theirs: &[bool], mass: &[f64]) -> KeptAgreement {
        let (mut both, mut kept, mut oracle, mut ours_mass, mut oracle_mass, mut all) =
            (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for ((&a, &b), m) in ours.iter().zip(theirs).zip(mass) {
            all += m;
            if a {
                (kept, ours_mass) = (kept + 1.0, ours_mass + m);
            }
            if b {
                (oracle, oracle_mass) = (oracle + 1.0, oracle_mass + m);
            }
            if a && b {
                both += 1.0;
            }
        }
        KeptAgreement {
            recall: both / oracle,
            mass: if all == 0.0 { 0.0 } else { ours_mass / all },
            mass_of_oracle: if oracle_mass == 0.0 { 1.0 } else { ours_mass / oracle_mass },
            realised_ratio: kept / ours.len() as f64,
        }
    }

    #[track_caller]
    fn same(got: &KeptAgreement, expected: &KeptAgreement, what: &str) {
        let numbers = |a: &KeptAgreement| [a.recall, a.mass, a.mass_of_oracle, a.realised_ratio];
        for (a, b) in numbers(got).into_iter().zip(numbers(expected)) {
            assert!((a - b).abs() < 1e-12, "{what}: {got:?}, expected {expected:?}");
        }
    }

    /// On the host, on the device and by masks, with many ties, no mass at all, and none among what is kept.
    #[test]
    fn every_way_to_compare_equals_a_naive_one() {
        let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
        let ratios = [0.5, 0.1, 0.02].map(|r| RetentionRatio::new(r).unwrap());
        tch::manual_seed(3);
        let (heads, positions) = (6, 50);
        let random =
            |levels: f64| (Tensor::rand([heads, positions], (Kind::Float, Device::Cpu)) * levels).floor();
        for (levels, mass_levels) in [(4.0, 4.0), (1e6, 1e6), (50.0, 1.0), (50.0, 1.05)] {
            let (predicted, oracle, mass) = (random(levels), random(levels), random(mass_levels));
            let plain = |x: &Tensor| Vec::<f64>::try_from(x.to_kind(Kind::Double).reshape([-1])).unwrap();
            let reference = Reference::new(&oracle.to(device), &mass.to(device), &ratios).unwrap();
            let numbers = reference.compare(&predicted.to(device)).unwrap().to(Device::Cpu);
            let mut of_device =
                reference.budgets().read(&Vec::try_from(numbers).unwrap()).unwrap().kept.into_iter();
            for policy in Policy::OF_SCORES {
                let of_host = KeptAgreement::at_ratios(&predicted, &oracle, &mass, policy, &ratios).unwrap();
                for (of_host, &ratio) in of_host.iter().zip(&ratios) {
                    let mask = |x: &Tensor| naive_mask(&plain(x), heads as usize, policy, ratio);
                    let expected = naive(&mask(&predicted), &mask(&oracle), &plain(&mass));
                    let what = format!("{policy:?} at {ratio:?}, {levels} levels, mass of {mass_levels}");
                    same(of_host, &expected, &what);
                    same(&of_device.next().unwrap(), &expected, &what);
                    let masks = [&predicted, &oracle].map(|x| keep_mask(x, policy, ratio));
                    let [ours, theirs] = masks;
                    same(&OracleKept::new(theirs, &mass).agreement(&ours), &expected, &what);
                }
            }
        }
    }

    #[test]
    fn kvzip_agrees_with_itself_where_it_keeps_no_mass() {
        let nothing = Tensor::zeros([2, 10], (Kind::Float, Device::Cpu));
        let tenth = RetentionRatio::new(0.1).unwrap();
        let own = KeptAgreement::new(&nothing, &nothing, &nothing, Policy::Pair, tenth).unwrap();
        assert_eq!((own.recall, own.mass_of_oracle, own.mass), (1.0, 1.0, 0.0));
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
