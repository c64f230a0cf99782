//! Wrong input is refused with an error and a hint.

use std::fs;

use pkv_core::{Fingerprint, Split, Stop};
use pkv_shard::{LabelRow, StageDir, StaleError};

use crate::common::*;

#[track_caller]
fn fails(setup: &Setup, expected: &[&str], hint: &str) {
    let error = setup.finish("run").expect_err("training should fail");
    let (said, hinted) = text_and_hint(&error);
    for text in expected {
        assert!(said.contains(text), "`{text}` is missing in: {said}");
    }
    assert!(hinted.contains(hint), "hint: {hinted}");
}

fn replace_labels(setup: &Setup, change: impl Fn(usize, &mut LabelRow)) {
    StageDir::clear(&setup.stage("labels")).unwrap();
    let mut rows: Vec<LabelRow> = (0..12).map(|i| row(i, Split::Train).1).collect();
    rows.iter_mut().enumerate().for_each(|(i, row)| change(i, row));
    write(stage(setup.dir.path(), "labels", "label"), rows);
}

#[test]
fn an_absent_or_unfinished_stage_is_named() {
    let setup = Setup::new(9, 3);
    StageDir::clear(&setup.stage("features")).unwrap();
    fails(&setup, &["there is no `index.json` in", "features"], "run the stage");
    drop(stage(setup.dir.path(), "features", "extract"));
    fails(&setup, &["features` is not complete: it has 0 features"], "proxykv-train extract");
}

#[test]
fn labels_of_other_examples_are_refused() {
    let setup = Setup::new(9, 3);
    replace_labels(&setup, |_, row| row.id += "-other");
    fails(&setup, &["the labels of row", "do not belong to example `doc-", "-other` with"], "--redo label");
}

#[test]
fn labels_of_another_model_are_refused() {
    let setup = Setup::new(9, 3);
    replace_labels(&setup, |i, row| {
        if i >= 4 {
            row.kv_heads = 1;
            row.scores.truncate(row.scores.len() / 2);
        }
    });
    fails(&setup, &["with 4 KV heads and", "with 2 KV heads and"], "--redo label");
}

#[test]
fn fewer_labels_than_examples_are_refused() {
    let setup = Setup::new(9, 3);
    StageDir::clear(&setup.stage("labels")).unwrap();
    write(stage(setup.dir.path(), "labels", "label"), vec![row(0, Split::Train).1]);
    fails(&setup, &["labels` has 1 rows for 12 examples"], "--redo label");
}

#[test]
fn a_flipped_byte_ends_training_with_the_shards_name() {
    let setup = Setup::new(26, 0);
    let shard = setup.stage("features").join("features-00003.parquet");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[300] ^= 1;
    fs::write(&shard, bytes).unwrap();
    fails(&setup, &["features-00003.parquet", "expected SHA-256"], "--redo extract");
}

#[test]
fn no_training_example_is_an_error() {
    let setup = Setup::new(0, 4);
    fails(&setup, &["there is no training example in"], "data.train");
}

#[test]
fn a_loss_that_is_no_number_ends_training() {
    let mut setup = Setup::new(9, 0);
    setup.train.lr = 1e30;
    fails(
        &setup,
        &["training diverged at step 2", "batch 2 of epoch 1 holds examples `doc-", "not a finite number"],
        "lower `train.lr` (it is 1e30)",
    );
}

/// Whatever falls due first at a step that ran away, the checkpoints before it stay the newest and are whole.
#[test]
fn nothing_that_is_not_finite_is_saved() {
    for (due, lr) in [("log", 1e30), ("validate", 1e30), ("checkpoint", 1e30), ("stop", 1e30), ("log", 1e39)]
    {
        let mut setup = Setup::new(12, 3);
        let train = &mut setup.train;
        (train.log_every, train.validate_every, train.checkpoint_every) = (100, 100, 100);
        train.steps = 100.into();
        let stop = Stop::default();
        let good = At::new(3, || stop.request());
        assert_eq!(setup.run("run", &good, &stop).unwrap().step, 3);
        let train = &mut setup.train;
        train.lr = lr;
        match due {
            "log" => train.log_every = 10,
            "validate" => train.validate_every = 10,
            "checkpoint" => train.checkpoint_every = 10,
            _ => {}
        }
        let stop = Stop::default();
        let bad = At::new(10, || {
            if due == "stop" {
                stop.request()
            }
        });
        let error = setup.run("run", &bad, &stop).expect_err(due);
        let (said, hint) = text_and_hint(&error);
        assert!(said.contains("training diverged at step") && said.contains("`doc-"), "{due}: {said}");
        assert!(hint.contains("the checkpoint of step 3 is whole"), "{due}: {hint}");
        assert!(hint.contains("--redo train") && hint.contains("another `name`"), "{due}: {hint}");
        assert!(hint.contains("'train.lr_cuts=[[3, 0.1]]'"), "{due}: {hint}");
        let folders = fs::read_dir(setup.stage("run").join("checkpoints")).unwrap();
        let folders: Vec<_> = folders.map(|f| f.unwrap().file_name()).collect();
        assert_eq!(folders, ["step-000003"], "{due}");
        setup.train.lr = 1e-3;
        assert!(setup.finish("run").unwrap().finished, "{due}");
    }
}

#[test]
fn other_choices_do_not_continue_a_run() {
    let mut setup = Setup::new(9, 0);
    setup.finish("run").unwrap();
    setup.fingerprint = Fingerprint::new().with("train", "otherwise");
    fails(&setup, &["trained with other choices", "`train` was \"as in this test\""], "--redo train");
    let error = setup.is_complete("run").unwrap_err();
    assert!(error.downcast_ref::<StaleError>().is_some());
}
