//! A recipe in, a mapper out.

use std::fs;

use crate::sandbox::{Ran, Sandbox};

#[test]
fn run_makes_everything_once() {
    let s = Sandbox::new();
    let first = s.run(&["run"]).ok();
    assert!(first.stdout.contains("\n> mapper"), "no table on stdout:\n{}", first.stdout);
    // A stage says once what it made.
    assert!(!first.stderr.contains(" rows = "), "{}", first.stderr);
    for file in [
        "run.json",
        "log.jsonl",
        "examples/index.json",
        "labels/index.json",
        "features/index.json",
        "train/metrics.jsonl",
        "eval/results.json",
        "eval/answers.parquet",
        "export/model.safetensors",
        "export/config.json",
        "export/README.md",
        "export/parity.safetensors",
        "report.html",
    ] {
        assert!(s.path("runs/small").join(file).is_file(), "{file} is missing");
    }

    // The second time everything is complete; each stage says so.
    let index = fs::read(s.path("runs/small/labels/index.json")).unwrap();
    let second = s.run(&["run"]).ok();
    for stage in ["prepare", "label", "extract", "train", "eval", "export"] {
        assert!(
            second.stderr.lines().any(|l| l.contains(&format!("{stage}: skipped"))),
            "{stage} did not say that it was skipped:\n{}",
            second.stderr
        );
    }
    assert_eq!(index, fs::read(s.path("runs/small/labels/index.json")).unwrap());
    // The report is written anew, and its time counts.
    let results = |ran: &Ran| -> Vec<String> {
        let lines = ran.stdout.lines().filter(|line| !line.starts_with("All stages took "));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(results(&first), results(&second), "the same results are printed");

    // `eval` ends as `run` does: the same table, in as few lines.
    let eval = s.run(&["eval"]).ok().stdout;
    let table = |text: &str| text.split(" took ").next().unwrap().rsplit_once('\n').unwrap().0.to_owned();
    assert_eq!(table(&eval), table(&first.stdout));
    assert!(eval.lines().count() < 40 && eval.lines().all(|line| line.chars().count() <= 80), "{eval}");
    for line in [
        "numbers     runs/small/eval/results.json\n",
        "all tables  proxykv-train inspect runs/small/eval\n",
        "next        proxykv-train report --recipe recipe.toml\n",
    ] {
        assert!(eval.contains(line), "{eval}");
    }

    // A mapper that is made anew is kept until the new one is whole: a redo that fails, one that goes on.
    let weights = || fs::read(s.path("runs/small/export/model.safetensors")).unwrap();
    let before = weights();
    let broken = ["train", "--redo", "train", "--set", "train.start_from=none"];
    let kept = s.run(&broken).fails_with(&["start_from"]).stderr;
    assert!(kept.contains("runs/small/before-redo") && kept.contains("to have the old one back"), "{kept}");
    assert!(
        s.path("runs/small/before-redo/checkpoints").is_dir() && !s.path("runs/small/checkpoints").exists()
    );
    s.run(&broken).fails_with(&["start_from"]);
    assert!(s.path("runs/small/before-redo/checkpoints").is_dir());
    s.run(&["eval"]).fails_with(&["checkpoint"]);
    let back = kept.split('`').find(|part| part.starts_with("cd ")).unwrap();
    let moved = std::process::Command::new("sh").args(["-c", back]).current_dir(s.path("")).status().unwrap();
    assert!(moved.success());
    assert!(s.run(&["train"]).ok().stderr.contains("train: skipped"));
    s.run(&["train", "--redo", "train"]).ok();
    assert!(!s.path("runs/small/before-redo").exists());
    s.run(&["export", "--redo", "export"]).ok();
    assert!(before == weights(), "one seed, one mapper");

    // What was made can be looked at.
    for (path, part) in [
        ("runs/small", "labels          "),
        ("runs/small/labels", "stage `label`"),
        ("runs/small/export", ", f32\n"),
        ("runs/small/eval/contexts", "folder, 1 file\n"),
    ] {
        let ran = Ran::new(s.command(&["inspect", path]).output().unwrap()).ok();
        assert!(ran.stdout.contains(part), "{}", ran.stdout);
    }

    // An export is evaluated like the checkpoint it came from.
    let export = s.run(&["eval", "--mapper", "runs/small/export", "--json"]).ok();
    let checkpoint = s.run(&["eval", "--json"]).ok();
    let cells =
        |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["labels"]["cells"].clone();
    assert_eq!(cells(&export.stdout), cells(&checkpoint.stdout));
}

#[test]
fn two_runs_of_one_seed_are_the_same() {
    let (a, b) = (Sandbox::new(), Sandbox::new());
    for s in [&a, &b] {
        for stage in ["prepare", "label", "extract", "train"] {
            s.run(&[stage]).ok();
        }
    }
    for file in
        ["examples/examples-00000.parquet", "labels/labels-00001.parquet", "features/features-00002.parquet"]
    {
        let read = |s: &Sandbox| fs::read(s.path("runs/small").join(file)).unwrap();
        assert!(read(&a) == read(&b), "{file} differs");
    }
}

#[test]
fn plan_reads_no_models() {
    let s = Sandbox::new();
    s.edit("recipe.toml", "/target\"", "/no-such-folder\"");
    let ran = s.run(&["plan"]).ok();
    assert!(ran.stdout.contains("label"), "{}", ran.stdout);
    let ran = s.run(&["plan", "--json"]).ok();
    serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap();
}
