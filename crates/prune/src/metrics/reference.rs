//! One context's oracle, ranked once: what every later prediction is compared with, on the scores' device.
//!
//! Owns the same numbers as [`KeptAgreement::at_ratios`], [`super::spearman_per_head`] and
//! [`super::kendall_per_head`], made of sorts and counts that a GPU is fast at, without waiting for it: a
//! comparison is one vector on the device, and [`Budgets::read`] takes it apart on the host. On a CPU the
//! functions there are the faster ones.
//!
//! A stable sort gives every KV pair its place in the order in which budgets are filled; a budget of k pairs
//! keeps the places below k. So one sort per policy serves all ratios, and ties fall as in
//! [`crate::keep_mask`]: to the lower index.

use anyhow::{Result, ensure};
use pkv_core::{Policy, RetentionRatio};
use tch::{Device, Kind, Tensor};

use super::{KeptAgreement, Sums, share, under};
use crate::keep::{Ranked as _, by_place, ordered, place, token_scores};

/// An oracle's scores of one context, ranked.
#[derive(Debug)]
pub struct Reference {
    ranks: HeadRanks,
    /// Places of the pairs, in the order of [`Policy::OF_SCORES`].
    places: Vec<Tensor>,
    /// Scores whose sum is the mass, per policy.
    mass: Vec<Tensor>,
    /// Per policy the sum of all mass, then what the oracle keeps of it at every ratio; f64 on the device.
    kept: Tensor,
    budgets: Budgets,
}

/// Number of KV pairs of a context that each policy keeps at each ratio, to read a comparison's numbers.
#[derive(Clone, Debug)]
pub struct Budgets {
    ratios: Vec<RetentionRatio>,
    heads: usize,
    positions: usize,
}

/// A prediction's agreement with a [`Reference`].
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    /// Policies in the order of [`Policy::OF_SCORES`], each at all ratios.
    pub kept: Vec<KeptAgreement>,
    /// Per KV head.
    pub spearman: Vec<f64>,
    pub kendall: Vec<f64>,
}

impl Reference {
    /// Bytes on the device per KV pair: three places, two ranks and the mass, of four bytes each.
    pub const BYTES_PER_PAIR: usize = 24;

    /// # Shapes
    /// - `oracle_ot`: `[KV heads, positions]`, higher means keep
    /// - `mass_ot`: the same, KVzip's raw scores: what mass is counted in
    ///
    /// # Errors
    /// The shapes differ, or there is no KV pair.
    pub fn new(oracle_ot: &Tensor, mass_ot: &Tensor, ratios: &[RetentionRatio]) -> Result<Self> {
        super::same_shape(oracle_ot, mass_ot)?;
        ensure!(
            oracle_ot.dim() == 2,
            "scores of shape {:?}, expected KV heads and positions",
            oracle_ot.size()
        );
        let (heads, positions) = oracle_ot.size2()?;
        let mass_of = |policy| match policy {
            Policy::Token => mass_ot.to_kind(Kind::Double).sum_dim_intlist(0, false, Kind::Double),
            _ => mass_ot.shallow_clone(),
        };
        let mut this = Self {
            ranks: HeadRanks::new(oracle_ot),
            places: places(oracle_ot),
            mass: Policy::OF_SCORES.map(mass_of).into(),
            kept: Tensor::new(),
            budgets: Budgets {
                ratios: ratios.to_vec(),
                heads: heads as usize,
                positions: positions as usize,
            },
        };
        let mut kept = Vec::new();
        for (i, policy) in Policy::OF_SCORES.into_iter().enumerate() {
            let mass = this.mass[i].to_kind(Kind::Double);
            kept.push(mass.sum(Kind::Double));
            kept.extend(
                ratios.iter().map(|&r| under(&mass, &this.places[i].lt(this.budgets.of(policy, r) as i64))),
            );
        }
        this.kept = Tensor::stack(&kept, 0);
        Ok(this)
    }

    /// Compare a prediction `[KV heads, positions]`: a vector for [`Budgets::read`], f64 on the device.
    ///
    /// # Errors
    /// Another shape than the oracle's.
    pub fn compare(&self, predicted_ot: &Tensor) -> Result<Tensor> {
        let Budgets { ratios, heads, positions } = &self.budgets;
        ensure!(
            predicted_ot.size() == [*heads as i64, *positions as i64],
            "comparing scores of shape {:?} with {heads} KV heads of {positions} positions",
            predicted_ot.size()
        );
        let mut numbers = Vec::new();
        for ((ours, theirs), (policy, mass)) in
            places(predicted_ot).iter().zip(&self.places).zip(Policy::OF_SCORES.into_iter().zip(&self.mass))
        {
            let mass = mass.to_kind(Kind::Double);
            // Kept by both: the later of the two places is within the budget.
            let later = ours.maximum(theirs);
            for &ratio in ratios {
                let budget = self.budgets.of(policy, ratio) as i64;
                numbers.push(later.lt(budget).sum(Kind::Int64).to_kind(Kind::Double));
                numbers.push(under(&mass, &ours.lt(budget)));
            }
        }
        let ranks = HeadRanks::new(predicted_ot);
        let mut all = vec![self.kept.shallow_clone(), Tensor::stack(&numbers, 0)];
        all.extend(ranks.spearman(&self.ranks));
        all.extend(ranks.kendall(&self.ranks));
        Ok(Tensor::cat(&all, 0))
    }

    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }
}

