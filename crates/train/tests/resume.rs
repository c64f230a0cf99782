//! Stopped, killed, damaged: the same bits in the end.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pkv_core::Stop;
use pkv_recipe::Steps;
use pkv_test_support::kill::{FOLDER, kill};

use crate::common::*;

/// The outcomes of a broken run and of an unbroken one: metrics, and the weights, moments and average
/// of every checkpoint that both keep, the last and the best among them. A stopped run also keeps
/// the step it stopped at, as one of its last.
#[track_caller]
fn same(setup: &Setup, broken: &str, whole: &str) {
    let ((files, metrics), (expected, expected_metrics)) = (setup.outcome(broken), setup.outcome(whole));
    assert_eq!(metrics, expected_metrics);
    let best = metrics.iter().rfind(|m| m["best"] == true).expect("a validation");
    for step in [best["step"].as_u64(), metrics.last().and_then(|m| m["step"].as_u64())].into_iter().flatten()
    {
        let name = format!("step-{step:06}/model.safetensors");
        assert!(files.contains_key(&name) && expected.contains_key(&name), "{name} is missing");
    }
    for (name, bytes) in files.iter().filter(|(name, _)| expected.contains_key(*name)) {
        assert!(bytes == &expected[name], "{name} differs");
    }
}

/// Stop a run at each of these steps.
#[track_caller]
fn stop_at(setup: &Setup, run: &str, steps: &[u64]) {
    for &step in steps {
        let stop = Stop::default();
        let at = At::new(step, || stop.request());
        let summary = setup.run(run, &at, &stop).unwrap();
        assert_eq!((summary.step, summary.finished), (step, false));
        assert_eq!(setup.is_complete(run).unwrap(), None);
    }
}

/// Runs that are taken out of these steps end as `whole`. A panic takes the process out of a step without
/// saving, as a kill does.
#[track_caller]
fn kill_at(setup: &Setup, runs: [&[u64]; 4]) {
    let silent = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    for steps in runs {
        let run = format!("killed-{steps:?}");
        for &step in steps {
            let at = At::new(step, || panic!("killed"));
            let result = catch_unwind(AssertUnwindSafe(|| setup.run(&run, &at, &Stop::default())));
            assert!(result.is_err(), "not killed at step {step}");
        }
        setup.finish(&run).unwrap();
        same(setup, &run, "whole");
    }
    std::panic::set_hook(silent);
}

#[test]
fn a_stopped_run_ends_with_the_same_bits() {
    let setup = Setup::new(26, 5);
    let whole = setup.finish("whole").unwrap();
    assert!(whole.finished && whole.step == 24);
    for stops in [vec![1], vec![7, 14], vec![3, 23]] {
        let run = format!("stopped-{stops:?}");
        stop_at(&setup, &run, &stops);
        let summary = setup.finish(&run).unwrap();
        assert_eq!(
            (summary.step, summary.best_step, summary.best_score),
            (24, whole.best_step, whole.best_score)
        );
        same(&setup, &run, "whole");
    }
    assert_eq!(setup.is_complete("whole").unwrap(), Some(24));
}

/// What is random in a step is the step's own, and how batches are loaded changes nothing.
#[test]
fn disturbed_features_and_crops_end_with_the_same_bits() {
    let mut setup = Setup::new(26, 5);
    setup.finish("exact").unwrap();
    let train = &mut setup.train;
    (train.feature_noise, train.feature_dropout, train.dropout, train.crop) = (0.2, 0.2, 0.2, 0.5);
    train.loader_threads = Some(1);
    setup.finish("whole").unwrap();
    assert_ne!(setup.metrics("whole")[0], setup.metrics("exact")[0]);
    (setup.train.loader_threads, setup.train.cache_gb) = (Some(3), Some(0.0));
    stop_at(&setup, "broken", &[5, 16]);
    setup.finish("broken").unwrap();
    same(&setup, "broken", "whole");
}

/// The learning rate falls from step 14 on, for 9 steps: the validation after 7 steps is what the next is
/// measured from, and no later one gains 90 points.
fn auto(setup: &mut Setup) {
    let train = &mut setup.train;
    train.steps = Steps::Auto;
    (train.max_steps, train.patience, train.min_gain) = (Some(1000), Some(1), Some(0.9));
    train.decay = Some(0.6);
}

#[test]
fn automatic_steps_end_by_themselves_and_with_the_same_bits_wherever_broken() {
    let mut setup = Setup::new(26, 5);
    auto(&mut setup);
    let whole = setup.finish("whole").unwrap();
    assert_eq!((whole.step, whole.finished, whole.decay_from), (23, true, Some(14)));
    assert_eq!(whole.steps, "auto, at most 1000");
    assert_eq!(setup.is_complete("whole").unwrap(), Some(23));
    let metrics = setup.metrics("whole");
    let rates: Vec<f64> = metrics.iter().filter_map(|m| m["lr"].as_f64()).collect();
    assert_eq!(rates.len(), 5, "steps 5, 10, 15, 20 and 23");
    assert!(rates[..2].iter().all(|r| *r == setup.train.lr) && rates[1..].windows(2).all(|r| r[0] > r[1]));
    assert!((rates[4] / setup.train.lr - 0.01).abs() < 1e-9, "{rates:?}");
    assert_eq!(metrics.iter().filter(|m| m["kind"] == "validation").count(), 4, "the last weights, too");

    for stops in [vec![3], vec![14], vec![13, 15], vec![17, 22]] {
        let run = format!("stopped-{stops:?}");
        stop_at(&setup, &run, &stops);
        let summary = setup.finish(&run).unwrap();
        assert_eq!((summary.step, summary.best_step), (23, whole.best_step));
        same(&setup, &run, "whole");
    }
    kill_at(&setup, [&[6][..], &[14, 15], &[18, 22], &[23]]);
}

