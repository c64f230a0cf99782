//! Files that never end, runs that run away, two processes in one folder, outputs that vanish, markup of
//! others: each ends with a sentence and a hint, soon, and nothing that was there before is lost.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pkv_core::FailureKind;
use pkv_files::lock_work;
use pkv_test_support::files::files_below;
use serde_json::Value;

use crate::sandbox::{Ran, Running, Sandbox, root};
use crate::trained::finished;

/// As the finished run was evaluated.
const POLICIES: &str = "eval.answer_policies=[\"pair\",\"pair-uniform\",\"pair-budget\"]";

fn run(s: &Sandbox, args: &[&str]) -> Ran {
    Running::new(&mut s.command(args)).end_soon()
}

fn with_recipe(s: &Sandbox, args: &[&str]) -> Ran {
    s.start(args).end_soon()
}

fn replace(path: &Path, make: impl Fn(&Path)) {
    let _ = fs::remove_file(path);
    make(path);
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn endless(path: &Path) {
    symlink("/dev/zero", path).unwrap();
}

fn recorded(s: &Sandbox) -> Vec<String> {
    let run: Value =
        serde_json::from_str(&fs::read_to_string(s.path("runs/small/run.json")).unwrap()).unwrap();
    run["stages"].as_object().unwrap().keys().cloned().collect()
}

#[test]
fn files_that_never_end_are_refused() {
    let s = finished();
    for make in [endless, fifo] {
        replace(&s.path("base.toml"), make);
        s.write("based.toml", "base = \"base.toml\"\n");
        run(&s, &["plan", "--recipe", "based.toml"])
            .fails_with(&["cannot read recipe `base.toml`", "expected a regular file"]);
        replace(&s.path("odd.toml"), make);
        with_recipe(&s, &["plan", "--set", "data.manifest=odd.toml"])
            .fails_with(&["cannot read data manifest", "expected a regular file"]);
        for file in ["config.json", "model.safetensors", "parity.safetensors", "budgets.json"] {
            let path = s.path("runs/small/export").join(file);
            let whole = fs::read(&path).unwrap();
            replace(&path, make);
            run(
                &s,
                &[
                    "infer",
                    "--mapper",
                    "runs/small/export",
                    "--context",
                    "recipe.toml",
                    "--question",
                    "What?",
                ],
            )
            .fails_with(&["cannot read export", "expected a regular file"]);
            replace(&path, |p| fs::write(p, &whole).unwrap());
        }
    }
    // The results add up anew from what lies beside them.
    for content in ["[".repeat(100_000), "{\"a\":".repeat(100_000)] {
        s.write("runs/small/eval/results.json", &content);
        run(&s, &["inspect", "runs/small/eval/results.json"]).fails_with(&["is no JSON"]);
        with_recipe(&s, &["eval", "--set", POLICIES]).ok();
    }
    for make in [endless, fifo] {
        replace(&s.path("runs/small/eval/results.json"), make);
        run(&s, &["inspect", "runs/small/eval/results.json"]).fails_with(&["is a device, pipe or socket"]);
        with_recipe(&s, &["eval", "--set", POLICIES]).ok();
    }
}

#[test]
fn a_training_that_runs_away_saves_nothing_of_it() {
    let s = Sandbox::new();
    s.edit("recipe.toml", "warmup_steps = 4", "warmup_steps = 1\nlr = 1e30");
    for stage in ["prepare", "label", "extract"] {
        s.run(&[stage]).ok();
    }
    s.run(&["train"]).fails_with(&[
        "training diverged at step",
        "of epoch 1 holds examples `",
        "lower `train.lr`",
    ]);
    s.edit("recipe.toml", "lr = 1e30", "lr = 1e-3");
    s.run(&["train", "--redo", "train"]).ok();
}

/// The text of `text` between `from` and the next `to`, as often as there is one.
fn between<'a>(text: &'a str, from: &'a str, to: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(from).skip(1).map(move |rest| rest.split(to).next().unwrap_or_default())
}

