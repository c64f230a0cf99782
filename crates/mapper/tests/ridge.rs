//! The closed form against naive normal equations in f64, with the bias as a column of its own.

use pkv_mapper::{MapperDims, RidgeAccumulator, Standardization};
use tch::{Device, Kind, Tensor};

use crate::fixtures::{device, max_difference, random, small};

const DIMS: MapperDims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };

/// Solve A X = B by Gauss-Jordan elimination with pivots.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let n = a.len();
    for column in 0..n {
        let pivot = (column..n).max_by(|&i, &j| a[i][column].abs().total_cmp(&a[j][column].abs())).unwrap();
        a.swap(column, pivot);
        b.swap(column, pivot);
        for row in 0..n {
            if row != column {
                let by = a[row][column] / a[column][column];
                (0..n).for_each(|k| a[row][k] -= by * a[column][k]);
                (0..b[0].len()).for_each(|k| b[row][k] -= by * b[column][k]);
            }
        }
    }
    (0..n).map(|i| b[i].iter().map(|x| x / a[i][i]).collect()).collect()
}

/// Weight `[o, f]` and bias `[o]` from rows of features and labels.
fn naive(x: &[Vec<f64>], y: &[Vec<f64>], ridge: f64) -> (Tensor, Tensor) {
    let (n, f, o) = (x.len(), x[0].len(), y[0].len());
    let with_one: Vec<Vec<f64>> = x.iter().map(|row| row.iter().copied().chain([1.0]).collect()).collect();
    let mean = |k: usize| x.iter().map(|row| row[k]).sum::<f64>() / n as f64;
    let spread: f64 = (0..f).map(|k| x.iter().map(|row| (row[k] - mean(k)).powi(2)).sum::<f64>()).sum();
    let penalty = ridge * spread / f as f64;
    let product =
        |left: usize, right: &dyn Fn(usize) -> f64| (0..n).map(|i| with_one[i][left] * right(i)).sum::<f64>();
    let mut a: Vec<Vec<f64>> =
        (0..=f).map(|j| (0..=f).map(|k| product(j, &|i| with_one[i][k])).collect()).collect();
    (0..f).for_each(|k| a[k][k] += penalty);
    let b = (0..=f).map(|j| (0..o).map(|k| product(j, &|i| y[i][k])).collect()).collect();
    let solution = solve(a, b);
    let weight: Vec<f64> = (0..o).flat_map(|k| solution[..f].iter().map(move |row| row[k])).collect();
    (Tensor::from_slice(&weight).reshape([o as i64, f as i64]), Tensor::from_slice(&solution[f]))
}

fn rows(x_bct: &Tensor) -> Vec<Vec<f64>> {
    let (b, c, t) = x_bct.size3().unwrap();
    let flat: Vec<f64> =
        Vec::try_from(x_bct.transpose(1, 2).contiguous().to_kind(Kind::Double).flatten(0, -1)).unwrap();
    assert_eq!(flat.len() as i64, b * c * t);
    flat.chunks(c as usize).map(<[f64]>::to_vec).collect()
}

#[test]
fn the_closed_form_solves_the_naive_equations() {
    for (ridge, tolerance) in [(1e-4, 1e-8), (0.5, 1e-10)] {
        let stats = Standardization { label_mean: -2.0, label_std: 4.0, ..Standardization::identity(&DIMS) };
        let mut sums = RidgeAccumulator::new(DIMS, &stats, device()).unwrap();
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for (i, (b, t)) in [(2, 40), (1, 1), (3, 17)].into_iter().enumerate() {
            let seed = 10 * i as u64;
            // Uncentred, and correlated, so that bias and penalty matter.
            let heads = random(seed, &[b, 3, 2, t]) + 1.5;
            let globals = random(seed + 1, &[b, 2, t]) + heads.select(1, 0);
            let labels = random(seed + 2, &[b, 5, t]) * 3.0 - 1.0 + heads.select(1, 1).narrow(1, 0, 1);
            sums.add(&heads, &globals, &labels).unwrap();
            x.extend(rows(&Tensor::cat(&[&heads.flatten(1, 2), &globals], 1)));
            y.extend(rows(&((labels + 2.0) / 4.0)));
        }
        let (weight, bias) = sums.solve(ridge).unwrap();
        let (naive_weight, naive_bias) = naive(&x, &y, ridge);
        let difference = max_difference(&weight, &naive_weight).max(max_difference(&bias, &naive_bias));
        println!("ridge {ridge}: {difference:.1e}");
        assert!(difference < tolerance, "ridge {ridge}: {difference:e}");
    }
}

