//! The sum of a method's scores and KeyDiff's, for the policy `pair-keydiff`.

use tch::{Kind, Tensor};

/// Smallest standard deviation to divide by: equal scores become zeros.
const SMALLEST: f64 = 1e-30;

/// `scores_lht`, and `weight` times KeyDiff's scores, each standardized over the whole context.
///
/// Scores that need no attention keep the few pairs that differ from all others, which a ranking by
/// predicted attention loses first when little is kept.
///
/// # Shapes
/// - `scores_lht`: `[.., positions]`, any float kind
/// - `key_diff_lht`: the same shape, KeyDiff's scores of the same KV pairs
/// - returns the same shape, same device, f64; `scores_lht` itself if `weight` is 0
///
/// # Source
/// KeyDiff (arXiv 2504.15364) gives the second scores; their sum with the first is our own, measured in
/// `recipes/qwen2.5-coder-1.5b--qwen2.5-coder-0.5b/results.md`.
pub(crate) fn with_key_diff(scores_lht: &Tensor, key_diff_lht: &Tensor, weight: f64) -> Tensor {
    if weight == 0.0 || scores_lht.numel() == 0 {
        return scores_lht.shallow_clone();
    }
    standardized(scores_lht) + standardized(&key_diff_lht.to_device(scores_lht.device())) * weight
}

/// Mean 0 and standard deviation 1 over all that are finite, f64; what is not finite stays as it is.
fn standardized(scores: &Tensor) -> Tensor {
    let scores = scores.to_kind(Kind::Double);
    let finite = scores.masked_select(&scores.isfinite());
    if finite.numel() == 0 {
        return scores;
    }
    (&scores - finite.mean(Kind::Double)) / finite.std(false).clamp_min(SMALLEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_what_a_naive_one_is() {
        let (scores, keys) = ([1.0_f32, 2.0, 4.0, 9.0, f32::NEG_INFINITY], [0.5_f32, -0.5, 0.25, 0.0, 1.0]);
        let naive = |x: &[f32]| -> Vec<f64> {
            let some: Vec<f64> = x.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x)).collect();
            let mean = some.iter().sum::<f64>() / some.len() as f64;
            let variance = some.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / some.len() as f64;
            x.iter().map(|&x| (f64::from(x) - mean) / variance.sqrt()).collect()
        };
        let sum =
            with_key_diff(&Tensor::from_slice(&scores), &Tensor::from_slice(&keys), 0.3).view([1, 1, 5]);
        for (i, (a, b)) in naive(&scores).into_iter().zip(naive(&keys)).enumerate() {
            let (found, expected) = (sum.double_value(&[0, 0, i as i64]), a + 0.3 * b);
            assert!(found == expected || (found - expected).abs() < 1e-12, "{i}: {found} {expected}");
        }
    }

    #[test]
    fn nothing_is_added_without_a_weight_or_a_difference() {
        let scores = Tensor::from_slice(&[3.0_f32, 1.0, 2.0]);
        let equal = Tensor::from_slice(&[0.1_f32, 0.1, 0.1]);
        assert_eq!(with_key_diff(&scores, &equal, 0.0), scores);
        assert_eq!(with_key_diff(&scores, &equal, 0.5), standardized(&scores));
    }
}