#[test]
fn a_training_that_diverged_goes_on_as_its_hint_says() {
    let s = Sandbox::new();
    // The rate rises until the last step: it is too high for some step in the midst.
    s.edit("recipe.toml", "warmup_steps = 4", "warmup_steps = 24\nlr = 200");
    for stage in ["prepare", "label", "extract"] {
        s.run(&[stage]).ok();
    }
    let checkpoint =
        |step: &str| s.path(&format!("runs/small/checkpoints/step-{step:0>6}/model.safetensors"));
    let mut cuts = Vec::new();
    for attempt in 0.. {
        assert!(attempt < 8, "the hints lead nowhere: {cuts:?}");
        let args: Vec<&str> =
            ["train"].into_iter().chain(cuts.iter().flat_map(|c: &String| ["--set", c.as_str()])).collect();
        let ran = s.run(&args);
        if ran.code == 0 {
            break;
        }
        let said = ran
            .fails_with(&["training diverged at step", "holds examples `", "is whole: to go on from it"])
            .stderr;
        for step in between(&said, "remove `checkpoints/step-", "`") {
            fs::remove_dir_all(checkpoint(step).parent().unwrap()).unwrap();
        }
        let step = between(&said, "the checkpoint of step ", " ").next().unwrap().to_owned();
        assert!(checkpoint(&step).is_file(), "step {step}");
        cuts = vec![between(&said, "--set '", "'").next().unwrap().to_owned()];
    }
    assert!(!cuts.is_empty(), "it never diverged");
    let steps = fs::read_to_string(s.path("runs/small/train/metrics.jsonl")).unwrap();
    assert!(
        steps.lines().all(|l| serde_json::from_str::<Value>(l).is_ok()) && steps.contains("\"step\":24"),
        "{steps}"
    );
    s.run(&["export", "--set", &cuts[0]]).ok();
    // Without the cut it is another training, and so it is with one before a checkpoint that there is.
    s.run(&["train"]).fails_with(&["other choices", "train.lr_cuts"]);
    s.run(&["train", "--set", "train.lr_cuts=[[1, 0.5]]"]).fails_with(&["train.lr_cuts", "or remove `step-"]);
    s.run(&["train", "--set", "train.lr_cuts=[[3, 2.0]]"]).fails_with(&["0 < factor < 1"]);
}

#[test]
fn inspect_says_which_weights_are_damaged() {
    let s = finished();
    for (folder, file) in [
        ("checkpoints/step-000024", "model.safetensors"),
        ("checkpoints/step-000024", "optimizer.safetensors"),
        ("export", "model.safetensors"),
        ("export", "parity.safetensors"),
    ] {
        let folder = format!("runs/small/{folder}");
        let path = s.path(&folder).join(file);
        let inspect = |what: &str| Ran::new(s.command(&["inspect", what]).output().unwrap());
        assert!(inspect(&folder).ok().stdout.contains("matches"), "{folder}");
        assert!(inspect(&format!("{folder}/{file}")).ok().stdout.contains("all hashes match"), "{file}");
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        // In the numbers, where nothing but the hash can tell.
        let at = flipped.len() - 100;
        flipped[at] ^= 1;
        fs::write(&path, flipped).unwrap();
        for what in [&folder, &format!("{folder}/{file}")] {
            inspect(what).fails_with(&[&format!("`{file}` is damaged: expected SHA-256")]);
        }
        if folder.contains("checkpoints") {
            let all = inspect("runs/small/checkpoints").ok().stdout;
            assert_eq!(all.matches("is damaged").count(), 1, "{all}");
        }
        fs::write(&path, whole).unwrap();
    }
}

/// What lets calls fail, compiled.
fn shim(s: &Sandbox) -> PathBuf {
    let (source, shim) = (root().join("scripts/faults/shim.c"), s.path("shim.so"));
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(source).arg("-ldl");
    assert!(compile.status().unwrap().success());
    shim
}

#[test]
fn what_lies_where_a_run_writes_is_replaced_or_refused() {
    let s = finished();
    let export = s.path("runs/small/export");
    let before = files_below(&export);
    for make in
        [fifo, |path: &Path| symlink("nothing", path).unwrap(), |path: &Path| symlink(path, path).unwrap()]
    {
        fs::rename(&export, s.path("kept")).unwrap();
        make(&export);
        with_recipe(&s, &["export"]).ok();
        assert_eq!(files_below(&export).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        assert!(!s.path("runs/small/export.tmp").exists() && !s.path("runs/small/export.old.tmp").exists());
        fs::remove_dir_all(s.path("kept")).unwrap();
    }
    let (input, environment) = (FailureKind::Input, FailureKind::Environment);
    for (file, stage, kind) in
        [("train.lock", "train", input), ("eval.lock", "eval", input), ("log.jsonl", "report", environment)]
    {
        replace(&s.path("runs/small").join(file), fifo);
        with_recipe(&s, &[stage]).fails_as(kind, &[file]);
        fs::remove_file(s.path("runs/small").join(file)).unwrap();
    }
}

#[test]
fn a_report_says_what_it_lacks_where_it_is_asked_for() {
    let s = finished();
    for file in ["eval/results.json", "eval/answers.parquet"] {
        let path = s.path("runs/small").join(file);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, [0; 9]).unwrap();
        let said = s.run(&["report"]).ok().stderr;
        assert!(said.contains("the report lacks a part") && said.contains(file), "{file}: {said}");
        fs::write(&path, whole).unwrap();
    }
    assert!(!s.run(&["report"]).ok().stderr.contains("lacks"));
}

