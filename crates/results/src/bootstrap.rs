//! Bootstrap intervals over contexts.
//!
//! Questions of one context share a pruned cache and rise and fall together, so contexts, not
//! questions, are drawn. The same draws serve every method, so that ratios of two methods compare
//! the same contexts.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use pkv_core::Seed;
use rand::Rng;

use crate::results::Interval;

/// The draws of one evaluation, by the number of contexts.
pub struct Draws {
    resamples: usize,
    seed: Seed,
    made: RefCell<HashMap<usize, Rc<Bootstrap>>>,
}

impl Draws {
    pub fn new(resamples: usize, seed: Seed) -> Self {
        Self { resamples, seed, made: RefCell::default() }
    }

    /// Those of `contexts` contexts.
    pub fn of(&self, contexts: usize) -> Rc<Bootstrap> {
        let make = || Rc::new(Bootstrap::new(contexts, self.resamples, self.seed));
        self.made.borrow_mut().entry(contexts).or_insert_with(make).clone()
    }
}

/// Draws with replacement from the contexts of one task.
///
/// ```
/// use pkv_core::Seed;
/// use pkv_results::bootstrap::Bootstrap;
///
/// let right = [1.0, 0.0, 1.0, 1.0];
/// let accuracy = Bootstrap::new(right.len(), 1000, Seed(1)).mean(&right);
/// assert_eq!(accuracy.mean, 0.75);
/// assert!(accuracy.low < 0.75 && accuracy.high > 0.75);
/// ```
pub struct Bootstrap {
    /// Number of draws of each context; one row per resample.
    draws: Vec<Vec<u32>>,
    contexts: usize,
}

impl Bootstrap {
    /// `resamples` draws of `contexts` contexts each.
    pub fn new(contexts: usize, resamples: usize, seed: Seed) -> Self {
        let mut rng = seed.stream("bootstrap", contexts as u64);
        let draws = (0..resamples)
            .map(|_| {
                let mut counts = vec![0; contexts];
                for _ in 0..contexts {
                    counts[rng.random_range(0..contexts)] += 1;
                }
                counts
            })
            .collect();
        Self { draws, contexts }
    }

    /// Mean of one value per context, and its interval.
    pub fn mean(&self, values: &[f64]) -> Interval {
        let weights = vec![1.0; values.len()];
        self.ratio(values, &weights).unwrap_or(Interval::exact(0.0))
    }

    /// Sum of `above` over sum of `below`, one of each per context, and its interval; `None` if `below` sums
    /// to 0.
    ///
    /// Resamples whose `below` sums to 0 say nothing and are left out.
    pub fn ratio(&self, above: &[f64], below: &[f64]) -> Option<Interval> {
        assert!(
            above.len() == self.contexts && below.len() == self.contexts,
            "one value per context: {} contexts, {} and {} values",
            self.contexts,
            above.len(),
            below.len()
        );
        let total: f64 = below.iter().sum();
        if total == 0.0 {
            return None;
        }
        let ratios = self.resampled(above, below).into_iter().filter(|r| r.is_finite()).collect();
        Some(interval(above.iter().sum::<f64>() / total, ratios))
    }

    /// Sum of `above` over sum of `below` in every resample, in the order of the draws; not finite where
    /// `below` sums to 0. Values of one bootstrap belong together draw by draw.
    pub fn resampled(&self, above: &[f64], below: &[f64]) -> Vec<f64> {
        let weigh = |draw: &[u32], values: &[f64]| -> f64 {
            draw.iter().zip(values).map(|(&n, v)| f64::from(n) * v).sum()
        };
        self.draws.iter().map(|draw| weigh(draw, above) / weigh(draw, below)).collect()
    }
}

/// `mean` with the 95% interval of its resampled values.
pub fn interval(mean: f64, mut resampled: Vec<f64>) -> Interval {
    resampled.sort_unstable_by(f64::total_cmp);
    Interval {
        mean,
        low: percentile(&resampled, 0.025).unwrap_or(mean),
        high: percentile(&resampled, 0.975).unwrap_or(mean),
    }
}

/// The value below which the share `q` of `sorted` lies, interpolated; `None` of nothing.
fn percentile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q * last as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_mean_is_two_standard_errors_wide_on_each_side() {
        // 400 contexts, half of them 1: standard error 0.025.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let i = Bootstrap::new(400, 2000, Seed(3)).mean(&values);
        assert_eq!(i.mean, 0.5);
        assert!((i.low - (0.5 - 1.96 * 0.025)).abs() < 0.006, "{i:?}");
        assert!((i.high - (0.5 + 1.96 * 0.025)).abs() < 0.006, "{i:?}");
    }

    #[test]
    fn ratios_are_paired() {
        // Twice the value in every context: the ratio has no spread, though the values have.
        let below: Vec<f64> = (1..30).map(f64::from).collect();
        let above: Vec<f64> = below.iter().map(|b| 2.0 * b).collect();
        let i = Bootstrap::new(29, 500, Seed(3)).ratio(&above, &below).unwrap();
        assert!((i.low - 2.0).abs() < 1e-12 && (i.high - 2.0).abs() < 1e-12, "{i:?}");
        assert_eq!(Bootstrap::new(2, 10, Seed(3)).ratio(&[1.0, 2.0], &[0.0, 0.0]), None);
    }

    #[test]
    fn one_context_has_no_spread_and_equal_seeds_draw_alike() {
        assert_eq!(Bootstrap::new(1, 100, Seed(1)).mean(&[0.25]), Interval::exact(0.25));
        let values: Vec<f64> = (0..10).map(f64::from).collect();
        let of = |seed| Bootstrap::new(10, 200, Seed(seed)).mean(&values);
        assert_eq!(of(5), of(5));
        assert_ne!(of(5), of(6));
    }
}
