//! `train --feature-workers`: any number of workers, some of them killed, train the mapper that one process
//! trains.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use pkv_core::FailureKind;
use serde_json::Value;

use crate::sandbox::{Ran, Running, Sandbox, assert_same};

/// Both models, a channel that is fitted to labels, and every row made each time it is read.
const SET: [&str; 5] = [
    "extract.from=[\"target\", \"proxy\"]",
    "extract.target_channels=[\"max_window\", \"key_norm\", \"hidden_linear\"]",
    "extract.missing=generate",
    "extract.after_use=delete",
    "train.cache_gb=0",
];

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(120);

fn args<'a>(what: &[&'a str]) -> Vec<&'a str> {
    what.iter().copied().chain(SET.iter().flat_map(|key| ["--set", key])).collect()
}

fn start(s: &Sandbox, what: &[&str]) -> Running {
    s.start(&args(what))
}

fn run(s: &Sandbox, what: &[&str]) -> Ran {
    s.run(&args(what))
}

fn sandbox() -> Sandbox {
    let s = Sandbox::new();
    run(&s, &["prepare"]).ok();
    run(&s, &["label"]).ok();
    s
}

/// Checkpoints, and metrics but for their times.
fn made(s: &Sandbox) -> BTreeMap<String, Vec<u8>> {
    let mut made = BTreeMap::new();
    for step in fs::read_dir(checkpoints(s)).unwrap().map(|f| f.unwrap()).filter(|f| f.path().is_dir()) {
        for file in fs::read_dir(step.path()).unwrap().map(|f| f.unwrap()) {
            let name = format!("{}/{}", step.file_name().display(), file.file_name().display());
            made.insert(name, fs::read(file.path()).unwrap());
        }
    }
    let metrics = fs::read_to_string(s.path("runs/small/train/metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        ["ms_per_step", "tokens_per_s"]
            .iter()
            .for_each(|key| drop(line.as_object_mut().unwrap().remove(*key)));
        line.to_string()
    };
    let metrics: Vec<String> = metrics.lines().map(timeless).collect();
    made.insert("metrics".to_owned(), metrics.join("\n").into_bytes());
    made
}

fn checkpoints(s: &Sandbox) -> PathBuf {
    s.path("runs/small/checkpoints")
}

fn has_checkpoint(s: &Sandbox) -> bool {
    let is_whole = |name: &str| name.starts_with("step-") && !name.contains("tmp");
    fs::read_dir(checkpoints(s))
        .is_ok_and(|mut files| files.any(|f| is_whole(&f.unwrap().file_name().to_string_lossy())))
}

/// Processes that `parent` has started.
fn children(parent: u32) -> Vec<i32> {
    let is_child = |id: &i32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let mut fields = after_name.split(' ');
        let (state, of) = (fields.next(), fields.next());
        // One that has died and was not waited for is none.
        of == Some(parent.to_string().as_str()) && state != Some("Z")
    };
    let ids = fs::read_dir("/proc").unwrap().filter_map(|f| f.unwrap().file_name().to_str()?.parse().ok());
    ids.filter(is_child).collect()
}

