//! The log-odds scale of labels, and their span pooling.

use pkv_recipe::TargetPool;
use tch::{Kind, Tensor};

/// Log-odds are clamped to this on either side.
pub const LOG_ODDS_LIMIT: f64 = 14.0;

/// A score as log-odds: `log p - log1p(-min(p, 1 - 1e-6))`, clamped to +-14.
///
/// The logarithm alone squeezes the order of the scores near 1 together, where the strongest pairs
/// are: 45% recall at 1% kept against 60% for the same regression on log-odds.
///
/// # Shapes
/// - `p`: any shape, f16, f32 or f64, 0 or more; scores above 1 (KVzip+) end near the upper limit
/// - returns the shape of `p`, f32, same device
pub fn log_odds(p: &Tensor) -> Tensor {
    let p = p.to_kind(Kind::Float);
    let below_one = p.clamp_max(1.0 - 1e-6);
    (p.log() - below_one.neg().log1p()).clamp(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)
}

/// Span pooling along the last dimension: `(1 - blend) y + blend maxpool_width(y)`, centred.
///
/// The neighbours of an important position matter too: keeping them answers more questions at
/// small ratios than KVzip's own ranking. At the ends the window holds what there is.
///
/// # Shapes
/// - `y_ot`: `[.., positions]`, log-odds
/// - returns the same shape, f32, same device
///
/// # Panics
/// An even width, which has no centre; recipes refuse it.
pub fn pool_targets(y_ot: &Tensor, pool: &TargetPool) -> Tensor {
    let y_ot = y_ot.to_kind(Kind::Float);
    let TargetPool { width, blend } = *pool;
    assert!(width % 2 == 1, "a pooling window of {width} positions has no centre");
    if width == 1 || blend == 0.0 || y_ot.numel() == 0 {
        return y_ot;
    }
    let shape = y_ot.size();
    let positions = shape.last().copied().unwrap_or(1);
    let (width, half) = (width as i64, width as i64 / 2);
    let peak_ot =
        y_ot.reshape([1, -1, positions]).max_pool1d([width], [1], [half], [1], false).reshape(&shape);
    y_ot * (1.0 - blend) + peak_ot * blend
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_gpu::DeviceChoice;

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::try_from(t.reshape([-1])).unwrap()
    }

    #[test]
    fn log_odds_follow_the_formula_and_its_limits() {
        pkv_gpu::device(DeviceChoice::Cpu).unwrap();
        let p = [0.0f32, 1e-7, 0.01, 0.5, 0.9, 0.999, 1.0, 3.0];
        for (got, p) in values(&log_odds(&Tensor::from_slice(&p))).into_iter().zip(p) {
            let p = f64::from(p);
            let want = (p.ln() - (-p.min(1.0 - 1e-6)).ln_1p()).clamp(-14.0, 14.0);
            // f32 has 1 - 1e-6 to 6%, which is what 1 - p is there.
            let tolerance = if p >= 1.0 { 0.02 } else { 1e-4 };
            assert!((f64::from(got) - want).abs() < tolerance, "p = {p}: {got}, expected {want}");
        }
        let half = Tensor::from_slice(&[0.25f32]).to_kind(Kind::Half);
        assert_eq!(log_odds(&half).kind(), Kind::Float);
    }

    #[test]
    fn pooling_equals_a_naive_window() {
        for (rows, positions) in [(1usize, 1usize), (2, 2), (3, 7), (2, 20)] {
            let y: Vec<f32> = (0..rows * positions).map(|i| ((i * 37 + 11) % 23) as f32 - 11.0).collect();
            let y_ot = Tensor::from_slice(&y).reshape([rows as i64, positions as i64]);
            for (width, blend) in [(1, 0.5), (3, 0.5), (7, 1.0), (5, 0.0), (3, 0.25)] {
                let got = values(&pool_targets(&y_ot, &TargetPool { width, blend }));
                for (i, got) in got.into_iter().enumerate() {
                    let (row, t) = (i / positions, i % positions);
                    let (a, b) = (t.saturating_sub(width / 2), (t + width / 2 + 1).min(positions));
                    let peak =
                        y[row * positions + a..row * positions + b].iter().copied().fold(f32::MIN, f32::max);
                    let want = f64::from(y[i]) * (1.0 - blend) + f64::from(peak) * blend;
                    assert!((f64::from(got) - want).abs() < 1e-5, "width {width} at {row}, {t}");
                }
            }
        }
        let y_lht = Tensor::from_slice(&[1.0f32, 5.0, 2.0, 0.0]).reshape([1, 2, 2]);
        assert_eq!(values(&pool_targets(&y_lht, &TargetPool { width: 3, blend: 1.0 })), [5.0, 5.0, 2.0, 2.0]);
    }
}
