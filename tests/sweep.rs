//! `sweep`: a recipe and its variants share what is the same, and each ends as it would alone.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::sandbox::{self, Ran, Sandbox};

const LINEAR: &str = "base = \"../recipe.toml\"\nname = \"linear\"\n[mapper]\nvariant = \"linear\"\n";
const KVPRESS: &str = "base = \"../recipe.toml\"\nname = \"other-labels\"\n[label]\npreset = \"kvpress\"\n";

fn sandbox() -> Sandbox {
    let s = Sandbox::new();
    s.write("variants/linear.toml", LINEAR);
    s.write("variants/labels.toml", KVPRESS);
    s
}

fn real(s: &Sandbox, path: &str) -> PathBuf {
    fs::canonicalize(s.path("runs").join(path)).unwrap()
}

/// A run on its own of the recipe at `recipe`.
fn alone(s: &Sandbox, recipe: &str, more: &[&str]) -> Ran {
    let args = [&["run", "--recipe", recipe], more].concat();
    Ran::new(s.command(&args).output().unwrap())
}

/// Files that must not depend on how a run came about are the same in two.
fn assert_same(a: (&Sandbox, &str), b: (&Sandbox, &str)) {
    let files = |(s, run): (&Sandbox, &str)| {
        let mut all = s.files(run, &["examples", "labels", "features", "export"]);
        all.retain(|name, _| !name.starts_with("export/") || name == "export/model.safetensors");
        all
    };
    sandbox::assert_same(&files(a), &files(b), a.1);
}

#[test]
fn what_is_the_same_is_made_once() {
    let s = sandbox();
    let dry = s.run(&["sweep", "--variants", "variants", "--dry-run"]).ok();
    for part in ["small ", "labels to make", "labels of small", "examples of small", "to train and evaluate"]
    {
        assert!(dry.stdout.contains(part), "`{part}` is missing\n{}", dry.stdout);
    }
    assert!(!s.path("runs").exists(), "a dry run writes nothing");
    let plan = s.run(&["sweep", "--variants", "variants", "--dry-run", "--json"]).ok();
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
    assert_eq!(plan["runs"].as_array().unwrap().len(), 3);

    let first = s.run(&["sweep", "--variants", "variants", "--jobs", "2", "--out", "page.html"]).ok();
    for part in ["3 runs for", "Answers minus those of `small`", "| `mapper.variant`", "| `label.preset`"] {
        assert!(first.stdout.contains(part), "`{part}` is missing\n{}", first.stdout);
    }
    assert!(s.path("page.html").is_file());
    assert_eq!(real(&s, "small/labels"), real(&s, "linear/labels"));
    assert_ne!(real(&s, "small/labels"), real(&s, "other-labels/labels"));
    for folder in ["examples", "features"] {
        assert_eq!(real(&s, &format!("small/{folder}")), real(&s, &format!("other-labels/{folder}")));
    }
    let mut shared: Vec<String> = fs::read_dir(s.path("runs/shared"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().split('-').next().unwrap().to_owned())
        .collect();
    shared.sort();
    assert_eq!(shared, ["examples", "features", "hidden", "labels", "labels"]);

    // Each is what it is alone.
    let other = sandbox();
    alone(&other, "variants/linear.toml", &[]).ok();
    alone(&other, "variants/labels.toml", &[]).ok();
    assert_same((&s, "linear"), (&other, "linear"));
    assert_same((&s, "other-labels"), (&other, "other-labels"));

    // Again: nothing is made, the table is the same.
    let index = || fs::metadata(s.path("runs/small/labels/index.json")).unwrap().modified().unwrap();
    let before = index();
    let again = s.run(&["sweep", "--variants", "variants"]).ok();
    assert_eq!((before, first.stdout), (index(), again.stdout));
    let log = fs::read_to_string(s.path("runs/logs/linear.txt")).unwrap();
    for stage in ["prepare", "label", "extract", "train", "eval"] {
        assert!(log.contains(&format!("{stage}: skipped")), "{stage}\n{log}");
    }
    let dry = s.run(&["sweep", "--variants", "variants", "--dry-run"]).ok();
    assert!(dry.stdout.contains("labels are there") && !dry.stdout.contains("to "), "{}", dry.stdout);

    // A run that makes its labels again leaves those of the others alone.
    alone(&s, "variants/linear.toml", &["--redo", "label"]).ok();
    assert!(!s.path("runs/linear/labels").is_symlink() && s.path("runs/small/labels").is_symlink());
    assert_eq!(before, index());
    assert_same((&s, "linear"), (&other, "linear"));
}

#[test]
fn runs_made_before_are_shared_and_keys_vary() {
    let s = Sandbox::new();
    s.run(&["label"]).fails_with(&["prepare"]);
    for stage in ["prepare", "label", "extract"] {
        s.run(&[stage]).ok();
    }
    let index = || fs::metadata(s.path("runs/small/labels/index.json")).unwrap().modified().unwrap();
    let before = index();
    let args = ["sweep", "--vary", "train.steps=6,12", "--set", "eval.contexts=1"];
    let ran = s.run(&args).ok();
    assert!(ran.stdout.contains("small-steps-6") && ran.stdout.contains("small-steps-12"), "{}", ran.stdout);
    assert_eq!(before, index(), "what was there was not made again");
    assert_eq!(real(&s, "small/labels"), real(&s, "small-steps-6/labels"));
    let run: Value =
        serde_json::from_str(&fs::read_to_string(s.path("runs/small-steps-6/run.json")).unwrap()).unwrap();
    assert_eq!(
        (&run["recipe"]["train"]["steps"], &run["recipe"]["eval"]["contexts"]),
        (&6.into(), &1.into())
    );
    // Only one of them.
    let ran = s.run(&[&args[..], &["--only", "small-steps-12"]].concat()).ok();
    assert!(ran.stdout.contains("2 runs for"), "{}", ran.stdout);
}

#[test]
fn a_killed_sweep_goes_on() {
    let unbroken = sandbox();
    let start = Instant::now();
    unbroken.run(&["sweep", "--variants", "variants", "--jobs", "2"]).ok();
    let whole = start.elapsed();
    let broken = sandbox();
    for share in [0.1, 0.3, 0.5, 0.7] {
        let running = broken.start(&["sweep", "--variants", "variants", "--jobs", "2"]);
        running.kill_after(whole.mul_f64(share).max(Duration::from_millis(5)));
    }
    // Its runs die with it; the kernel may need a moment to release their locks.
    std::thread::sleep(Duration::from_millis(500));
    broken.run(&["sweep", "--variants", "variants", "--jobs", "2"]).ok();
    for run in ["small", "linear", "other-labels"] {
        assert_same((&unbroken, run), (&broken, run));
    }
}

#[test]
fn an_interrupted_sweep_stops_its_runs() {
    let s = sandbox();
    let mut sweep = s.start(&["sweep", "--variants", "variants"]);
    let log = s.path("runs/logs/small.txt");
    let begins = || fs::read_to_string(&log).is_ok_and(|text| text.contains("label"));
    assert!(sweep.wait_until(begins), "the first run does not begin");
    sweep.signal(libc::SIGTERM);
    let ran = sweep.end();
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("interrupted; what was finished is on disk"), "{log}");
}

