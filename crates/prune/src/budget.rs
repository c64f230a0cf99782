//! Head budgets: how many positions each KV head keeps, fixed before a context is seen.
//!
//! KVzip's `pair` policy gives every head another share of the kept pairs, and that share hardly depends on
//! the context. Its mean over training contexts, at a grid of retention ratios, is a head's budget: the shape
//! of a pruned cache then depends on the context's length alone, so that a server can allocate it ahead.
//! Between two ratios of the grid shares are interpolated linearly, below the lowest one towards 0. Where
//! budgets are stored is left to `checkpoint`.
//!
//! Dimension key: o layers x KV heads flattened, t position.

use anyhow::{Result, ensure};
use pkv_core::{Policy, RetentionRatio};
use tch::{Device, Kind, Tensor};

use crate::keep_mask;

/// Parts of a whole: ratios and shares are integers of this unit, so that every reader counts alike.
const UNIT: u32 = 1_000_000;

/// The ratios that shares are measured at, in parts per million; those that evaluations use are among them.
const GRID: [u32; 14] = [
    10_000, 20_000, 31_250, 50_000, 62_500, 100_000, 125_000, 200_000, 300_000, 400_000, 500_000, 700_000,
    900_000, UNIT,
];

/// Share of its positions that each head keeps, at a grid of retention ratios.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadBudgets {
    contexts: u64,
    ratios: Vec<u32>,
    /// By ratio and head; the mean over heads is the ratio.
    shares: Vec<Vec<u32>>,
}

impl HeadBudgets {
    /// Shares in parts per million, by ratio (the same unit, ascending, the last one whole) and head.
    ///
    /// # Errors
    /// There is no ratio or head, ratios do not ascend to the whole, or the shares of a ratio do not sum to
    /// it.
    pub fn new(contexts: u64, ratios: Vec<u32>, shares: Vec<Vec<u32>>) -> Result<Self> {
        ensure!(
            ratios.last() == Some(&UNIT) && ratios[0] > 0 && ratios.is_sorted_by(|a, b| a < b),
            "expected ratios that ascend to {UNIT} parts per million, found {ratios:?}"
        );
        ensure!(
            shares.len() == ratios.len(),
            "expected shares at {} ratios, found them at {}",
            ratios.len(),
            shares.len()
        );
        let heads = shares[0].len();
        for (ratio, row) in ratios.iter().zip(&shares) {
            ensure!(
                row.len() == heads && heads > 0,
                "expected shares of {heads} KV heads at every ratio, found {} at {ratio}",
                row.len()
            );
            let sum: u64 = row.iter().map(|&s| u64::from(s)).sum();
            let expected = u64::from(*ratio) * heads as u64;
            ensure!(
                sum == expected && row.iter().all(|&s| s <= UNIT),
                "expected shares of at most {UNIT} that sum to {expected} at {ratio}, found {sum}"
            );
        }
        Ok(Self { contexts, ratios, shares })
    }

    /// Training contexts that they are the mean of.
    pub const fn contexts(&self) -> u64 {
        self.contexts
    }

    /// Ratios of the grid, ascending, in parts per million.
    pub fn ratios(&self) -> &[u32] {
        &self.ratios
    }

    /// Shares by ratio and head, in parts per million.
    pub fn shares(&self) -> &[Vec<u32>] {
        &self.shares
    }

    pub fn heads(&self) -> usize {
        self.shares[0].len()
    }

