//! Rank correlation of two lists of scores, ties included.
//!
//! A list that is all one value has no order: its coefficients are 0. A score that is not a number
//! counts as the lowest, as in keep masks.

/// Rank of every score, lowest 1; equal scores share the average of their ranks.
pub fn average_ranks(scores: &[f32]) -> Vec<f64> {
    let scores = comparable(scores);
    let order = ascending(&scores);
    let mut ranks = vec![0.0; scores.len()];
    for tie in order.chunk_by(|&a, &b| scores[a] == scores[b]).scan(0, |start, tie| {
        *start += tie.len();
        Some((*start - tie.len(), tie))
    }) {
        let (start, members) = tie;
        let rank = start as f64 + (members.len() as f64 + 1.0) / 2.0;
        members.iter().for_each(|&i| ranks[i] = rank);
    }
    ranks
}

/// Spearman's coefficient: Pearson's of the average ranks.
///
/// Lists of different lengths are compared as far as both go.
pub fn spearman(a: &[f32], b: &[f32]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (average_ranks(&a[..n]), average_ranks(&b[..n]));
    let mean = (n as f64 + 1.0) / 2.0;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let norm = (dot(&a, &a) * dot(&b, &b)).sqrt();
    if norm > 0.0 { dot(&a, &b) / norm } else { 0.0 }
}

/// Kendall's tau-b in O(n log n).
///
/// Lists of different lengths are compared as far as both go.
///
/// # Source
/// W. R. Knight, "A computer method for calculating Kendall's tau with ungrouped data", JASA 61
/// (1966): sort by `a`, then count the exchanges of a merge sort by `b`.
pub fn kendall_tau_b(a: &[f32], b: &[f32]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (comparable(&a[..n]), comparable(&b[..n]));
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_unstable_by(|&i, &j| a[i].total_cmp(&a[j]).then(b[i].total_cmp(&b[j])));
    let tied_a = tied_pairs(&order, |i, j| a[i] == a[j]);
    let tied_both = tied_pairs(&order, |i, j| a[i] == a[j] && b[i] == b[j]);
    let tied_b = tied_pairs(&ascending(&b), |i, j| b[i] == b[j]);
    let mut by_b: Vec<f32> = order.iter().map(|&i| b[i]).collect();
    let discordant = exchanges(&mut by_b, &mut vec![0.0; n]);
    let pairs = pairs(n);
    // Integers up to here: a context of 170,000 positions has 1.4e10 pairs.
    let concordant_minus_discordant =
        (pairs + tied_both) as i64 - (tied_a + tied_b) as i64 - 2 * discordant as i64;
    let norm = ((pairs - tied_a) as f64 * (pairs - tied_b) as f64).sqrt();
    if norm > 0.0 { concordant_minus_discordant as f64 / norm } else { 0.0 }
}

fn pairs(n: usize) -> u64 {
    let n = n as u64;
    n * n.saturating_sub(1) / 2
}

/// Pairs of equal neighbours' groups along `order`, which must hold equals side by side.
fn tied_pairs(order: &[usize], equal: impl Fn(usize, usize) -> bool) -> u64 {
    order.chunk_by(|&i, &j| equal(i, j)).map(|tie| pairs(tie.len())).sum()
}

/// Sort ascending by merging; returns how many pairs stood in strictly descending order.
fn exchanges(values: &mut [f32], spare: &mut [f32]) -> u64 {
    let n = values.len();
    if n < 2 {
        return 0;
    }
    let middle = n / 2;
    let (left, right) = values.split_at_mut(middle);
    let (spare_left, spare_right) = spare.split_at_mut(middle);
    let mut count = exchanges(left, spare_left) + exchanges(right, spare_right);
    let (mut i, mut j) = (0, 0);
    for slot in spare.iter_mut() {
        let take_right = i == left.len() || (j < right.len() && right[j] < left[i]);
        if take_right {
            count += (left.len() - i) as u64;
            *slot = right[j];
            j += 1;
        } else {
            *slot = left[i];
            i += 1;
        }
    }
    values.copy_from_slice(spare);
    count
}