#[test]
fn what_cannot_be_swept_is_said() {
    let s = sandbox();
    s.run(&["sweep"]).fails_with(&["nothing to compare", "--vary"]);
    s.run(&["sweep", "--vary", "train.steps"]).fails_with(&["has no `=`"]);
    s.run(&["sweep", "--vary", "train.stepz=1,2"]).fails_with(&["stepz"]);
    s.run(&["sweep", "--variants", "variants", "--only", "x"]).fails_with(&["names no variant", "linear"]);
    s.run(&["sweep", "--variants", "variants", "--set", "name=x"]).fails_with(&["two runs are called `x`"]);
    assert!(!s.path("runs").exists());
    // One that fails leaves the others to end, and is named with its error.
    s.write(
        "variants/bad.toml",
        "base = \"../recipe.toml\"\nname = \"bad\"\n[train]\nstart_from = \"nowhere\"\n",
    );
    let ran = s.run(&["sweep", "--variants", "variants", "--only", "linear,bad", "--set", "train.steps=6"]);
    let ran = ran.fails_with(&["1 of 3 runs failed", "`bad`", "nowhere", "logs/bad.txt"]);
    assert!(ran.stdout.contains("2 runs for"), "{}", ran.stdout);
    // Outputs of other choices that are no links are not touched.
    let other = Sandbox::new();
    other.run(&["prepare"]).ok();
    let args = ["sweep", "--vary", "train.steps=6,12", "--set", "seed=9"];
    other.run(&args).fails_with(&["other choices", "`seed` differs", "--runs"]);
}