    /// Positions that each head keeps of `positions`, `kept` KV pairs in all: exactly as many.
    ///
    /// Shares at the ratio that these are, scaled to `kept`; a head that would keep more than it has keeps
    /// all, and the others share the rest; rounded by largest remainder, of equal ones the lower head. A head
    /// may keep none.
    pub fn counts(&self, kept: usize, positions: usize) -> Vec<usize> {
        let pairs = (self.heads() * positions) as f64;
        let at = if pairs > 0.0 { kept as f64 / pairs * f64::from(UNIT) } else { 0.0 };
        // The first ratio of the grid that is not below; the last one if rounding lost it.
        let high = self.ratios.iter().position(|&r| f64::from(r) >= at).unwrap_or(self.ratios.len() - 1);
        let (from, low) = match high {
            0 => (0.0, None),
            _ => (f64::from(self.ratios[high - 1]), Some(&self.shares[high - 1])),
        };
        let way = (at - from) / (f64::from(self.ratios[high]) - from);
        let share = |o: usize| {
            let a = low.map_or(0.0, |low| f64::from(low[o]));
            a + (f64::from(self.shares[high][o]) - a) * way
        };
        apportion(&(0..self.heads()).map(share).collect::<Vec<_>>(), kept, positions)
    }
}

/// The mean over contexts in the making.
pub struct BudgetFit {
    contexts: u64,
    /// Sums of shares, by ratio and head.
    sums: Vec<Vec<f64>>,
}

impl BudgetFit {
    /// # Panics
    /// There is no head.
    pub fn new(heads: usize) -> Self {
        assert!(heads > 0, "a model has KV heads");
        Self { contexts: 0, sums: vec![vec![0.0; heads]; GRID.len()] }
    }

    /// Add what `pair` keeps of one context by KVzip's scores, every context counting alike.
    ///
    /// # Shapes
    /// - `scores_ot`: `[heads, positions]`, any float kind, at least one position
    ///
    /// # Errors
    /// They are scores of another number of heads, or of no position.
    pub fn add(&mut self, scores_ot: &Tensor) -> Result<()> {
        let (heads, positions) = scores_ot.size2()?;
        ensure!(
            heads as usize == self.sums[0].len() && positions > 0,
            "expected scores of {} KV heads, found {heads} x {positions} positions",
            self.sums[0].len()
        );
        for (&ratio, sums) in GRID.iter().zip(&mut self.sums) {
            let keep_ot = keep_mask(scores_ot, Policy::Pair, ratio_of(ratio)?);
            let counts = keep_ot.sum_dim_intlist(-1, false, Kind::Int64).to_device(Device::Cpu);
            for (sum, count) in sums.iter_mut().zip(Vec::<i64>::try_from(counts)?) {
                *sum += count as f64 / positions as f64;
            }
        }
        self.contexts += 1;
        Ok(())
    }

    /// # Errors
    /// No context was added.
    pub fn finish(self) -> Result<HeadBudgets> {
        ensure!(self.contexts > 0, "there is no context to learn head budgets from");
        let whole = |(&ratio, sums): (&u32, &Vec<f64>)| {
            let all = apportion(sums, ratio as usize * sums.len(), UNIT as usize);
            all.into_iter().map(|n| n as u32).collect()
        };
        let shares = GRID.iter().zip(&self.sums).map(whole).collect();
        HeadBudgets::new(self.contexts, GRID.to_vec(), shares)
    }
}

fn ratio_of(parts: u32) -> Result<RetentionRatio> {
    Ok(RetentionRatio::new(f64::from(parts) / f64::from(UNIT))?)
}

