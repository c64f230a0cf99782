//! `extract.missing` and `extract.after_use`: features that are made when they are read are those of the
//! shards.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Sandbox, timeless};

/// Features are never written, and every row is made each time it is read.
const TRANSIENT: [&str; 3] = ["extract.missing=generate", "extract.after_use=delete", "train.cache_gb=0"];
/// Shards whose rows are decoded each time.
const STORED: [&str; 1] = ["train.cache_gb=0"];

fn with<'a>(a: &[&'a str], b: &[&'a str]) -> Vec<&'a str> {
    [a, b].concat()
}

fn read(s: &Sandbox, file: &str) -> Vec<u8> {
    fs::read(s.path("runs").join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// The same weights, losses and, from the features of a test example, the same parity vectors.
fn assert_same_export(s: &Sandbox, a: &str, b: &str) {
    for file in ["model.safetensors", "parity.safetensors"] {
        let of = |name: &str| read(s, &format!("{name}/export/{file}"));
        assert!(of(a) == of(b), "{file} of `{a}` and `{b}` differ");
    }
    let losses = |name: &str| -> Vec<(Value, Value, Value)> {
        let text = String::from_utf8(read(s, &format!("{name}/train/metrics.jsonl"))).unwrap();
        let of = |l: Value| (l["kind"].clone(), l["step"].clone(), l["loss"].clone());
        text.lines().map(|l| of(serde_json::from_str(l).unwrap())).collect()
    };
    assert_eq!(losses(a), losses(b));
}

/// Files below a folder of features.
fn has_features(s: &Sandbox, name: &str) -> bool {
    ["features", "features-target"].iter().any(|f| shards(&s.path("runs").join(name).join(f)) > 0)
}

fn shards(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, |files| {
        files.filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "parquet")).count()
    })
}

#[test]
fn a_run_without_stored_features_ends_with_the_bytes_of_one_with_them() {
    let s = Sandbox::new();
    let both = [
        "extract.from=[\"target\", \"proxy\"]",
        "extract.target_channels=[\"max_window\", \"key_norm\", \"hidden_linear\"]",
    ];
    let stored = with(&both, &STORED);
    s.run_as("run", "stored", &stored).ok();
    assert!(has_features(&s, "stored"));

    let transient = with(&both, &TRANSIENT);
    let ran = s.run_as("run", "made", &transient).ok();
    assert!(ran.stderr.contains("extract: skipped"), "{}", ran.stderr);
    assert!(!has_features(&s, "made"));
    assert_same_export(&s, "stored", "made");
    // Recall against labels, of the mapper and of the baselines that learn from features.
    let labels =
        |name: &str| -> Value { timeless(&read(&s, &format!("{name}/eval/results.json")))["labels"].clone() };
    assert!(labels("stored")["contexts"].as_u64().unwrap() > 0);
    assert_eq!(labels("stored"), labels("made"));
    // An export says what its features are, not whether they were kept.
    let config = |name: &str| -> Value {
        serde_json::from_slice(&read(&s, &format!("{name}/export/config.json"))).unwrap()
    };
    assert_eq!(config("stored")["extract"], config("made")["extract"]);

    let again = s.run_as("run", "made", &transient).ok();
    for what in ["extract", "train", "eval", "export"] {
        assert!(again.stderr.contains(&format!("{what}: skipped")), "{what}\n{}", again.stderr);
    }
    // The same run with its features stored is the same training.
    s.run_as("extract", "made", &stored).ok();
    let same = s.run_as("train", "made", &stored).ok();
    assert!(same.stderr.contains("train: skipped"), "{}", same.stderr);
}

