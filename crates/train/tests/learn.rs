//! A run that learns, in every variant.

use pkv_checkpoint::CheckpointStore;
use pkv_recipe::{TargetPool, TrainDtype, Variant};
use serde_json::Value;

use crate::common::*;

fn of<'a>(metrics: &'a [Value], kind: &str) -> Vec<&'a Value> {
    metrics.iter().filter(|m| m["kind"] == kind).collect()
}

#[test]
fn it_learns_what_the_ridge_solution_cannot() {
    let mut setup = Setup::new(96, 8);
    setup.train.steps = 150.into();
    // Validation looks at raw labels.
    setup.train.target_pool = TargetPool::OFF;
    (setup.train.validate_every, setup.train.log_every, setup.train.checkpoint_every) = (75, 10, 75);
    let summary = setup.finish("run").unwrap();
    setup.mapper.variant = Variant::Linear;
    setup.train.steps = 1.into();
    setup.train.lr = 1e-9;
    let linear = setup.finish("linear").unwrap();
    let (trained, ridge) = (summary.best_score.unwrap(), linear.best_score.unwrap());
    // A random ranking has 8.5% recall at these ratios.
    assert!(ridge > 0.4, "the ridge solution has {ridge}");
    assert!(trained > ridge + 0.08, "trained {trained}, ridge {ridge}");
    let metrics = setup.metrics("run");
    let losses: Vec<f64> = of(&metrics, "train").iter().map(|m| m["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 15);
    assert!(losses[14] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn every_variant_and_loss_trains() {
    for variant in [Variant::HybridAxial, Variant::Conv, Variant::Mlp, Variant::Linear] {
        for lean in [false, true] {
            let mut setup = Setup::new(9, 2);
            setup.mapper.variant = variant;
            setup.mapper.linear_skip = lean;
            setup.train.steps = 3.into();
            if lean {
                // The binary term off: its learned scales get no gradient, and must not be missed.
                setup.loss.binary = 0.0;
                setup.loss.global = 0.0;
                setup.train.ema = 0.0;
            }
            let summary = setup.finish("run").unwrap();
            assert!(summary.finished && summary.parameters > 0, "{variant:?}");
            let store = CheckpointStore::read_only(&setup.stage("run").join("checkpoints")).unwrap();
            let state = store.best(tch::Device::Cpu).unwrap().unwrap();
            assert_eq!((state.step, state.ema.is_empty()), (3, lean));
        }
    }
}

/// bf16 stages learn the same: parameters, loss and optimizer are f32.
#[test]
fn bf16_stages_learn_as_f32_ones_do() {
    let mut setup = Setup::new(48, 8);
    setup.train.steps = 60.into();
    (setup.train.validate_every, setup.train.log_every, setup.train.checkpoint_every) = (60, 10, 60);
    let mut of_dtype = |dtype: TrainDtype| {
        setup.train.dtype = dtype;
        let run = format!("{dtype:?}");
        let score = setup.finish(&run).unwrap().best_score.unwrap();
        let metrics = setup.metrics(&run);
        (score, of(&metrics, "train").last().unwrap()["loss"].as_f64().unwrap())
    };
    let ((exact, exact_loss), (narrow, narrow_loss)) =
        (of_dtype(TrainDtype::F32), of_dtype(TrainDtype::Bf16));
    assert!((exact - narrow).abs() < 0.03, "recall {exact} in f32, {narrow} in bf16");
    assert!((exact_loss - narrow_loss).abs() < 0.03 * exact_loss, "{exact_loss} and {narrow_loss}");
    assert_ne!(exact_loss, narrow_loss);
}

#[test]
fn metrics_hold_what_readers_look_for() {
    let setup = Setup::new(12, 3);
    let summary = setup.finish("run").unwrap();
    let metrics = setup.metrics("run");
    let steps = |kind| of(&metrics, kind).iter().map(|m| m["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(steps("train"), [5, 10, 15, 20, 24]);
    assert_eq!(steps("validation"), [7, 14, 21, 24]);
    let line = of(&metrics, "train")[0];
    for term in ["binary", "value_mse", "fine", "global", "cosine"] {
        assert!(line["terms"][term].as_f64().unwrap() > 0.0, "{line}");
    }
    let validations = of(&metrics, "validation");
    for line in &validations {
        for policy in ["pair", "pair-uniform", "token"] {
            for ratio in ["0.5", "0.1", "0.05", "0.01", "0.07"] {
                let recall = line["recall"][policy][ratio].as_f64().unwrap();
                assert!((0.0..=1.0).contains(&recall), "{line}");
                let realised = line["realised_ratio"][policy][ratio].as_f64().unwrap();
                // Rounded counts of some 50 positions.
                assert!(
                    (realised - ratio.parse::<f64>().unwrap()).abs() < 0.02,
                    "{policy} {ratio}: {realised}"
                );
            }
        }
        let score = line["score"].as_f64().unwrap();
        let pair = |r: &str| line["recall"]["pair"][r].as_f64().unwrap();
        assert!((score - (pair("0.1") + pair("0.07")) / 2.0).abs() < 1e-12);
        assert!(line["kendall"].as_f64().unwrap() < line["spearman"].as_f64().unwrap());
    }
    // The best flag is raised whenever a score passes all before it.
    let best = validations.iter().rfind(|l| l["best"] == true).unwrap();
    assert_eq!(best["step"].as_u64(), summary.best_step);
    assert_eq!(best["score"].as_f64(), summary.best_score);
    assert_eq!(std::fs::read_dir(setup.stage("run").join("tb")).unwrap().count(), 1);
}

#[test]
fn without_validation_the_last_checkpoint_counts() {
    let setup = Setup::new(9, 0);
    let summary = setup.finish("run").unwrap();
    assert_eq!((summary.best_step, summary.best_score), (None, None));
    let store = CheckpointStore::read_only(&setup.stage("run").join("checkpoints")).unwrap();
    assert_eq!(store.best(tch::Device::Cpu).unwrap().unwrap().step, 24);
}

/// Another training seed learns from the same contexts from another start; the recipe's own seed is what
/// remains if there is none.
#[test]
fn the_training_seed_changes_the_training_alone() {
    let mut setup = Setup::new(12, 3);
    (setup.train.contexts, setup.train.steps) = (Some(6), 7.into());
    let mut losses = |run: &str, seed: Option<u64>| {
        setup.train.seed = seed.map(pkv_core::Seed);
        setup.finish(run).unwrap();
        let metrics = setup.metrics(run);
        let lines = of(&metrics, "train");
        lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (default, same, other) = (losses("a", None), losses("b", Some(11)), losses("c", Some(12)));
    assert_eq!(default, same, "the set-up's seed is 11");
    assert_ne!(default, other);
}

/// Parameters of the best checkpoint of a run.
fn parameters(setup: &Setup, run: &str) -> Vec<(String, tch::Tensor)> {
    let store = CheckpointStore::read_only(&setup.stage(run).join("checkpoints")).unwrap();
    store.best(tch::Device::Cpu).unwrap().unwrap().weights()
}

#[test]
fn a_start_from_another_mapper_takes_its_weights_and_its_own_statistics() {
    let mut setup = Setup::new(48, 8);
    setup.train.steps = 60.into();
    (setup.train.validate_every, setup.train.checkpoint_every) = (60, 60);
    let first = setup.finish("first").unwrap().best_score.unwrap();
    let learnt = parameters(&setup, "first");

    // A step of next to nothing: what is validated is what training starts from.
    (setup.train.steps, setup.train.lr) = (1.into(), 1e-9);
    let cold = setup.finish("cold").unwrap().best_score.unwrap();
    setup.start_from = Some(learnt);
    let warm = setup.finish("warm").unwrap().best_score.unwrap();
    assert!((warm - first).abs() < 1e-6 && warm > cold + 0.02, "first {first}, cold {cold}, warm {warm}");
    // On other contexts with other means and deviations, the weights are the same and those are not.
    (setup.train.contexts, setup.train.seed) = (Some(5), None);
    setup.finish("few").unwrap();
    let buffers = |run: &str| {
        let store = CheckpointStore::read_only(&setup.stage(run).join("checkpoints")).unwrap();
        store.best(tch::Device::Cpu).unwrap().unwrap().buffers
    };
    let differ = |a: &[(String, tch::Tensor)], b: &[(String, tch::Tensor)]| {
        a.iter().zip(b).map(|((_, x), (_, y))| (x - y).abs().max().double_value(&[])).fold(0.0, f64::max)
    };
    assert!(differ(&buffers("few"), &buffers("warm")) > 1e-3);
    assert!(differ(&parameters(&setup, "few"), setup.start_from.as_ref().unwrap()) < 1e-6);
}

#[test]
fn a_start_takes_the_losss_numbers_where_they_fit_and_no_other_network() {
    let mut setup = Setup::new(12, 3);
    setup.train.steps = 2.into();
    setup.finish("first").unwrap();
    setup.start_from = Some(parameters(&setup, "first"));
    // One more ratio and no global term: the binary term's numbers are this run's own.
    setup.loss.binary_ratios.push(0.33);
    setup.loss.global = 0.0;
    assert!(setup.finish("other-loss").unwrap().finished);

    setup.mapper.width = 24;
    let (text, hint) = text_and_hint(&setup.finish("wider").unwrap_err());
    assert!(text.contains("of another network") && text.contains("has shape"), "{text}");
    assert!(hint.contains("train.start_from"), "{hint}");
    setup.mapper.variant = Variant::Mlp;
    let (text, _) = text_and_hint(&setup.finish("mlp").unwrap_err());
    assert!(text.contains("is missing"), "{text}");
}