/// `total` units in proportion to `weights`, at most `cap` to each; what is beyond a cap goes to the others.
/// Rounded by largest remainder, of equal ones the lower index. Where all that are left weigh nothing, they
/// count alike.
///
/// Sums run in order of the index, so that every reader rounds alike; `total` is at most `cap` times the
/// weights' number.
fn apportion(weights: &[f64], total: usize, cap: usize) -> Vec<usize> {
    let mut quota = vec![0.0; weights.len()];
    let mut is_full = vec![false; weights.len()];
    let mut left = total;
    loop {
        let open = || (0..weights.len()).filter(|&o| !is_full[o]);
        let sum = open().fold(0.0, |sum, o| sum + weights[o]);
        let count = open().count() as f64;
        for o in open() {
            quota[o] = if sum > 0.0 { left as f64 * weights[o] / sum } else { left as f64 / count };
        }
        let beyond: Vec<usize> = open().filter(|&o| quota[o] > cap as f64).collect();
        if beyond.is_empty() {
            break;
        }
        for o in beyond {
            (is_full[o], quota[o]) = (true, cap as f64);
            left = left.saturating_sub(cap);
        }
    }
    let mut counts: Vec<usize> = quota.iter().map(|q| q.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| quota[b].fract().total_cmp(&quota[a].fract()));
    let mut rest = total.saturating_sub(counts.iter().sum());
    while rest > 0 && counts.iter().any(|&n| n < cap) {
        for &o in &order {
            if rest > 0 && counts[o] < cap {
                counts[o] += 1;
                rest -= 1;
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PolicyInputs, keep_mask_budget_by, keep_mask_by};
    use rand::Rng;

    fn by(budgets: &HeadBudgets) -> PolicyInputs<'_> {
        PolicyInputs { budgets: Some(budgets), ..Default::default() }
    }

    /// Scores of heads of very different strength.
    fn scores(seed: u64, heads: usize, positions: usize) -> Vec<f32> {
        let mut rng = pkv_core::Seed(seed).stream("budget-test", 0);
        let strength: Vec<f32> = (0..heads).map(|_| rng.random_range(0.02..1.0)).collect();
        let one = |o: usize| rng.random_range(0.0..1.0f32).powi(3) * strength[o];
        (0..heads * positions).map(|i| i / positions).map(one).collect()
    }

    fn tensor(data: &[f32], heads: usize) -> Tensor {
        Tensor::from_slice(data).reshape([heads as i64, -1])
    }

    fn ratio(ratio: f64) -> RetentionRatio {
        RetentionRatio::new(ratio).unwrap()
    }

    /// Indices of the largest, of equal ones the lower index first.
    fn ranked<T: Copy + PartialOrd>(all: &[T]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|&a, &b| all[b].partial_cmp(&all[a]).unwrap());
        order
    }

    /// Quotas with one level for all: min(cap, level x weight), the level found by bisection; then largest
    /// remainder.
    fn naive_apportion(weights: &[f64], total: usize, cap: usize) -> Vec<usize> {
        let quota = |level: f64| weights.iter().map(|w| (level * w).min(cap as f64)).collect::<Vec<f64>>();
        let (mut low, mut high) = (0.0, 1e12);
        for _ in 0..200 {
            let middle = (low + high) / 2.0;
            if quota(middle).iter().sum::<f64>() < total as f64 { low = middle } else { high = middle }
        }
        let quota = quota(high);
        let mut counts: Vec<usize> = quota.iter().map(|q| (q + 1e-9).floor() as usize).collect();
        let rests: Vec<f64> = quota.iter().zip(&counts).map(|(q, &n)| q - n as f64).collect();
        let rest = total - counts.iter().sum::<usize>();
        ranked(&rests).into_iter().take(rest).for_each(|o| counts[o] += 1);
        counts
    }

    /// Mean share of each head under `pair`, in f64.
    fn naive_shares(contexts: &[Vec<f32>], heads: usize, ratio: f64) -> Vec<f64> {
        let mut mean = vec![0.0; heads];
        for scores in contexts {
            let (n, t) = (scores.len(), scores.len() / heads);
            let kept = ((n as f64 * ratio).round() as usize).clamp(1, n);
            let share = 1.0 / t as f64 / contexts.len() as f64;
            ranked(scores).into_iter().take(kept).for_each(|i| mean[i / t] += share);
        }
        mean
    }

    fn fitted(contexts: &[Vec<f32>], heads: usize) -> HeadBudgets {
        let mut fit = BudgetFit::new(heads);
        contexts.iter().for_each(|scores| fit.add(&tensor(scores, heads)).unwrap());
        fit.finish().unwrap()
    }

    #[test]
    fn shares_and_kept_sets_are_those_of_a_naive_version() {
        let heads = 7;
        let contexts: Vec<Vec<f32>> = (0..5).map(|i| scores(i, heads, 90 + 31 * i as usize)).collect();
        let budgets = fitted(&contexts, heads);
        assert_eq!((budgets.contexts(), budgets.heads()), (5, heads));
        for (&parts, shares) in budgets.ratios().iter().zip(budgets.shares()) {
            let naive = naive_shares(&contexts, heads, f64::from(parts) / 1e6);
            // A count of pairs is rounded in each context; shares are scaled so that their mean is the ratio.
            let scale = f64::from(parts) / 1e6 * heads as f64 / naive.iter().sum::<f64>();
            for (share, naive) in shares.iter().zip(&naive) {
                assert!(
                    (f64::from(*share) / 1e6 - (naive * scale).min(1.0)).abs() < 2e-4,
                    "{parts}: {share} {naive}"
                );
            }
        }
        let (data, t) = (scores(99, heads, 211), 211);
        for wanted in [1.0, 0.77, 0.5, 0.33, 0.2, 0.1, 0.07, 0.03, 0.011, 0.004, 0.0001] {
            // Shares on the line between the two ratios of the grid around the one that is really kept.
            let kept = ratio(wanted).count(heads * t);
            let at = kept as f64 / (heads * t) as f64;
            let point = |i: usize| (f64::from(budgets.ratios()[i]) / 1e6, budgets.shares()[i].clone());
            let above = (0..GRID.len()).find(|&i| point(i).0 >= at).unwrap();
            let (to, high) = point(above);
            let (from, low) = if above > 0 { point(above - 1) } else { (0.0, vec![0; heads]) };
            let line = low.iter().zip(&high);
            let weights: Vec<f64> = line
                .map(|(&a, &b)| (f64::from(a) * (to - at) + f64::from(b) * (at - from)) / (to - from) / 1e6)
                .collect();
            let counts = naive_apportion(&weights, kept, t);
            assert_eq!(budgets.counts(kept, t), counts, "{wanted}");
            let mut expected = vec![false; heads * t];
            for (o, head) in data.chunks(t).enumerate() {
                ranked(head).into_iter().take(counts[o]).for_each(|i| expected[o * t + i] = true);
            }
            let mask = keep_mask_by(&tensor(&data, heads), Policy::PairBudget, ratio(wanted), &by(&budgets))
                .unwrap();
            assert_eq!(Vec::<bool>::try_from(mask.reshape([-1])).unwrap(), expected, "{wanted}");
        }
    }

    #[test]
    fn caps_overflow_to_others_and_rounding_loses_nothing() {
        assert_eq!(apportion(&[8.0, 1.0, 1.0], 10, 5), [5, 3, 2], "the tie goes to the lower head");
        assert_eq!(apportion(&[1.0, 0.0, 0.0], 7, 3), [3, 2, 2], "heads of no weight share what is left");
        assert_eq!(apportion(&[0.0, 0.0], 0, 3), [0, 0]);
        assert_eq!(apportion(&[0.2, 0.7], 6, 3), [3, 3]);
        let mut rng = pkv_core::Seed(5).stream("budget-test", 1);
        for _ in 0..200 {
            let n = rng.random_range(1..12);
            let weights: Vec<f64> = (0..n).map(|_| rng.random_range(0.01..1.0f64).powi(4)).collect();
            let cap = rng.random_range(1..300);
            let total = rng.random_range(0..=n * cap);
            let found = apportion(&weights, total, cap);
            assert_eq!(found.iter().sum::<usize>(), total);
            assert!(found.iter().all(|&k| k <= cap));
            assert_eq!(found, naive_apportion(&weights, total, cap), "{weights:?} {total} {cap}");
        }
    }

    #[test]
    fn the_shape_depends_on_the_length_alone_and_heads_may_keep_none_or_all() {
        let heads = 6;
        let budgets = fitted(&[scores(1, heads, 120), scores(2, heads, 80)], heads);
        let (a, b) = (tensor(&scores(3, heads, 50), heads), tensor(&scores(4, heads, 50), heads));
        for wanted in [1.0, 0.6, 0.1, 0.004] {
            let mask = |scores: &Tensor| {
                let mask = keep_mask_by(scores, Policy::PairBudget, ratio(wanted), &by(&budgets)).unwrap();
                Vec::<i64>::try_from(mask.sum_dim_intlist(-1, false, Kind::Int64)).unwrap()
            };
            assert_eq!(mask(&a), mask(&b));
            assert_eq!(mask(&a).iter().sum::<i64>() as usize, ratio(wanted).count(heads * 50), "{wanted}");
        }
        assert_eq!(budgets.counts(300, 50), [50; 6]);
        assert_eq!(budgets.counts(1, 50).iter().filter(|&&n| n == 0).count(), 5);
        // Of tokens: as many pairs as they are in all heads together, and of a short context all.
        let tokens = |n| keep_mask_budget_by(&a, Policy::PairBudget, n, &by(&budgets)).unwrap();
        assert_eq!(tokens(7).sum(Kind::Int64).int64_value(&[]), 42);
        assert_eq!(tokens(1000).sum(Kind::Int64).int64_value(&[]), 300);
        assert_eq!(tokens(0).sum(Kind::Int64).int64_value(&[]), 0);
    }

    #[test]
    fn ties_and_numbers_that_are_none_keep_the_count() {
        let budgets =
            HeadBudgets::new(1, vec![500_000, UNIT], vec![vec![250_000, 750_000], vec![UNIT; 2]]).unwrap();
        let scores_ot =
            Tensor::from_slice(&[1.0, 1.0, 1.0, f32::NAN, f32::NAN, 0.5, 2.0, 0.5]).reshape([2, 4]);
        let mask = keep_mask_by(&scores_ot, Policy::PairBudget, ratio(0.5), &by(&budgets)).unwrap();
        assert_eq!(
            Vec::<bool>::try_from(mask.reshape([-1])).unwrap(),
            [true, false, false, false, false, true, true, true]
        );
        let empty = Tensor::zeros([2, 0], (Kind::Float, Device::Cpu));
        assert_eq!(
            keep_mask_by(&empty, Policy::PairBudget, ratio(0.5), &by(&budgets)).unwrap().size(),
            [2, 0]
        );
    }

    #[test]
    fn without_budgets_or_with_those_of_another_model_it_is_refused() {
        let scores_ot = tensor(&scores(1, 3, 10), 3);
        let keep = |budgets: Option<&HeadBudgets>| {
            keep_mask_by(
                &scores_ot,
                Policy::PairBudget,
                ratio(0.5),
                &PolicyInputs { budgets, ..Default::default() },
            )
        };
        let error = format!("{:?}", keep(None).unwrap_err());
        assert!(error.contains("`pair-budget` needs head budgets"), "{error}");
        let other = HeadBudgets::new(1, vec![UNIT], vec![vec![UNIT; 2]]).unwrap();
        let error = format!("{:?}", keep(Some(&other)).unwrap_err());
        assert!(error.contains("for 2 KV heads, the scores have 3"), "{error}");
        for (ratios, shares) in [
            (vec![], vec![]),
            (vec![500_000], vec![vec![500_000]]),
            (vec![0, UNIT], vec![vec![0], vec![UNIT]]),
            (vec![500_000, 500_000, UNIT], vec![vec![500_000], vec![500_000], vec![UNIT]]),
            (vec![500_000, UNIT], vec![vec![500_000, 500_001], vec![UNIT; 2]]),
            (vec![500_000, UNIT], vec![vec![500_000], vec![UNIT; 2]]),
            (vec![UNIT], vec![vec![]]),
            (vec![750_000, UNIT], vec![vec![1_100_000, 400_000], vec![UNIT; 2]]),
        ] {
            assert!(HeadBudgets::new(1, ratios.clone(), shares.clone()).is_err(), "{ratios:?} {shares:?}");
        }
        assert!(BudgetFit::new(2).finish().is_err());
        assert!(BudgetFit::new(2).add(&scores_ot).is_err());
    }
}