#[test]
fn a_training_without_stored_features_is_killed_and_continues() {
    let s = Sandbox::new();
    let from = ["extract.from=[\"target\"]"];
    let (stored, transient) = (with(&from, &STORED), with(&from, &TRANSIENT));
    for what in ["prepare", "label", "extract", "train", "export"] {
        s.run_as(what, "stored", &stored).ok();
    }
    for what in ["prepare", "label"] {
        s.run_as(what, "made", &transient).ok();
    }
    // `label` would have taken them along.
    assert!(!has_features(&s, "made"));
    let checkpoints = s.path("runs/made/checkpoints");
    let steps = || {
        let named = |f: fs::DirEntry| f.file_name().to_string_lossy().into_owned();
        fs::read_dir(&checkpoints)
            .map_or(0, |d| d.map(|f| named(f.unwrap())).filter(|n| n.contains("step")).count())
    };
    let mut kills = 0;
    for wanted in 0..3 {
        let set = transient.iter().flat_map(|key| ["--set", key]);
        let mut train = s.start(&["train", "--set", "name=made"].into_iter().chain(set).collect::<Vec<_>>());
        // In the statistics, then with one checkpoint, then with two.
        kills += usize::from(train.wait_until(|| steps() >= wanted));
        train.kill_after(Duration::ZERO);
    }
    assert!(kills > 0, "the training was over before it could be killed");
    for what in ["train", "export"] {
        s.run_as(what, "made", &transient).ok();
    }
    assert_same_export(&s, "stored", "made");
    assert!(!has_features(&s, "made"));
}

#[test]
fn complete_shards_are_used_and_removed_only_after_the_training() {
    let s = Sandbox::new();
    let made = "are made when they are read";
    for what in ["prepare", "label", "extract"] {
        s.run_as(what, "run", &[]).ok();
    }
    let first = fs::read_dir(s.path("runs/run/features")).unwrap().map(|f| f.unwrap().path());
    let damaged = first.filter(|f| f.extension().is_some_and(|e| e == "parquet")).min().unwrap();
    // Shards of other choices are neither read nor removed.
    let other = with(&TRANSIENT, &["extract.window_tokens=32"]);
    let ran = s.run_as("train", "run", &other).ok();
    assert!(ran.stderr.contains(made) && ran.stderr.contains("made with other choices"), "{}", ran.stderr);
    assert!(has_features(&s, "run"));
    fs::remove_dir_all(s.path("runs/run/checkpoints")).unwrap();

    // A training that fails leaves them.
    let whole = fs::read(&damaged).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, &bytes).unwrap();
    s.run_as("train", "run", &TRANSIENT).fails_with(&["its bytes have changed"]);
    assert!(has_features(&s, "run"));
    fs::write(&damaged, &whole).unwrap();

    let ran = s.run_as("train", "run", &TRANSIENT).ok();
    assert!(!ran.stderr.contains(made) && ran.stderr.contains("removed the features"), "{}", ran.stderr);
    assert!(!has_features(&s, "run"));
    let ran = s.run_as("export", "run", &TRANSIENT).ok();
    assert!(ran.stderr.contains(made), "{}", ran.stderr);
}

#[test]
fn missing_features_are_an_error_or_made_and_kept() {
    let s = Sandbox::new();
    for what in ["prepare", "label"] {
        s.run_as(what, "run", &[]).ok();
    }
    let hint = "`extract.missing = \"generate\"`";
    s.run_as("train", "run", &[]).fails_with(&["`extract` has not run", "proxykv-train extract", hint]);
    s.run_as("train", "run", &["extract.after_use=delete"])
        .fails_with(&["`extract.after_use` is `delete`", "extract.missing"]);
    s.run_as("train", "run", &["extract.missing=guess"]).fails_with(&["guess", "generate"]);
    let ran = s.run_as("train", "run", &["extract.missing=generate"]).ok();
    assert!(ran.stderr.contains("extract: done"), "{}", ran.stderr);
    assert!(has_features(&s, "run"));
    // Made for good: the recipe without the key finds them.
    assert!(s.run_as("extract", "run", &[]).ok().stderr.contains("extract: skipped"));
    assert!(s.run_as("train", "run", &[]).ok().stderr.contains("train: skipped"));
    // Features of other choices are not trained on.
    s.run_as("train", "run", &["extract.missing=generate", "extract.window_tokens=32"])
        .fails_with(&["extract.window_tokens", "--redo extract"]);
}