impl Budgets {
    /// Numbers of a comparison.
    pub fn numbers(&self) -> usize {
        Policy::OF_SCORES.len() * (1 + 3 * self.ratios.len()) + 6 * self.heads
    }

    /// The numbers of [`Reference::compare`], on the host, as what they say.
    ///
    /// # Errors
    /// Not as many as [`Self::numbers`].
    pub fn read(&self, numbers: &[f64]) -> Result<Agreement> {
        ensure!(
            numbers.len() == self.numbers(),
            "a comparison of {} numbers, expected {}",
            numbers.len(),
            self.numbers()
        );
        let n = self.ratios.len();
        let (oracle, rest) = numbers.split_at(Policy::OF_SCORES.len() * (1 + n));
        let (ours, rest) = rest.split_at(Policy::OF_SCORES.len() * 2 * n);
        let (spearman, kendall) = rest.split_at(3 * self.heads);
        let mut kept = Vec::new();
        for (i, policy) in Policy::OF_SCORES.into_iter().enumerate() {
            let oracle = &oracle[i * (1 + n)..][..1 + n];
            for (j, &ratio) in self.ratios.iter().enumerate() {
                let [both, mass] = [ours[2 * (i * n + j)], ours[2 * (i * n + j) + 1]];
                // A budget is filled exactly, by either side.
                let (groups, size) = self.groups(policy);
                let count = (groups * self.of(policy, ratio)) as f64;
                kept.push(KeptAgreement::of(&Sums {
                    both,
                    kept: count,
                    oracle_kept: count,
                    pairs: (groups * size) as f64,
                    mass,
                    oracle_mass: oracle[1 + j],
                    all_mass: oracle[0],
                }));
            }
        }
        Ok(Agreement { kept, spearman: quotients(spearman), kendall: quotients(kendall) })
    }

    /// Groups of competitors, and how many compete in each.
    fn groups(&self, policy: Policy) -> (usize, usize) {
        match policy {
            Policy::Pair | Policy::PairFloor => (1, self.heads * self.positions),
            Policy::PairUniform => (self.heads, self.positions),
            Policy::Token => (1, self.positions),
            Policy::PairBudget | Policy::PairKeydiff => panic!("{ONLY_SCORES}"),
        }
    }

    /// Number of pairs that each group keeps.
    fn of(&self, policy: Policy, ratio: RetentionRatio) -> usize {
        let (_, size) = self.groups(policy);
        ratio.count(size).min(size)
    }
}

const ONLY_SCORES: &str = "this policy needs more than scores";

/// Every competitor's place, from 0, in the order of [`Policy::OF_SCORES`]: `[o, t]` three times, then `[t]`;
/// i32.
fn places(scores_ot: &Tensor) -> Vec<Tensor> {
    let of = |policy| match policy {
        Policy::Pair => place(&scores_ot.reshape([-1])).reshape(scores_ot.size()),
        Policy::PairFloor => place(&by_place(scores_ot)).reshape(scores_ot.size()),
        Policy::PairUniform => place(scores_ot),
        Policy::Token => place(&token_scores(scores_ot)),
        Policy::PairBudget | Policy::PairKeydiff => panic!("{ONLY_SCORES}"),
    };
    Policy::OF_SCORES.map(of).into()
}

/// Rank of every score within its head, on the scores' device: ranked once, compared with any others.
#[derive(Debug)]
pub struct HeadRanks {
    /// Number of lower scores, i32 `[o, t]`.
    below_ot: Tensor,
    /// Number of equal scores including itself, i32 `[o, t]`.
    equal_ot: Tensor,
}

impl HeadRanks {
    /// # Shapes
    /// - `scores_ot`: `[KV heads, positions]`, any kind, any device
    pub fn new(scores_ot: &Tensor) -> Self {
        // As the host's coefficients: in f32.
        let scores_ot = ordered(&scores_ot.to_kind(Kind::Float)).contiguous();
        let (below_ot, equal_ot) = below_and_equal(&scores_ot.sort(-1, false).0, &scores_ot);
        Self { below_ot: below_ot.to_kind(Kind::Int), equal_ot: equal_ot.to_kind(Kind::Int) }
    }

