//! The loss treats contexts on their own, computes only what is on, and refuses what it cannot mean.

use pkv_core::Seed;
use pkv_gpu::DeviceChoice;
use pkv_mapper::{MapperDims, Standardization, load_parameters};
use pkv_recipe::LossSection;
use pkv_train::{HybridLoss, LossTerms};
use rand::Rng;
use tch::{Device, Kind, Tensor};

fn device() -> Device {
    tch::set_num_threads(1);
    pkv_gpu::device(DeviceChoice::Auto).unwrap()
}

/// Uniform in (-1.7, 1.7): deviation 1.
fn random(seed: u64, shape: &[i64]) -> Tensor {
    let mut rng = Seed(seed).stream("loss-test", 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_: i64| rng.random_range(-1.7..1.7)).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn stats(label_mean: f32, label_std: f32) -> Standardization {
    let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
    Standardization { label_mean, label_std, ..Standardization::identity(&dims) }.to_device(device())
}

fn all() -> LossSection {
    LossSection { fine: 0.3, global: 0.1, cosine: 0.3, ..LossSection::default() }
}

fn new(section: &LossSection) -> HybridLoss {
    HybridLoss::new(section, &stats(-3.0, 2.5)).unwrap()
}

fn value(x: &Tensor) -> f64 {
    x.double_value(&[])
}

fn term(loss: &LossTerms, name: &str) -> f64 {
    value(&loss.terms.iter().find(|(n, _)| *n == name).unwrap().1)
}

#[test]
fn every_term_is_the_mean_over_contexts() {
    let loss = new(&all());
    let (scores, y) = (random(1, &[3, 5, 40]).to_device(device()), random(2, &[3, 5, 40]) * 3.0 - 3.0);
    let together = loss.of(&scores, &y, 4).unwrap();
    let alone: Vec<LossTerms> =
        (0..3).map(|i| loss.of(&scores.narrow(0, i, 1), &y.narrow(0, i, 1), 4).unwrap()).collect();
    for name in ["binary", "value_mse", "global", "cosine"] {
        let mean = alone.iter().map(|l| term(l, name)).sum::<f64>() / 3.0;
        assert!((term(&together, name) - mean).abs() < 1e-5, "{name}");
    }
    // Pairs are drawn by the place in the batch: the first context's are the same.
    let first = loss.of(&scores.narrow(0, 0, 1), &y.narrow(0, 0, 1), 4).unwrap();
    assert_eq!(term(&first, "fine"), term(&alone[0], "fine"));
    let other_pairs = loss.of(&scores, &y, 5).unwrap();
    assert_ne!(term(&other_pairs, "fine"), term(&together, "fine"));
    assert_eq!(term(&other_pairs, "binary"), term(&together, "binary"));
}

#[test]
fn terms_that_are_off_leave_no_trace() {
    let lean = LossSection { binary: 0.0, value_mse: 0.5, ..LossSection::default() };
    let loss = new(&lean);
    assert!(loss.parameters().is_empty());
    let names = |loss: &HybridLoss| loss.parameters().iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    let learned = ["loss.binary_log_scale", "loss.binary_offset", "loss.global_log_scale"];
    assert_eq!(names(&new(&all())), learned);
    let (scores, y) = (random(1, &[1, 5, 9]).to_device(device()), random(2, &[1, 5, 9]));
    let terms = loss.of(&scores, &y, 0).unwrap();
    assert_eq!(terms.terms.len(), 1);
    assert!((value(&terms.total) - 0.5 * term(&terms, "value_mse")).abs() < 1e-7);

    let error = loss.of(&scores, &y.narrow(2, 0, 8), 0).unwrap_err();
    assert!(error.to_string().contains("[1, 5, 9], labels [1, 5, 8]"), "{error}");
    let error = new(&all()).of_pairs(&scores, &y, None).unwrap_err();
    assert!(error.to_string().contains("`fine`"), "{error}");
    let off = LossSection { value_mse: 0.0, ..lean };
    assert!(new(&off).of(&scores, &y, 0).is_err());
    let no_ratio = LossSection { binary_ratios: vec![1.5], ..LossSection::default() };
    assert!(HybridLoss::new(&no_ratio, &stats(0.0, 1.0)).is_err());
}

/// The best constant costs 1 at every ratio, a perfect ranking much less once it is calibrated.
#[test]
fn the_binary_term_is_one_for_knowing_nothing() {
    let binary = LossSection { value_mse: 0.0, binary_ratios: vec![0.1, 0.02], ..LossSection::default() };
    let stats = stats(-3.0, 2.0);
    let mut loss = HybridLoss::new(&binary, &stats).unwrap();
    let y = random(2, &[2, 5, 100]) * 2.0 - 3.0;
    let offset: Vec<f32> = binary.binary_ratios.iter().map(|r| (r / (1.0 - r)).ln() as f32).collect();
    let mut named: Vec<(String, Tensor)> =
        loss.parameters().iter().map(|(n, x)| (n.clone(), x.detach().copy())).collect();
    named.iter_mut().find(|(n, _)| n == "loss.binary_offset").unwrap().1 = Tensor::from_slice(&offset);
    load_parameters(loss.parameters(), &named).unwrap();
    let nothing = Tensor::zeros([2, 5, 100], (Kind::Float, device()));
    let constant = value(&loss.of(&nothing, &y, 0).unwrap().total);
    assert!((constant - 1.0).abs() < 1e-5, "{constant}");

    loss.calibrate(&[y.narrow(0, 0, 1), y.narrow(0, 1, 1).narrow(2, 0, 90)]).unwrap();
    let perfect = stats.standardize_labels(&y).to_device(device());
    let calibrated = value(&loss.of(&perfect, &y, 0).unwrap().total);
    assert!(calibrated < 0.7, "{calibrated}");
    assert!(loss.calibrate(&[]).is_err());
    assert!(loss.calibrate(&[random(1, &[5, 9])]).is_err());
    assert!(loss.calibrate(&[y, random(1, &[1, 4, 9])]).is_err());
}

/// Predictions equal to the labels are the least that the other terms can be.
#[test]
fn perfect_predictions_cost_nothing() {
    let loss = new(&all());
    let y = random(2, &[2, 5, 100]) * 2.0 - 5.0;
    let perfect = stats(-3.0, 2.5).standardize_labels(&y).to_device(device());
    let least = loss.of(&perfect, &y, 0).unwrap();
    assert!(term(&least, "value_mse") < 1e-10 && term(&least, "cosine") < 1e-5);
    let wrong = loss.of(&perfect.neg(), &y, 0).unwrap();
    for name in ["value_mse", "fine", "global", "cosine"] {
        assert!(term(&wrong, name) > 2.0 * term(&least, name), "{name}");
    }
}

#[test]
fn tiny_contexts_have_a_loss_and_a_gradient() {
    for t in [1, 2] {
        let loss = new(&all());
        let scores = random(1, &[1, 5, t]).to_device(device()).set_requires_grad(true);
        let terms = loss.of(&scores, &random(3, &[1, 5, t]), 0).unwrap();
        terms.total.backward();
        assert!(value(&terms.total).is_finite());
        let learned = loss.parameters().iter().map(|(name, x)| (name.as_str(), x));
        for (name, x) in learned.chain([("scores", &scores)]) {
            assert_eq!(x.grad().isfinite().all().int64_value(&[]), 1, "{name} at {t} positions");
        }
    }
}