/// One zero, no not-a-number: then order and equality agree.
fn comparable(scores: &[f32]) -> Vec<f32> {
    scores.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 }).collect()
}

fn ascending(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_unstable_by(|&i, &j| scores[i].total_cmp(&scores[j]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    fn sign(x: f32) -> f64 {
        if x > 0.0 {
            1.0
        } else if x < 0.0 {
            -1.0
        } else {
            0.0
        }
    }

    /// Tau-b by its definition over all pairs.
    fn naive_tau(a: &[f32], b: &[f32]) -> f64 {
        let (mut s, mut na, mut nb) = (0.0, 0.0, 0.0f64);
        for i in 0..a.len() {
            for j in 0..i {
                let (x, y) = (sign(a[i] - a[j]), sign(b[i] - b[j]));
                s += x * y;
                na += x * x;
                nb += y * y;
            }
        }
        if na * nb > 0.0 { s / (na * nb).sqrt() } else { 0.0 }
    }

    /// Spearman by counting, without a sort.
    fn naive_spearman(a: &[f32], b: &[f32]) -> f64 {
        let rank = |v: &[f32]| -> Vec<f64> {
            v.iter()
                .map(|x| {
                    let below = v.iter().filter(|y| *y < x).count() as f64;
                    below + (v.iter().filter(|y| *y == x).count() as f64 + 1.0) / 2.0
                })
                .collect()
        };
        let (a, b) = (rank(a), rank(b));
        let mean = a.iter().sum::<f64>() / a.len() as f64;
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
        let norm = (dot(&a, &a) * dot(&b, &b)).sqrt();
        if norm > 0.0 { dot(&a, &b) / norm } else { 0.0 }
    }

    #[test]
    fn both_equal_their_definitions_with_and_without_ties() {
        let mut rng = pkv_core::Seed(3).stream("rank-test", 0);
        for n in [1, 2, 3, 5, 17, 64, 301] {
            for levels in [1, 2, 5, 1 << 20] {
                let mut list =
                    || -> Vec<f32> { (0..n).map(|_| rng.random_range(-levels..levels) as f32).collect() };
                let (a, b) = (list(), list());
                assert!((kendall_tau_b(&a, &b) - naive_tau(&a, &b)).abs() < 1e-12, "tau of {n}, {levels}");
                assert!((spearman(&a, &b) - naive_spearman(&a, &b)).abs() < 1e-12, "rho of {n}, {levels}");
            }
        }
    }

    #[test]
    fn known_values_and_constants() {
        // The example in the documentation of `scipy.stats.kendalltau`.
        let (a, b) = ([12.0, 2.0, 1.0, 12.0, 2.0], [1.0, 4.0, 7.0, 1.0, 0.0]);
        assert!((kendall_tau_b(&a, &b) + 0.471_404_520_791_031_7).abs() < 1e-12);
        assert_eq!(average_ranks(&a), [4.5, 2.5, 1.0, 4.5, 2.5]);
        assert_eq!(
            (spearman(&[1.0; 4], &[1.0, 2.0, 3.0, 4.0]), kendall_tau_b(&[1.0; 4], &[1.0; 4])),
            (0.0, 0.0)
        );
        assert_eq!((spearman(&[], &[]), kendall_tau_b(&[2.0], &[1.0])), (0.0, 0.0));
        assert_eq!(kendall_tau_b(&[0.0, -0.0, f32::NAN], &[1.0, 1.0, 0.0]), 1.0);
    }

    #[test]
    fn a_long_context_takes_no_square_of_it() {
        let n = 170_000;
        let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let b: Vec<f32> = a.iter().rev().copied().collect();
        assert_eq!(kendall_tau_b(&a, &b), -1.0);
    }
}