    /// Spearman's and Kendall's coefficients of every head: those of [`super::spearman`] and
    /// [`super::kendall_tau_b`], from exact counts on the device.
    ///
    /// # Errors
    /// The other scores have another shape, or the device fails.
    pub fn coefficients(&self, other: &Self) -> Result<(Vec<f64>, Vec<f64>)> {
        super::same_shape(&self.below_ot, &other.below_ot)?;
        let parts: Vec<Tensor> = self.spearman(other).into_iter().chain(self.kendall(other)).collect();
        let parts = Tensor::stack(&parts, 0);
        let numbers: Vec<f64> = parts.to_device(Device::Cpu).reshape([-1]).try_into()?;
        let (spearman, kendall) = numbers.split_at(numbers.len() / 2);
        Ok((quotients(spearman), quotients(kendall)))
    }

    /// Per head, what Pearson's coefficient of average ranks is made of: the product, and both squares;
    /// `[o]`, f64. The sums are exact: multiples of 1/4 below 2^53.
    fn spearman(&self, other: &Self) -> [Tensor; 3] {
        let centred = |r: &Self| {
            let mean = (r.below_ot.size()[1] as f64 + 1.0) / 2.0;
            let twice_ot = &r.below_ot * 2 + &r.equal_ot + 1;
            twice_ot.to_kind(Kind::Double) / 2.0 - mean
        };
        let (a_ot, b_ot) = (centred(self), centred(other));
        let dot = |x: &Tensor, y: &Tensor| (x * y).sum_dim_intlist(-1, false, Kind::Double);
        [dot(&a_ot, &b_ot), dot(&a_ot, &a_ot), dot(&b_ot, &b_ot)]
    }

    /// Per head, what Kendall's tau-b is made of, as [`super::kendall_tau_b`] counts it: concordant less
    /// discordant pairs, and the pairs untied in each; `[o]`, f64, exact.
    fn kendall(&self, other: &Self) -> [Tensor; 3] {
        let n = self.below_ot.size()[1];
        let long = |x: &Tensor| x.to_kind(Kind::Int64);
        // By the first scores, then by the second.
        let key_ot = (long(&self.below_ot) * n + long(&other.below_ot)).sort(-1, false).0;
        let (_, equal_ot) = below_and_equal(&key_ot, &key_ot);
        // Every member of a tie of e pairs up with e - 1 others, and every pair is met twice.
        let tied = |equal_ot: &Tensor| {
            (long(equal_ot).sum_dim_intlist(-1, false, Kind::Int64) - n).divide_scalar_mode(2, "floor")
        };
        let (tied_a, tied_b, tied_both) = (tied(&self.equal_ot), tied(&other.equal_ot), tied(&equal_ot));
        let pairs = n * (n - 1) / 2;
        let exchanges = exchanges(&key_ot.remainder(n).to_kind(Kind::Int));
        let balance = tied_both + pairs - &tied_a - &tied_b - exchanges * 2;
        [balance, pairs - tied_a, pairs - tied_b].map(|x| x.to_kind(Kind::Double))
    }
}

/// Coefficients of the heads from a product and both squares, of all heads each. On the host: devices round
/// roots and quotients differently.
fn quotients(parts: &[f64]) -> Vec<f64> {
    let (product, squares) = parts.split_at(parts.len() / 3);
    let (a, b) = squares.split_at(product.len());
    product.iter().zip(a.iter().zip(b)).map(|(product, (a, b))| share(*product, (a * b).sqrt())).collect()
}

/// For each value, the number of lower and of equal entries of its sorted row; i64.
fn below_and_equal(sorted_ot: &Tensor, values_ot: &Tensor) -> (Tensor, Tensor) {
    let below = sorted_ot.searchsorted_of(values_ot, false);
    let equal = sorted_ot.searchsorted_of(values_ot, true) - &below;
    (below, equal)
}

