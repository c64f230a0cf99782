//! The loss treats contexts on their own, computes only what is on, and refuses what it cannot mean.

use pkv_core::Seed;
use pkv_mapper::{LossTerms, Mapper, MapperDims, Standardization, hybrid_loss};
use pkv_recipe::LossSection;
use tch::{Device, Kind, Tensor};

use crate::fixtures::{device, random, small};

fn all() -> LossSection {
    LossSection { fine: 0.3, global: 0.1, cosine: 0.3, ..LossSection::default() }
}

fn value(x: &Tensor) -> f64 {
    x.double_value(&[])
}

fn term(loss: &LossTerms, name: &str) -> f64 {
    value(&loss.terms.iter().find(|(n, _)| *n == name).unwrap().1)
}

#[test]
fn every_term_is_the_mean_over_contexts() {
    let mapper = small("linear", &[], device());
    let (scores, y) = (random(1, &[3, 5, 40]).to_device(mapper.device()), random(2, &[3, 5, 40]) * 3.0 - 3.0);
    let together = hybrid_loss(&mapper, &scores, &y, &all(), 4).unwrap();
    let alone: Vec<LossTerms> = (0..3)
        .map(|i| hybrid_loss(&mapper, &scores.narrow(0, i, 1), &y.narrow(0, i, 1), &all(), 4).unwrap())
        .collect();
    for name in ["binary", "value_mse", "global", "cosine"] {
        let mean = alone.iter().map(|l| term(l, name)).sum::<f64>() / 3.0;
        assert!((term(&together, name) - mean).abs() < 1e-5, "{name}");
    }
    // Pairs are drawn by the place in the batch: the first context's are the same.
    let first = hybrid_loss(&mapper, &scores.narrow(0, 0, 1), &y.narrow(0, 0, 1), &all(), 4).unwrap();
    assert_eq!(term(&first, "fine"), term(&alone[0], "fine"));
    let other_pairs = hybrid_loss(&mapper, &scores, &y, &all(), 5).unwrap();
    assert_ne!(term(&other_pairs, "fine"), term(&together, "fine"));
    assert_eq!(term(&other_pairs, "binary"), term(&together, "binary"));
}

#[test]
fn terms_that_are_off_leave_no_trace() {
    let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
    let lean = LossSection { binary: 0.0, value_mse: 0.5, ..LossSection::default() };
    let stats = Standardization::identity(&dims);
    let section = small("linear", &[], Device::Cpu).section().clone();
    let mapper = Mapper::new(&section, &lean, dims, stats, Seed(1), Device::Cpu).unwrap();
    assert!(mapper.parameters().iter().all(|(name, _)| !name.starts_with("loss.")));
    let (scores, y) = (random(1, &[1, 5, 9]), random(2, &[1, 5, 9]));
    let loss = hybrid_loss(&mapper, &scores, &y, &lean, 0).unwrap();
    assert_eq!(loss.terms.len(), 1);
    assert!((value(&loss.total) - 0.5 * term(&loss, "value_mse")).abs() < 1e-7);

    let error = hybrid_loss(&mapper, &scores, &y, &all(), 0).unwrap_err();
    assert!(format!("{error:#}").contains("built with `loss.binary = 0`"), "{error:#}");
    let other = LossSection { binary_ratios: vec![0.5], ..all() };
    let error = hybrid_loss(&small("linear", &[], Device::Cpu), &scores, &y, &other, 0).unwrap_err();
    assert!(format!("{error:#}").contains("`loss.binary_ratios`"), "{error:#}");
    let error = hybrid_loss(&mapper, &scores, &y.narrow(2, 0, 8), &lean, 0).unwrap_err();
    assert!(error.to_string().contains("[1, 5, 9], labels [1, 5, 8]"), "{error}");
    let off = LossSection { value_mse: 0.0, ..lean };
    assert!(hybrid_loss(&mapper, &scores, &y, &off, 0).is_err());
}

/// The best constant costs 1 at every ratio, a perfect ranking much less once it is calibrated.
#[test]
fn the_binary_term_is_one_for_knowing_nothing() {
    let device = device();
    let binary = LossSection { value_mse: 0.0, binary_ratios: vec![0.1, 0.02], ..LossSection::default() };
    let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
    let stats = Standardization { label_mean: -3.0, label_std: 2.0, ..Standardization::identity(&dims) };
    let section = small("linear", &[], device).section().clone();
    let mut mapper = Mapper::new(&section, &binary, dims, stats, Seed(1), device).unwrap();
    let y = random(2, &[2, 5, 100]) * 2.0 - 3.0;
    let offset: Vec<f32> = binary.binary_ratios.iter().map(|r| (r / (1.0 - r)).ln() as f32).collect();
    let mut named: Vec<(String, Tensor)> =
        mapper.parameters().iter().map(|(n, x)| (n.clone(), x.detach().copy())).collect();
    named.iter_mut().find(|(n, _)| n == "loss.binary_offset").unwrap().1 = Tensor::from_slice(&offset);
    mapper.load_parameters(&named).unwrap();
    let nothing = Tensor::zeros([2, 5, 100], (Kind::Float, device));
    let constant = value(&hybrid_loss(&mapper, &nothing, &y, &binary, 0).unwrap().total);
    assert!((constant - 1.0).abs() < 1e-5, "{constant}");

    mapper.calibrate(&[y.narrow(0, 0, 1), y.narrow(0, 1, 1).narrow(2, 0, 90)]).unwrap();
    let perfect = mapper.standardization().standardize_labels(&y).to_device(device);
    let calibrated = value(&hybrid_loss(&mapper, &perfect, &y, &binary, 0).unwrap().total);
    assert!(calibrated < 0.7, "{calibrated}");
    assert!(mapper.calibrate(&[]).is_err());
    assert!(mapper.calibrate(&[random(1, &[1, 4, 9])]).is_err());
}

/// Predictions equal to the labels are the least that the other terms can be.
#[test]
fn perfect_predictions_cost_nothing() {
    let mapper = small("linear", &[], device());
    let y = random(2, &[2, 5, 100]) * 2.0 - 5.0;
    let perfect = mapper.standardization().standardize_labels(&y).to_device(mapper.device());
    let loss = hybrid_loss(&mapper, &perfect, &y, &all(), 0).unwrap();
    assert!(term(&loss, "value_mse") < 1e-10 && term(&loss, "cosine") < 1e-5);
    let wrong = hybrid_loss(&mapper, &perfect.neg(), &y, &all(), 0).unwrap();
    for name in ["value_mse", "fine", "global", "cosine"] {
        assert!(term(&wrong, name) > 2.0 * term(&loss, name), "{name}");
    }
}

#[test]
fn tiny_contexts_have_a_loss_and_a_gradient() {
    for t in [1, 2] {
        let mapper = small("hybrid-axial", &[1], Device::Cpu);
        let scores = mapper.forward(&random(1, &[1, 3, 2, t]), &random(2, &[1, 2, t]));
        let loss = hybrid_loss(&mapper, &scores, &random(3, &[1, 5, t]), &all(), 0).unwrap();
        loss.total.backward();
        assert!(value(&loss.total).is_finite());
        for (name, x) in mapper.parameters() {
            assert_eq!(x.grad().isfinite().all().int64_value(&[]), 1, "{name} at {t} positions");
        }
    }
}