/// The regression standardizes as the mapper does: on labels that are a linear map of clamped,
/// standardized features it finds that map, and the mapper reproduces the labels.
#[test]
fn a_linear_mapper_is_found_again() {
    let device = device();
    let mapper = small("linear", &[], device);
    let mut stats = Standardization { label_mean: -3.0, label_std: 2.5, ..Standardization::identity(&DIMS) };
    stats.heads_mean_pc = random(1, &[3, 2]);
    stats.heads_std_pc = random(2, &[3, 2]).abs() + 0.1;
    let mut truth = pkv_mapper::Mapper::new(
        mapper.section(),
        DIMS,
        stats.to_device(Device::Cpu),
        pkv_core::Seed(1),
        device,
    )
    .unwrap();
    truth.set_linear(&random(3, &[5, 8]), &random(4, &[5])).unwrap();
    let (heads, globals) = (random(5, &[2, 3, 2, 300]) * 3.0, random(6, &[2, 2, 300]));
    let scores = truth.forward(&heads, &globals).detach();
    let labels = truth.standardization().to_log_odds(&scores);
    let mut sums = RidgeAccumulator::new(DIMS, &stats, device).unwrap();
    sums.add(&heads, &globals, &labels).unwrap();
    let (weight, bias) = sums.solve(1e-9).unwrap();
    truth.set_linear(&weight, &bias).unwrap();
    let difference = max_difference(&truth.forward(&heads, &globals), &scores);
    assert!(difference < 1e-4, "{difference:e}");
}

#[test]
fn what_cannot_be_solved_is_an_error() {
    let stats = Standardization::identity(&DIMS);
    let mut sums = RidgeAccumulator::new(DIMS, &stats, Device::Cpu).unwrap();
    assert!(sums.solve(1e-4).unwrap_err().to_string().contains("no position"));
    let (heads, globals) = (random(1, &[1, 3, 2, 9]), random(2, &[1, 2, 9]));
    assert!(sums.add(&heads, &globals, &random(3, &[1, 4, 9])).is_err(), "labels of another target");
    assert!(sums.add(&heads, &random(2, &[1, 2, 8]), &random(3, &[1, 5, 9])).is_err());
    sums.add(&heads, &globals, &(random(3, &[1, 5, 9]) * f64::NAN)).unwrap();
    let said = sums.solve(1e-4).unwrap_err().to_string();
    assert!(said.contains("a label is not finite"), "{said}");
    let mut constant = RidgeAccumulator::new(DIMS, &stats, Device::Cpu).unwrap();
    constant.add(&(&heads * 0.0 + 1.0), &globals, &random(3, &[1, 5, 9])).unwrap();
    let (weight, _) = constant.solve(1e-3).unwrap();
    assert_eq!(weight.narrow(1, 0, 6).abs().max().double_value(&[]), 0.0, "a constant tells nothing");
    // One and the same everywhere, far from 0, as after the clamp: nothing is left but the labels' means.
    for value in [0.0, 1.0, 0.1, -5.7] {
        let mut constant = RidgeAccumulator::new(DIMS, &stats, Device::Cpu).unwrap();
        let labels = random(3, &[1, 5, 9]);
        for _ in 0..40 {
            constant.add(&(&heads * 0.0 + value), &(&globals * 0.0 - value), &labels).unwrap();
        }
        let (weight, bias) = constant.solve(1e-4).unwrap();
        let features = Tensor::cat(
            &[
                Tensor::full([6], value, (Kind::Double, Device::Cpu)),
                Tensor::full([2], -value, (Kind::Double, Device::Cpu)),
            ],
            0,
        );
        let predicted = weight.to_kind(Kind::Double).matmul(&features) + bias;
        let means = labels.mean_dim(&[0i64, 2][..], false, Kind::Double);
        assert!(max_difference(&predicted, &means) < 1e-5, "{value}");
    }
}
