//! `--devices`: workers on the pieces of one stage, killed, replaced, stopped.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use pkv_core::FailureKind;
use pkv_shard::PiecesState;
use pkv_test_support::files::{copy_folder, files};

use crate::sandbox::{Running, Sandbox};
use crate::trained::{finished, trained};

/// Enough examples that workers are met at work.
const MANY: [&str; 4] = ["--set", "data.train=120", "--set", "data.stride=0.05"];

/// A sandbox with examples.
fn prepared() -> Sandbox {
    let s = Sandbox::new();
    s.run(&[&["prepare"][..], &MANY].concat()).ok();
    s
}

fn start(s: &Sandbox, args: &[&str]) -> Running {
    s.start(&[args, &MANY, &["--devices", "cpu,cpu"]].concat())
}

/// Processes at work on labels.
fn at_work(s: &Sandbox) -> BTreeSet<u32> {
    let state = PiecesState::read(&s.path("runs/small/labels")).unwrap();
    let begun = state.into_iter().flat_map(|state| state.begun);
    begun.filter_map(|begun| begun.by).map(|by| by.pid).filter(|&pid| is_alive(pid)).collect()
}

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn kill(pid: u32, signal: &str) {
    Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
}

/// Labels of `s` and of one process on the same examples.
fn assert_as_of_one_process(s: &Sandbox) {
    let alone = Sandbox::new();
    copy_folder(&s.path("runs/small/examples"), &alone.path("runs/small/examples"));
    alone.run(&[&["label"][..], &MANY].concat()).ok();
    let labels = |s: &Sandbox| files(&s.path("runs/small/labels"));
    assert!(labels(s) == labels(&alone));
}

#[test]
fn two_workers_share_every_stage() {
    let s = finished();
    for folder in ["labels", "features", "eval"] {
        fs::remove_dir_all(s.path("runs/small").join(folder)).unwrap();
    }
    for (stage, folder) in [("label", "labels"), ("extract", "features")] {
        let ran = s.run(&[stage, "--devices", "cpu,cpu"]).ok();
        assert!(ran.stderr.contains("worker 1 on `cpu`"), "{}", ran.stderr);
        assert!(ran.stderr.contains("by 2 workers") && ran.stdout.is_empty(), "{}", ran.stderr);
        let of = |s: &Sandbox| files(&s.path("runs/small").join(folder));
        assert!(of(&s) == of(trained()), "{stage}");
    }
    let ran = s.run(&["eval", "--devices", "cpu,cpu"]).ok();
    assert!(ran.stdout.contains("mapper"), "the results are printed once: {}", ran.stdout);
    assert!(s.path("runs/small/eval/results.json").exists());
    assert!(!s.path("runs/small/eval/pieces").exists());
    // Thrown away once, before the workers start; and a part of a stage.
    let ran = s.run(&["label", "--redo", "label", "--devices", "cpu,cpu"]).ok();
    assert!(ran.stderr.contains("label: done in"), "{}", ran.stderr);
    fs::remove_dir_all(s.path("runs/small/labels")).unwrap();
    let ran = s.run(&["label", "--task", "1/2", "--devices", "cpu,cpu"]).ok();
    assert!(ran.stderr.contains("missing: 0, 2, 4") && ran.stderr.contains("--task 0/2"), "{}", ran.stderr);
}

#[test]
fn a_worker_that_dies_is_replaced_once() {
    let s = prepared();
    let mut child = start(&s, &["label"]);
    let mut killed = None;
    child.wait_until(|| {
        killed = at_work(&s).first().copied();
        killed.is_some()
    });
    kill(killed.expect("a worker was met at work"), "-KILL");
    let ran = child.end().ok();
    assert!(ran.stderr.contains("was ended by signal 9, and is replaced"), "{}", ran.stderr);
    assert_as_of_one_process(&s);
    // Whatever dies, dies: the second time it is named.
    fs::remove_dir_all(s.path("runs/small/labels")).unwrap();
    let mut child = start(&s, &["label"]);
    while child.wait_until(|| !at_work(&s).is_empty()) {
        at_work(&s).into_iter().for_each(|pid| kill(pid, "-KILL"));
    }
    let ran = child.end();
    let ran = ran.fails_as(
        FailureKind::Environment,
        &[
            "on `cpu` was ended by signal 9, as the one before it did not end well",
            "its last lines:",
            "the same command goes on",
        ],
    );
    assert!(ran.stderr.contains("loading the target"), "{}", ran.stderr);
    assert!(at_work(&s).is_empty(), "workers are left");
    // The same command goes on.
    start(&s, &["label"]).end().ok();
    assert_as_of_one_process(&s);
}

#[test]
fn a_signal_reaches_the_workers() {
    for signal in ["-TERM", "-INT", "-KILL"] {
        let s = prepared();
        let mut child = start(&s, &["label"]);
        let mut workers = BTreeSet::new();
        child.wait_until(|| {
            workers = at_work(&s);
            workers.len() == 2
        });
        kill(child.0.id(), signal);
        let ran = child.end();
        let begun = Instant::now();
        while workers.iter().any(|&pid| is_alive(pid)) {
            assert!(begun.elapsed() < Duration::from_secs(30), "{signal}: workers are left");
            std::thread::sleep(Duration::from_millis(10));
        }
        if signal != "-KILL" {
            assert_eq!(ran.code, 130, "{signal}: {}", ran.stderr);
            assert!(ran.stderr.contains("interrupted; "), "{}", ran.stderr);
        }
        start(&s, &["label"]).end().ok();
        assert_as_of_one_process(&s);
    }
}

#[test]
fn what_a_worker_refuses_is_refused() {
    let s = prepared();
    let ran = s.run(&["label", "--devices", "cpu,cpu"]);
    // Of other examples than this recipe's.
    ran.fails_with(&["worker", "its last lines:", "was made with other choices"]);
    s.run(&["label", "--devices", "cuda:7"]).fails_as(FailureKind::Environment, &["CUDA was asked for"]);
    s.run(&["label", "--devices", "all"]).fails_as(FailureKind::Environment, &["finds no GPU"]);
}