#[test]
fn folders_that_are_no_utf_8_serve() {
    let s = finished();
    let odd = s.path(".").join(OsStr::from_bytes(b"\xff"));
    fs::create_dir(&odd).unwrap();
    fs::rename(s.path("runs"), odd.join("runs")).unwrap();
    let run = |args: &[&str], more: &[&str]| {
        let mut command = s.command(&[]);
        command.arg("--runs").arg(odd.join("runs")).args(args).arg("--recipe").arg("recipe.toml").args(more);
        Running::new(&mut command).end_soon().ok()
    };
    run(&["export", "--redo", "export", "--json"], &[]);
    run(&["report", "--json"], &[]);
    fs::copy(s.path("recipe.toml"), odd.join("recipe.toml")).unwrap();
    let mut plan = s.command(&["plan", "--resolved", "--json", "--recipe"]);
    let stdout = Running::new(plan.arg(odd.join("recipe.toml"))).end_soon().ok().stdout;
    assert!(stdout.contains("recipe.toml"), "{stdout}");
    let mut prepare = s.command(&["prepare", "--recipe"]);
    Running::new(prepare.arg(odd.join("recipe.toml"))).end_soon().ok();
    let ls = Running::new(s.command(&["recipes", "ls", "--json"]).current_dir(&odd)).end_soon();
    assert_ne!(ls.code, 101, "{}", ls.stderr);
}

#[test]
fn a_run_that_may_not_be_written_can_be_looked_at() {
    let s = finished();
    let ran = s
        .command(&["prepare", "--show", "1", "--recipe", "recipe.toml"])
        .env("LD_PRELOAD", shim(&s))
        .envs([
            ("FAIL_OP", "open"),
            ("FAIL_MODE", "stick"),
            ("FAIL_ERRNO", "30"),
            ("FAIL_N", "1"),
            ("FAIL_PATH", "log.jsonl"),
        ])
        .output()
        .unwrap();
    let ran = Ran::new(ran).ok();
    assert!(ran.stderr.contains("cannot open log file") && !ran.stdout.is_empty(), "{}", ran.stderr);
}

#[test]
fn a_hangup_that_is_ignored_ends_nothing() {
    let s = Sandbox::new();
    let begin = |on_hangup: libc::sighandler_t| {
        let mut command = s.command(&["run", "--recipe", "recipe.toml"]);
        // These tests may run under `nohup` themselves.
        // SAFETY: `signal` may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGHUP, on_hangup);
                Ok(())
            });
        }
        let mut run = Running::new(&mut command);
        assert!(run.wait_until(|| s.path("runs/small/examples/index.json").exists()), "it ended before");
        run.signal(libc::SIGHUP);
        run.end()
    };
    let ended = begin(libc::SIG_DFL);
    assert_eq!(ended.code, i32::from(FailureKind::Interrupted.exit_code()), "{}", ended.stderr);
    fs::remove_dir_all(s.path("runs")).unwrap();
    begin(libc::SIG_IGN).ok();
}

