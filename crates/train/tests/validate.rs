//! Validation on the device and on the host: the same numbers, whatever memory is kept between validations.

use pkv_core::{Seed, Split};
use pkv_mapper::Standardization;
use pkv_shard::FeatureFolders;
use pkv_train::{Dataset, Learner, Ranking, Validation, Validator};
use tch::Device;

use crate::common::*;

/// A mapper whose scores are not zero, without training it.
fn learner(setup: &Setup, dataset: &Dataset) -> Learner {
    let dims = dataset.dims();
    let stats = Standardization { label_mean: -3.0, label_std: 2.0, ..Standardization::identity(&dims) };
    let learner = Learner::new(&setup.mapper, &setup.loss, dims, stats, Seed(5), Device::Cpu).unwrap();
    let _no_grad = tch::no_grad_guard();
    for (_, parameter) in learner.mapper.parameters() {
        let n = parameter.numel() as i64;
        let wave = (tch::Tensor::arange(n, (tch::Kind::Float, Device::Cpu)) * 1.7).sin() * 0.2;
        let _ = parameter.shallow_clone().g_add_(&wave.reshape(parameter.size()));
    }
    learner
}

#[track_caller]
fn same(a: &Validation, b: &Validation) {
    let near = |what: &str, a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{what}: {a} and {b}");
    assert_eq!(a.contexts, b.contexts);
    // Contexts of one length are predicted together, which may round differently.
    assert!((a.loss - b.loss).abs() < 1e-5 * b.loss, "loss {} and {}", a.loss, b.loss);
    near("score", a.score, b.score);
    near("Spearman", a.spearman, b.spearman);
    near("Kendall", a.kendall, b.kendall);
    assert_eq!(a.kept.len(), b.kept.len());
    for ((policy, ratio, a), (_, _, b)) in a.kept.iter().zip(&b.kept) {
        near(&format!("recall of {policy:?} at {ratio}"), a.recall, b.recall);
        near("mass", a.mass, b.mass);
        near("mass of the oracle", a.mass_of_oracle, b.mass_of_oracle);
        near("ratio", a.realised_ratio, b.realised_ratio);
    }
}

/// 30 contexts are more than one wave of threads, and several have the same length.
#[test]
fn the_device_measures_what_the_host_measures() {
    let setup = Setup::new(3, 30);
    let dataset = Dataset::open(
        &setup.stage("examples"),
        &setup.stage("labels"),
        &FeatureFolders::one(&setup.stage("features")),
    )
    .unwrap();
    let rows = dataset.rows(Split::Validation);
    let learner = learner(&setup, &dataset);
    let of = |ranking, rows: &[u64]| Validator::new(&dataset, rows.to_vec(), &setup.train, Seed(3), ranking);
    let expected = of(Ranking::Host, &rows).with_budget(0).validate(&learner).unwrap();
    assert!(expected.score > 0.0 && expected.kendall != 0.0 && expected.loss > 0.0, "{expected:?}");

    for ranking in [Ranking::Host, Ranking::Device] {
        let mut validator = of(ranking, &rows);
        let first = validator.validate(&learner).unwrap();
        same(&first, &expected);
        let kept = validator.kept_bytes();
        // From what is kept.
        assert_eq!(validator.validate(&learner).unwrap(), first);
        assert_eq!(validator.kept_bytes(), kept);

        let mut tight = of(ranking, &rows).with_budget(kept / 2);
        assert_eq!(tight.validate(&learner).unwrap(), first);
        assert_eq!(tight.validate(&learner).unwrap(), first);
        assert!(tight.kept_bytes() > 0 && tight.kept_bytes() <= kept / 2, "{} of {kept}", tight.kept_bytes());

        let mut none = of(ranking, &rows).with_budget(0);
        assert_eq!(none.validate(&learner).unwrap(), first);
        assert_eq!(none.kept_bytes(), 0);
    }

    // Other contexts, another result: what is compared is the contexts' own.
    let fewer = of(Ranking::Device, &rows[1..]).validate(&learner).unwrap();
    assert!((fewer.score - expected.score).abs() > 1e-6);
    same(&fewer, &of(Ranking::Host, &rows[1..]).validate(&learner).unwrap());
}
