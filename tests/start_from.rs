//! `train.start_from`: a mapper that starts from another run's.

use std::fs;

use serde_json::Value;

use crate::sandbox::Sandbox;

fn before_training(s: &Sandbox, name: &str, set: &[&str]) {
    for what in ["prepare", "label", "extract"] {
        s.run_as(what, name, set).ok();
    }
}

/// Recall of the last validation.
fn score(s: &Sandbox, name: &str) -> f64 {
    let text = fs::read_to_string(s.path("runs").join(name).join("train/metrics.jsonl")).unwrap();
    let mut lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    lines.rfind(|l| l["kind"] == "validation").unwrap()["score"].as_f64().unwrap()
}

#[test]
fn a_run_starts_from_anothers_mapper_or_says_why_not() {
    let s = Sandbox::new();
    before_training(&s, "first", &[]);
    s.run_as("train", "first", &["train.steps=40", "train.validate_every=40"]).ok();
    s.run_as("export", "first", &["train.steps=40", "train.validate_every=40"]).ok();

    before_training(&s, "second", &[]);
    let next_to_nothing = ["train.steps=1", "train.lr=1e-9"];
    let from = |place: &str| format!("train.start_from={place}");
    s.run_as("train", "second", &next_to_nothing).ok();
    let cold = score(&s, "second");
    let cut = |place: &str| {
        let from = from(place);
        let set = [next_to_nothing[0], next_to_nothing[1], from.as_str()];
        s.run_as("train", "second", &set)
    };
    // Another start is another mapper.
    cut("first").fails_with(&["were trained with other choices", "start_from"]);
    fs::remove_dir_all(s.path("runs/second/checkpoints")).unwrap();
    cut("runs/first").ok();
    let warm = score(&s, "second");
    assert!(
        (warm - score(&s, "first")).abs() < 1e-6 && warm != cold,
        "first {}, cold {cold}, warm {warm}",
        score(&s, "first")
    );
    // The same export under every name; what it is counts, not where it lies.
    for place in ["first", "runs/first", "runs/first/export"] {
        assert!(cut(place).ok().stderr.contains("train: skipped"), "{place}");
    }

    // An older version's export of the same mapper is left as it is: other runs know it by the hash of its
    // weights.
    for (file, was, is) in [
        ("config.json", "\"schema_version\": 3", "\"schema_version\": 2"),
        ("README.md", "schema version 3", "schema version 2"),
    ] {
        s.edit(&format!("runs/first/export/{file}"), was, is);
    }
    let again = s.run_as("export", "first", &["train.steps=40", "train.validate_every=40"]).ok();
    assert!(again.stderr.contains("export: skipped"), "{}", again.stderr);
    assert!(cut("first").ok().stderr.contains("train: skipped"));

    // What does not fit is refused by its name.
    let refused = |name: &str, set: &[&str], parts: &[&str]| {
        before_training(&s, name, set);
        s.run_as("train", name, &[set, &["train.start_from=first"]].concat()).fails_with(parts);
    };
    refused("wider", &["mapper.width=48"], &["`mapper.width` is", "expected 48", "train.start_from"]);
    refused(
        "loud",
        &["extract.channels=[\"max_all\"]"],
        &["the channels of the proxy", "expected [\"max_all\"]"],
    );
    refused("own", &["extract.from=[\"target\"]"], &["`extract.from` is [\"proxy\"], expected [\"target\"]"]);
    cut("nowhere").fails_with(&["`train.start_from` = `nowhere`", "cannot read export"]);
    s.run_as("train", "first", &["train.start_from=first"]).fails_with(&["is the export of this run"]);
}