/// The short form of `scripts/faults/storage.py`.
#[test]
fn storage_that_fails_is_named_and_the_stage_goes_on_to_the_same_bytes() {
    let s = finished();
    let shim = shim(&s);
    for (stage, folder) in [("label", "labels"), ("train", "checkpoints/step-000024")] {
        let folder = s.path("runs/small").join(folder);
        let files = || {
            let mut all = files_below(&folder);
            all.retain(|name, _| !name.ends_with(".lock"));
            all
        };
        let whole = files();
        assert!(whole.len() > 2, "{whole:?}");
        for (call, mode, error) in [
            ("write", "once", "28"),
            ("write", "short", "28"),
            ("fsync", "once", "5"),
            ("rename", "once", "5"),
            ("open", "once", "24"),
            ("rename", "kill", "0"),
            ("rename", "after", "0"),
        ] {
            let case = format!("{stage}, {call} {mode}");
            let ran = s
                .command(&[stage, "--redo", stage, "--recipe", "recipe.toml"])
                .env("LD_PRELOAD", &shim)
                .envs([("FAIL_OP", call), ("FAIL_MODE", mode), ("FAIL_ERRNO", error), ("FAIL_N", "4")])
                .envs([("FAIL_PATH", "runs/"), ("FAIL_NOT", "run.json")])
                .output()
                .unwrap();
            let ran = Ran::new(ran);
            match mode {
                "kill" | "after" => assert_eq!(ran.code, -1, "{case}: {}", ran.stderr),
                _ => _ = ran.fails_as(FailureKind::Environment, &["runs/small"]),
            }
            s.run(&[stage]).ok();
            assert!(files() == whole, "{case}");
        }
    }
}

#[test]
fn a_stage_at_work_is_met_with_a_sentence() {
    let s = finished();
    let held = |name: &str, shared: bool| {
        lock_work(&s.path("runs/small").join(name), shared, "is this test").unwrap()
    };
    for (stage, lock) in [("train", "train.lock"), ("eval", "eval.lock"), ("export", "export.lock")] {
        let before = recorded(&s);
        let one = held(lock, stage == "eval");
        s.run(&[stage, "--redo", stage]).fails_as(
            FailureKind::Environment,
            &[&format!("another process runs `{stage}`"), "wait for it to end"],
        );
        assert_eq!(recorded(&s), before, "{stage}");
        drop(one);
    }
    // Evaluations add up: two may be at it.
    let _other = held("eval.lock", true);
    assert!(s.run(&["eval"]).ok().stderr.contains("eval: skipped"));
    assert!(s.run(&["train"]).ok().stderr.contains("train: skipped"));
}

#[test]
fn two_exports_leave_one_export_and_its_record() {
    let s = finished();
    for _ in 0..3 {
        let args = ["export", "--redo", "export"];
        let both = [s.start(&args), s.start(&args)].map(Running::end_soon);
        assert!(both.iter().any(|ran| ran.code == 0), "{}\n{}", both[0].stderr, both[1].stderr);
        for ran in both.into_iter().filter(|ran| ran.code != 0) {
            ran.fails_as(FailureKind::Environment, &["another process runs `export`"]);
        }
        assert!(recorded(&s).contains(&"export".to_owned()));
        assert!(s.run(&["export"]).ok().stderr.contains("export: skipped"));
    }
}

#[test]
fn what_a_killed_process_left_beside_run_json_goes() {
    let s = finished();
    s.write("runs/small/run.json.4711.tmp", "{");
    s.write("runs/small/run.json.tmp", "{");
    s.run(&["prepare"]).ok();
    let names: Vec<_> = fs::read_dir(s.path("runs/small"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!names.iter().any(|n| n.ends_with(".tmp")), "{names:?}");
}

#[test]
fn lost_metrics_are_said() {
    let s = finished();
    fs::remove_file(s.path("runs/small/train/metrics.jsonl")).unwrap();
    let said = s.run(&["train"]).ok().stderr;
    assert!(said.contains("metrics.jsonl` is gone") && said.contains("--redo train"), "{said}");
}

#[test]
fn a_log_file_that_takes_nothing_is_said_once() {
    let s = finished();
    replace(&s.path("runs/small/log.jsonl"), |p| symlink("/dev/full", p).unwrap());
    let said = s.run(&["train"]).ok().stderr;
    assert_eq!(said.matches("cannot write the log file").count(), 1, "{said}");
}

#[test]
fn names_cannot_steer_the_terminal() {
    let s = Sandbox::new();
    let ran = s.run(&[
        "plan",
        "--set",
        "target.model=\u{1b}]0;owned\u{7}\u{9b}2J",
        "--set",
        "data.manifest=\u{1b}[31mx",
    ]);
    ran.fails_with(&["\\u001b[31mx"]);
    let folder = "runs/\u{1b}[2J";
    s.write(&format!("{folder}/run.json"), "{\"name\": \"\\u001b[31m\\u009b\"}");
    let ran = Ran::new(s.command(&["inspect", folder]).output().unwrap()).ok();
    assert!(!ran.stdout.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{:?}", ran.stdout);
    assert!(ran.stdout.contains("\\u001b[31m\\u009b"), "{}", ran.stdout);
}