fn signal(id: i32, signal: i32) {
    // SAFETY: a signal to a process of this test; one that has ended meanwhile is passed over.
    unsafe { libc::kill(id, signal) };
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LONG, "{what}: not within {LONG:?}");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn any_number_of_workers_trains_the_bytes_of_one_process() {
    let s = sandbox();
    run(&s, &["train"]).ok();
    let alone = made(&s);
    assert!(alone.len() > 1);
    for workers in ["1", "3"] {
        let ran = run(&s, &["train", "--redo", "train", "--feature-workers", workers]).ok();
        assert!(ran.stderr.contains("rows of features by"), "{}", ran.stderr);
        assert_same(&made(&s), &alone, &format!("{workers} workers"));
    }
    assert!(!s.path("runs/small/features").exists() && !s.path("runs/small/features-target").exists());

    // One worker is killed when it starts, later two at once: those that were not replaced before are now.
    let train = start(&s, &["train", "--redo", "train", "--feature-workers", "3"]);
    let mut first = Vec::new();
    until("three workers are started", || {
        first = children(train.0.id());
        first.len() == 3
    });
    signal(first[0], libc::SIGKILL);
    until("a worker is replaced", || children(train.0.id()).iter().any(|id| !first.contains(id)));
    until("there is a checkpoint", || has_checkpoint(&s));
    children(train.0.id()).into_iter().take(2).for_each(|id| signal(id, libc::SIGKILL));
    let ran = train.end().ok();
    assert!(ran.stderr.contains("was ended by signal 9, and is replaced"), "{}", ran.stderr);
    assert_same(&made(&s), &alone, "killed workers");

    // An interrupt, and the death of the process itself, end all; training goes on in the middle.
    for (n, sent) in ["3", "1"].into_iter().zip([libc::SIGINT, libc::SIGKILL]) {
        let redo: &[&str] = if sent == libc::SIGINT { &["--redo", "train"] } else { &[] };
        let mut train = start(&s, &[&["train", "--feature-workers", n], redo].concat());
        let mut workers = Vec::new();
        until("its workers are started", || {
            workers = children(train.0.id());
            workers.len() == n.parse::<usize>().unwrap()
        });
        if sent == libc::SIGINT {
            until("there is a checkpoint", || has_checkpoint(&s));
        }
        train.signal(sent);
        let status = train.0.wait().unwrap();
        if sent == libc::SIGINT {
            assert_eq!(status.code(), Some(i32::from(FailureKind::Interrupted.exit_code())));
        }
        let is_gone = |id: &i32| !PathBuf::from(format!("/proc/{id}")).exists();
        until("its workers have ended", || workers.iter().all(is_gone));
    }
    run(&s, &["train", "--feature-workers", "2"]).ok();
    // The interrupted one may have a checkpoint more.
    let (found, last) = (made(&s), alone.keys().rev().find(|name| name.starts_with("step-")).unwrap());
    let of = |made: &BTreeMap<String, Vec<u8>>, name: &str| made.get(name).cloned();
    for name in [last, "metrics"] {
        assert!(of(&found, name) == of(&alone, name), "`{name}` differs after two stops");
    }
}

#[test]
fn training_without_workers_left_says_who_died_and_goes_on_later() {
    let s = sandbox();
    run(&s, &["train"]).ok();
    let alone = made(&s);
    // Else those would be seen that `--redo` is about to remove.
    fs::remove_dir_all(checkpoints(&s)).unwrap();
    let mut train = start(&s, &["train", "--redo", "train", "--feature-workers", "2"]);
    until("there is a checkpoint", || has_checkpoint(&s));
    until("training has ended", || {
        children(train.0.id()).into_iter().for_each(|id| signal(id, libc::SIGKILL));
        train.0.try_wait().unwrap().is_some()
    });
    let ran = train.end().fails_as(FailureKind::Environment, &["feature worker"]);
    assert!(ran.stderr.contains("was ended by signal 9, and is replaced"), "{}", ran.stderr);
    assert!(has_checkpoint(&s));
    run(&s, &["train", "--feature-workers", "1"]).ok();
    let found = made(&s);
    let last = alone.keys().rfind(|name| name.starts_with("step-")).unwrap();
    assert!(found.contains_key(last) && found["metrics"] == alone["metrics"]);
    for (name, bytes) in alone.iter().filter(|(name, _)| found.contains_key(*name)) {
        assert!(*bytes == found[name], "`{name}` differs");
    }
}

#[test]
fn workers_are_refused_where_features_are_stored() {
    let s = Sandbox::new();
    let parts = ["`--feature-workers` make features that are not stored", "extract.after_use=delete"];
    s.run(&["train", "--feature-workers", "2"]).fails_as(FailureKind::Usage, &parts);
}