#[test]
fn automatic_steps_end_at_their_most_while_validation_gains() {
    let mut setup = Setup::new(26, 5);
    auto(&mut setup);
    (setup.train.max_steps, setup.train.patience) = (Some(20), Some(100));
    let summary = setup.finish("run").unwrap();
    // 12 steps and 0.6 of them, rounded up.
    assert_eq!((summary.step, summary.finished, summary.decay_from), (20, true, Some(12)));
}

#[test]
fn automatic_steps_without_validation_are_refused() {
    let mut setup = Setup::new(9, 0);
    auto(&mut setup);
    let (text, hint) = text_and_hint(&setup.finish("run").unwrap_err());
    assert!(text.contains("no validation example that would end the training"), "{text}");
    assert!(hint.contains("data.validation"), "{hint}");
}

#[test]
fn a_run_killed_at_any_step_ends_with_the_same_bits() {
    let setup = Setup::new(26, 5);
    setup.finish("whole").unwrap();
    kill_at(&setup, [&[2][..], &[9], &[15, 18], &[24]]);
}

/// Checkpoints of version 1 differ in their `state.json` alone, which had one list of names.
#[test]
fn a_run_that_an_older_version_began_ends_with_the_same_bits() {
    let setup = Setup::new(26, 5);
    setup.finish("whole").unwrap();
    stop_at(&setup, "old", &[3]);
    let path = setup.stage("old").join("checkpoints/step-000003/state.json");
    let mut state: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    let mut names = |group: &str| fields.remove(group).unwrap().as_array().unwrap().clone();
    let (network, loss) = (names("network"), names("loss"));
    assert!(!network.is_empty() && loss.len() == 3);
    state["schema_version"] = 1.into();
    state["parameters"] = [network, loss].concat().into();
    fs::write(&path, state.to_string()).unwrap();
    assert!(setup.finish("old").unwrap().finished);
    same(&setup, "old", "whole");
}

#[test]
fn a_damaged_checkpoint_costs_steps_and_no_bits() {
    let setup = Setup::new(26, 5);
    setup.finish("whole").unwrap();
    stop_at(&setup, "broken", &[17]);
    let path = setup.stage("broken").join("checkpoints/step-000017/optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    fs::write(&path, bytes).unwrap();
    let summary = setup.finish("broken").unwrap();
    assert!(summary.finished);
    same(&setup, "broken", "whole");
}

#[test]
fn a_finished_run_has_nothing_to_do() {
    let setup = Setup::new(12, 3);
    setup.finish("run").unwrap();
    let before = setup.outcome("run");
    let summary = setup.finish("run").unwrap();
    assert_eq!((summary.step, summary.finished), (24, true));
    assert_eq!(setup.outcome("run"), before);
}

/// SIGKILL at random moments.
#[test]
fn a_killed_process_is_continued_by_the_next() {
    let setup = Setup::new(26, 5);
    setup.finish("whole").unwrap();
    let mut kills = 0;
    for attempt in 0u64.. {
        assert!(attempt < 60, "no progress");
        let before = checkpoints(&setup);
        let delay = Duration::from_millis(attempt * 31 % 100);
        if let Some(status) = kill("resume::child", setup.dir.path(), || checkpoints(&setup) != before, delay)
        {
            assert!(status.success());
            if kills > 0 {
                break;
            }
            // On a busy machine it may be done before this process gets to kill it.
            fs::remove_dir_all(setup.stage("killed")).unwrap();
            continue;
        }
        kills += 1;
    }
    assert!(kills > 0, "the process was never killed");
    same(&setup, "killed", "whole");
}

fn checkpoints(setup: &Setup) -> Vec<std::ffi::OsString> {
    let dir = setup.stage("killed").join("checkpoints");
    let mut names: Vec<_> = fs::read_dir(dir).into_iter().flatten().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Not a test: the process that the test above kills.
#[test]
#[ignore = "run by a_killed_process_is_continued_by_the_next"]
fn child() {
    let dir = std::env::var(FOLDER).expect("run by a_killed_process_is_continued_by_the_next");
    // Its own small stages go unused: it trains on those of the test.
    let own = Setup::new(1, 0);
    let setup = At::new(0, || ());
    let at = |name: &str| std::path::Path::new(&dir).join(name);
    let inputs = pkv_train::TrainInputs {
        run: &at("killed"),
        examples: &at("examples"),
        labels: &at("labels"),
        features: pkv_shard::FeatureFolders::one(&at("features")),
        mapper: &own.mapper,
        loss: &own.loss,
        train: &own.train,
        seed: pkv_core::Seed(11),
        start_from: None,
        fingerprint: &own.fingerprint,
    };
    pkv_train::train(&inputs, tch::Device::Cpu, &setup, &Stop::default()).unwrap();
}