/// Per row: pairs in strictly descending order, i64 `[o]`. Blocks are merged from the bottom; each of a right
/// half counts the left half's larger ones. `x_ot`: i32, not negative.
fn exchanges(x_ot: &Tensor) -> Tensor {
    let (o, n) = x_ot.size2().expect("rows of one length");
    let whole = (n.max(1) as u64).next_power_of_two() as i64;
    // What is added at the end is larger than all and equal among itself: it exchanges with nothing.
    let beyond = x_ot.new_full([o, whole - n], i64::from(i32::MAX), (Kind::Int, x_ot.device()));
    let mut x = Tensor::cat(&[x_ot, &beyond], 1);
    let mut count_o = Tensor::zeros([o], (Kind::Int64, x_ot.device()));
    let mut half = 1;
    while half < whole {
        let blocks = x.reshape([-1, 2, half]);
        let (left, right) = (blocks.select(1, 0).contiguous(), blocks.select(1, 1).contiguous());
        let larger = left.searchsorted_of(&right, true).neg() + half;
        count_o += larger.reshape([o, -1]).sum_dim_intlist(-1, false, Kind::Int64);
        half *= 2;
        x = x.reshape([-1, half]).sort(-1, false).0;
    }
    count_o
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{kendall_per_head, spearman_per_head};
    use pkv_gpu::DeviceChoice;
    use rand::Rng;

    fn scores(seed: u64, heads: usize, positions: usize, levels: i32) -> Tensor {
        let mut rng = pkv_core::Seed(seed).stream("reference-test", 0);
        let data: Vec<f32> = (0..heads * positions)
            .map(|_| rng.random_range(-levels..levels) as f32 / levels as f32)
            .collect();
        Tensor::from_slice(&data).reshape([heads as i64, positions as i64])
    }

    fn ratios() -> Vec<RetentionRatio> {
        [1.0, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01].map(|r| RetentionRatio::new(r).unwrap()).into()
    }

    /// The CPU's functions against this file, on the device that there is.
    #[track_caller]
    fn same(predicted_ot: &Tensor, oracle_ot: &Tensor, mass_ot: &Tensor, what: &str) {
        let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
        let to = |x: &Tensor| x.to_device(device);
        let reference = Reference::new(&to(oracle_ot), &to(mass_ot), &ratios()).unwrap();
        let numbers = reference.compare(&to(predicted_ot)).unwrap().to_device(Device::Cpu);
        let got = reference.budgets().read(&Vec::try_from(numbers).unwrap()).unwrap();
        let expected = Policy::OF_SCORES
            .into_iter()
            .flat_map(|p| KeptAgreement::at_ratios(predicted_ot, oracle_ot, mass_ot, p, &ratios()).unwrap())
            .collect::<Vec<_>>();
        assert_eq!(got.kept.len(), expected.len());
        for (i, (a, b)) in got.kept.iter().zip(&expected).enumerate() {
            assert_eq!((a.recall, a.realised_ratio), (b.recall, b.realised_ratio), "{what}, {i}");
            for (a, b) in [(a.mass, b.mass), (a.mass_of_oracle, b.mass_of_oracle)] {
                assert!((a - b).abs() <= 1e-12, "{what}, {i}: mass {a}, expected {b}");
            }
        }
        assert_eq!(got.spearman, spearman_per_head(predicted_ot, oracle_ot).unwrap(), "{what}");
        assert_eq!(got.kendall, kendall_per_head(predicted_ot, oracle_ot).unwrap(), "{what}");
        let ranked = HeadRanks::new(&to(oracle_ot));
        let found = HeadRanks::new(&to(predicted_ot)).coefficients(&ranked).unwrap();
        assert_eq!(found, (got.spearman, got.kendall), "{what}");
    }

    #[test]
    fn comparisons_equal_the_host_functions_with_many_ties() {
        for (heads, positions) in [(1, 1), (2, 1), (1, 2), (3, 41), (5, 64), (4, 300)] {
            for levels in [1, 3, 50, 1 << 20] {
                let (a, b) = (scores(1, heads, positions, levels), scores(2, heads, positions, levels));
                same(&a, &b, &b.abs(), &format!("{heads} x {positions} of {levels} levels"));
                same(&b, &b, &b.abs(), &format!("itself, {heads} x {positions} of {levels} levels"));
            }
        }
    }

    #[test]
    fn odd_numbers_have_the_same_places() {
        let odd = [f32::NAN, 1.0, f32::NEG_INFINITY, f32::INFINITY, -0.0, 0.0, 0.0, -0.0, 1.0, 0.5];
        let odd_ot = Tensor::from_slice(&odd).reshape([2, 5]);
        let plain_ot = scores(3, 2, 5, 3);
        same(&odd_ot, &plain_ot, &plain_ot.abs(), "odd predictions");
        same(&plain_ot, &odd_ot, &plain_ot.abs(), "odd oracle");
        same(&plain_ot, &plain_ot, &plain_ot.zeros_like(), "no mass");
    }

    #[test]
    fn other_shapes_and_numbers_are_refused() {
        let x = scores(1, 2, 5, 3);
        let reference = Reference::new(&x, &x, &ratios()).unwrap();
        assert!(reference.compare(&scores(1, 5, 2, 3)).is_err());
        assert!(reference.budgets().read(&[0.0]).is_err());
        assert!(HeadRanks::new(&x).coefficients(&HeadRanks::new(&scores(1, 5, 2, 3))).is_err());
        assert!(Reference::new(&x, &scores(1, 2, 4, 3), &ratios()).is_err());
        assert!(Reference::new(&Tensor::zeros([2, 0], (Kind::Float, Device::Cpu)), &x, &ratios()).is_err());
    }
}
