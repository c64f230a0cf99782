//! How much of the variance of KVzip's log scores a linear map of the predictions explains.
//!
//! # Source
//! KVzap (arXiv 2601.07891) judges its scorers by the squared Pearson correlation of predicted and true log
//! scores, over heads and positions alike. Differs: KVzap's log scores are those of KVzip+, ours of KVzip.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// Logarithms of scores below it are its own: that of the smallest f32 label, 0, is no number. e^-16, as in
/// the features.
pub const LOG_FLOOR: f64 = -16.0;

/// Squared Pearson correlation of `predicted` with the logarithms of `scores`, all KV pairs together.
///
/// Predictions are taken as they are: log-odds are nearly a logarithm; give raw scores as logarithms. `None`
/// where one side has no variance or a number that is not finite. Lists of different lengths are compared as
/// far as both go.
pub fn log_r2(predicted: &[f32], scores: &[f32]) -> Option<f64> {
    let logs = || scores.iter().map(|&s| f64::from(s).ln().max(LOG_FLOOR));
    let pairs = || predicted.iter().map(|&p| f64::from(p)).zip(logs());
    let n = predicted.len().min(scores.len()) as f64;
    let (sum_x, sum_y) = pairs().fold((0.0, 0.0), |(sx, sy), (x, y)| (sx + x, sy + y));
    let (mean_x, mean_y) = (sum_x / n, sum_y / n);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in pairs().map(|(x, y)| (x - mean_x, y - mean_y)) {
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    share_of_variance(xx, yy, xy)
}

/// The logarithms of scores that [`log_r2_of`] takes, f64, on the scores' device.
///
/// # Shapes
/// - `scores`: any shape, any float kind; returns the same shape
pub fn log_scores(scores: &Tensor) -> Tensor {
    // A negative score has no logarithm and counts as the floor, as on the host.
    let logs = scores.to_kind(Kind::Double).log();
    logs.fmax(&Tensor::from(LOG_FLOOR).to_device(scores.device()))
}

/// [`log_r2`] of tensors on one device, but for the order of its sums.
///
/// # Shapes
/// - `predicted`: any shape, any float kind; `log_scores`: the same shape, of [`log_scores`]
///
/// # Errors
/// The shapes differ, or the device fails.
pub fn log_r2_of(predicted: &Tensor, log_scores: &Tensor) -> Result<Option<f64>> {
    super::same_shape(predicted, log_scores)?;
    let centred = |x: &Tensor| {
        let x = x.to_kind(Kind::Double).reshape([-1]);
        &x - x.mean(Kind::Double)
    };
    let (x, y) = (centred(predicted), centred(log_scores));
    let dots = [(&x, &x), (&y, &y), (&x, &y)].map(|(a, b)| (a * b).sum(Kind::Double));
    let dots: Vec<f64> = Tensor::stack(&dots, 0).to_device(Device::Cpu).try_into()?;
    Ok(share_of_variance(dots[0], dots[1], dots[2]))
}

fn share_of_variance(xx: f64, yy: f64, xy: f64) -> Option<f64> {
    let r2 = xy * xy / (xx * yy);
    (xx > 0.0 && yy > 0.0 && r2.is_finite()).then_some(r2.min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_gpu::DeviceChoice;
    use rand::Rng;

    /// The sums of the textbook, without means.
    fn naive(x: &[f64], y: &[f64]) -> f64 {
        let n = x.len() as f64;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let sum = |a: &[f64]| a.iter().sum::<f64>();
        let covariance = |a: &[f64], b: &[f64]| n * dot(a, b) - sum(a) * sum(b);
        covariance(x, y).powi(2) / (covariance(x, x) * covariance(y, y))
    }

    #[test]
    fn it_is_the_square_of_the_textbooks_correlation() {
        let mut rng = pkv_core::Seed(5).stream("log r2", 0);
        for noise in [0.0, 0.5, 4.0] {
            let scores: Vec<f32> = (0..500).map(|_| rng.random_range(1e-5..1.0f32)).collect();
            let predicted: Vec<f32> =
                scores.iter().map(|s| 2.0 - 3.0 * s.ln() + noise * rng.random_range(-1.0..1.0f32)).collect();
            let x: Vec<f64> = predicted.iter().map(|&p| p.into()).collect();
            let y: Vec<f64> = scores.iter().map(|&s| f64::from(s).ln()).collect();
            let found = log_r2(&predicted, &scores).unwrap();
            assert!((found - naive(&x, &y)).abs() < 1e-9, "{noise}: {found}");
            assert!(noise > 0.0 || found > 1.0 - 1e-9, "a line explains all: {found}");
        }
    }

    #[test]
    fn scores_of_zero_have_the_lowest_logarithm() {
        let floor = (LOG_FLOOR as f32).exp();
        let predicted = [0.3f32, 0.1, 0.9, 0.4];
        let found = log_r2(&predicted, &[0.5, 0.0, 1.0, 0.2]).unwrap();
        assert!((found - log_r2(&predicted, &[0.5, floor, 1.0, 0.2]).unwrap()).abs() < 1e-6);
    }

    #[test]
    fn without_variance_or_with_odd_numbers_there_is_none() {
        assert_eq!(log_r2(&[1.0; 3], &[0.1, 0.2, 0.3]), None);
        assert_eq!(log_r2(&[1.0, 2.0, 3.0], &[0.2; 3]), None);
        assert_eq!(log_r2(&[1.0, f32::NAN, 3.0], &[0.1, 0.2, 0.3]), None);
        assert_eq!(log_r2(&[1.0, f32::INFINITY, 3.0], &[0.1, 0.2, 0.3]), None);
        assert_eq!(log_r2(&[], &[]), None);
    }

    #[test]
    fn tensors_give_the_same_number() {
        let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
        let mut rng = pkv_core::Seed(6).stream("log r2", 0);
        let mut scores: Vec<f32> = (0..600).map(|_| rng.random_range(1e-9..1.0f32)).collect();
        scores[..4].copy_from_slice(&[0.0, 1.0, -1.0, 1e-30]);
        let predicted: Vec<f32> =
            scores.iter().map(|s| s.sqrt().max(0.0) + rng.random_range(-0.3..0.3f32)).collect();
        let tensor = |x: &[f32]| Tensor::from_slice(x).reshape([2, 3, -1]).to_device(device);
        let of = |x: &[f32]| log_r2_of(&tensor(x), &log_scores(&tensor(&scores))).unwrap();
        let (found, expected) = (of(&predicted).unwrap(), log_r2(&predicted, &scores).unwrap());
        assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
        for odd in [vec![1.0; 600], vec![f32::NAN; 600], vec![f32::INFINITY; 600]] {
            assert_eq!((of(&odd), log_r2(&odd, &scores)), (None, None));
        }
        assert!(log_r2_of(&tensor(&scores), &tensor(&scores).flatten(0, 1)).is_err());
    }
}
