//! The target's features, from the prefill of `label` or from one of their own.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use crate::sandbox::{Sandbox, assert_same};

const FROM: [&str; 2] = ["--set", "extract.from=[\"target\"]"];
const WITHOUT: [&str; 2] = ["--set", "extract.from=[\"proxy\"]"];

fn stage(s: &Sandbox, stage: &str, sets: &[&str]) -> String {
    s.run(&[&[stage][..], sets].concat()).ok().stderr
}

/// Files of labels and of the target's features.
fn files(s: &Sandbox) -> BTreeMap<String, Vec<u8>> {
    s.files("small", &["labels", "features-target"])
}

/// Labels of a recipe without the target's features, then the features by `extract`.
fn apart() -> Sandbox {
    let s = Sandbox::new();
    stage(&s, "prepare", &FROM);
    stage(&s, "label", &WITHOUT);
    assert!(!s.path("runs/small/features-target").exists());
    let said = stage(&s, "extract", &FROM);
    assert!(said.contains("extract: done") && said.contains("loading the target"), "{said}");
    s
}

#[test]
fn one_prefill_gives_the_bytes_that_two_give() {
    let (apart, together) = (apart(), Sandbox::new());
    stage(&together, "prepare", &FROM);
    let said = stage(&together, "label", &FROM);
    assert!(said.contains("target features 16"), "{said}");
    assert_same(&files(&apart), &files(&together), "the run");
    let said = stage(&together, "extract", &FROM);
    assert!(said.contains("extract: skipped"), "{said}");
    // Labels alone are made again, beside features that are complete.
    let said = stage(&together, "label", &[&["--redo", "label"][..], &FROM].concat());
    assert!(said.contains("label: done") && said.contains("target features 0"), "{said}");
    assert_same(&files(&apart), &files(&together), "the run");
    // Both anew, in one run: features are not made twice.
    let redo = [&["--redo", "extract", "--redo", "label"][..], &FROM].concat();
    let said = stage(&together, "run", &redo);
    assert!(said.contains("target features 16") && said.contains("extract: skipped"), "{said}");
    assert_same(&files(&apart), &files(&together), "the run");
}

/// Each of the two folders may have more whole shards than the other: after a kill, or after a run of an
/// earlier version.
#[test]
fn either_folder_may_be_ahead() {
    let whole = files(&apart());
    for (labels, features) in [(1, 3), (3, 1), (0, 2), (2, 0)] {
        let s = Sandbox::new();
        stage(&s, "prepare", &FROM);
        stage(&s, "label", &FROM);
        for (folder, shards) in [("labels", labels), ("features-target", features)] {
            keep_shards(&s, folder, shards);
        }
        let said = stage(&s, "label", &FROM);
        let taken = 16 - 3 * features;
        assert!(said.contains(&format!("target features {taken}")), "{labels}, {features}: {said}");
        assert_same(&files(&s), &whole, "the run");
    }
}

/// As if the process had died after `shards` shards.
fn keep_shards(s: &Sandbox, folder: &str, shards: usize) {
    let path = s.path("runs/small").join(folder).join("index.json");
    let mut index: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    index["shards"].as_array_mut().unwrap().truncate(shards);
    index["complete"] = false.into();
    fs::write(&path, index.to_string()).unwrap();
}

#[test]
fn kills_change_neither() {
    let whole = files(&apart());
    let s = Sandbox::new();
    stage(&s, "prepare", &FROM);
    let timed = Sandbox::new();
    stage(&timed, "prepare", &FROM);
    let start = Instant::now();
    stage(&timed, "label", &FROM);
    let label = start.elapsed();
    let mut rng = pkv_core::Seed(4).stream("kill", 0);
    for _ in 0..12 {
        let running = s.start(&[&["label"][..], &FROM].concat());
        let share = f64::from(rand::Rng::random_range(&mut rng, 10..90u32)) / 100.0;
        running.kill_after(label.mul_f64(share).max(Duration::from_millis(5)));
    }
    stage(&s, "label", &FROM);
    stage(&s, "extract", &FROM);
    assert_same(&files(&s), &whole, "the run");
}

#[test]
fn labels_do_not_depend_on_features() {
    let s = Sandbox::new();
    let fitted = [FROM[0], FROM[1], "--set", "extract.target_channels=[\"key_norm\", \"hidden_linear\"]"];
    stage(&s, "prepare", &FROM);
    // A channel that is fitted to the labels comes when they are complete.
    stage(&s, "label", &fitted);
    assert!(!s.path("runs/small/features-target").exists());
    stage(&s, "extract", &fitted);
    let others = fs::read(s.path("runs/small/features-target/index.json")).unwrap();
    let labels = |s: &Sandbox| {
        let all = files(s);
        all.into_iter().filter(|(name, _)| name.starts_with("labels/")).collect::<BTreeMap<_, _>>()
    };
    let before = labels(&s);
    // Features of other choices are not touched, and labels are made all the same.
    let said = stage(&s, "label", &[&["--redo", "label"][..], &FROM].concat());
    assert!(said.contains("left to `extract`") && said.contains("label: done"), "{said}");
    assert_eq!(others, fs::read(s.path("runs/small/features-target/index.json")).unwrap());
    assert_same(&before, &labels(&s), "the run");
    // Prefill chunks that are not those of `extract` would round features otherwise.
    let chunks = ["--set", "label.prefill_chunk_tokens=50"];
    let s = Sandbox::new();
    stage(&s, "prepare", &FROM);
    stage(&s, "label", &[&FROM[..], &chunks].concat());
    assert!(!s.path("runs/small/features-target").exists());
}
