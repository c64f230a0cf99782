//! The factors of scores against plain loops in f64 that share no code with them. The scores themselves:
//! `gpu/src/ops/tests/scores.rs`.

use pkv_core::{Rng, Seed};
use pkv_score::kvzip_plus;
use pkv_test_pair::device;
use pkv_test_support::loops::difference;
use pkv_test_support::tensors::flat;
use rand::Rng as _;
use tch::{Kind, Tensor};

/// Numbers that f32 holds exactly, so that the reference sees the same inputs.
fn numbers(rng: &mut Rng, n: usize, low: f32, high: f32) -> Vec<f64> {
    (0..n).map(|_| f64::from(rng.random_range(low..high))).collect()
}

fn tensor(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values).view(shape).to_kind(Kind::Float).to_device(device())
}

#[test]
fn kvzip_plus_factors_match_loops_in_f64() {
    let (heads, group, head_dim, hidden, positions, rows) = (2, 3, 5, 11, 7, 4);
    let rng = &mut Seed(4).stream("plus naive", 0);
    let v = numbers(rng, heads * positions * head_dim, -2.0, 2.0);
    let w = numbers(rng, hidden * heads * group * head_dim, -2.0, 2.0);
    let x = numbers(rng, rows * hidden, -2.0, 2.0);
    let size = |a: usize, b: usize| [a as i64, b as i64];
    let weighting = kvzip_plus(
        &tensor(&x, &size(rows, hidden)),
        &tensor(&v, &[heads as i64, positions as i64, head_dim as i64]),
        &tensor(&w, &size(hidden, heads * group * head_dim)),
    )
    .unwrap();
    let width = heads * group * head_dim;
    let mut columns = Vec::new();
    for q in 0..heads * group {
        for t in 0..positions {
            let value = &v[(q / group * positions + t) * head_dim..][..head_dim];
            let row = |m: usize| -> f64 {
                let weights = &w[m * width + q * head_dim..][..head_dim];
                value.iter().zip(weights).map(|(a, b)| a * b).sum()
            };
            columns.push((0..hidden).map(|m| row(m).powi(2)).sum::<f64>().sqrt());
        }
    }
    let norms: Vec<f64> =
        x.chunks(hidden).map(|r| 1.0 / r.iter().map(|a| a * a).sum::<f64>().sqrt()).collect();
    assert!(difference(&columns, &flat(&weighting.columns_qt)) < 1e-4);
    assert!(difference(&norms, &flat(&weighting.rows_s)) < 1e-6);
}
