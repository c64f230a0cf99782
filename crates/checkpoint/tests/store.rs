//! Training state: bit-exact, rotated, and never lost to a kill or a full disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pkv_checkpoint::{CheckpointInfo, CheckpointStore, read_tensors, write_tensors};
use pkv_core::Fingerprint;
use pkv_files::WriteBudget;
use pkv_shard::StaleError;
use pkv_test_support::kill::{FOLDER, kill};
use serde_json::json;
use tch::{Kind, Tensor};
use tempfile::tempdir;
use tracing::field::{Field, Visit};

use crate::common::*;

fn open(dir: &Path) -> CheckpointStore {
    CheckpointStore::open(dir, &choices(), 2).unwrap()
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    for ema in [false, true] {
        let dir = tempdir().unwrap();
        let saved = state(700, Some(0.625), ema);
        let store = open(dir.path());
        assert!(store.latest(cpu()).unwrap().is_none() && store.best(cpu()).unwrap().is_none());
        let folder = store.save(&saved).unwrap();
        assert_eq!(names(&folder), ["model.safetensors", "optimizer.safetensors", "state.json"]);
        same_state(&store.latest(cpu()).unwrap().unwrap(), &saved);
        same_state(&store.best(cpu()).unwrap().unwrap(), &saved);
        let expected = if ema {
            saved.ema.iter().map(bits).collect::<Vec<_>>()
        } else {
            saved.network.iter().chain(&saved.loss).map(|(_, t)| bits(t)).collect()
        };
        let weights = store.latest(cpu()).unwrap().unwrap().weights();
        assert_eq!(weights.iter().map(|(_, t)| bits(t)).collect::<Vec<_>>(), expected);

        let again = tempdir().unwrap();
        let other = open(again.path()).save(&saved).unwrap();
        assert_eq!(files(&folder), files(&other), "the same state gives the same bytes");
    }
}

#[test]
fn rotation_keeps_the_last_ones_and_the_best() {
    let dir = tempdir().unwrap();
    let store = open(dir.path());
    let values = [Some(0.3), Some(0.8), None, Some(0.8), Some(0.5), None];
    for (i, value) in values.into_iter().enumerate() {
        store.save(&state(i as u64 * 100, value, false)).unwrap();
    }
    // Of the two at 0.8 the earlier one is best.
    assert_eq!(names(dir.path()), ["step-000100", "step-000400", "step-000500"]);
    assert_eq!(store.best_validation().unwrap(), Some((100, 0.8)));
    same_state(&store.best(cpu()).unwrap().unwrap(), &state(100, Some(0.8), false));
    same_state(&store.latest(cpu()).unwrap().unwrap(), &state(500, None, false));
    let steps: Vec<u64> = store.list().unwrap().iter().map(|i: &CheckpointInfo| i.step).collect();
    assert_eq!(steps, [100, 400, 500]);
    drop(store);
    let reader = CheckpointStore::read_only(dir.path()).unwrap();
    same_state(&reader.best(cpu()).unwrap().unwrap(), &state(100, Some(0.8), false));
    assert!(reader.save(&state(600, None, false)).is_err());
}

#[test]
fn no_best_is_named_while_a_checkpoint_cannot_be_read() {
    for file in ["state.json", "model.safetensors"] {
        let dir = tempdir().unwrap();
        let store = open(dir.path());
        store.save(&state(0, Some(0.9), false)).unwrap();
        store.save(&state(100, Some(0.3), false)).unwrap();
        // A loop of links: the system refuses to open it, and says nothing of what it holds.
        let path = dir.path().join("step-000000").join(file);
        fs::remove_file(&path).unwrap();
        symlink(&path, &path).unwrap();
        let refused = format!("{:#}", store.best(cpu()).unwrap_err());
        assert!(refused.contains("step-000000` cannot be read, and may be the best"), "{refused}");
        same_state(&store.latest(cpu()).unwrap().unwrap(), &state(100, Some(0.3), false));
        fs::remove_file(&path).unwrap();
        same_state(&store.best(cpu()).unwrap().unwrap(), &state(100, Some(0.3), false));
    }
}

#[test]
fn steps_beyond_six_digits_stay_in_order() {
    let dir = tempdir().unwrap();
    let store = open(dir.path());
    for step in [999_999, 1_000_000, 2_000_000] {
        store.save(&state(step, None, false)).unwrap();
    }
    assert_eq!(store.latest(cpu()).unwrap().unwrap().step, 2_000_000);
    assert_eq!(names(dir.path()), ["step-1000000", "step-2000000"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_warning() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 9] = [
        ("is damaged: expected SHA-256", |f| {
            let path = f.join("model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            let at = bytes.len() - 3;
            bytes[at] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("`optimizer.safetensors` is damaged: expected 848 bytes, found 64", |f| {
            fs::OpenOptions::new()
                .write(true)
                .open(f.join("optimizer.safetensors"))
                .unwrap()
                .set_len(64)
                .unwrap();
        }),
        ("cannot read", |f| fs::remove_file(f.join("model.safetensors")).unwrap()),
        ("cannot read", |f| fs::write(f.join("state.json"), "{\"schema_version\": 2,").unwrap()),
        ("a device, pipe or socket, expected a regular file", |f| {
            fs::remove_file(f.join("model.safetensors")).unwrap();
            symlink("/dev/zero", f.join("model.safetensors")).unwrap();
        }),
        ("a device, pipe or socket, expected a regular file", |f| {
            fs::remove_file(f.join("state.json")).unwrap();
            symlink("/dev/zero", f.join("state.json")).unwrap();
        }),
        // As earlier versions saved it.
        ("`context.bias` holds numbers that are not finite", |f| {
            let mut bad = read_tensors(&f.join("model.safetensors"), cpu()).unwrap();
            let bias = bad.iter_mut().find(|(name, _)| name == "context.bias").unwrap();
            bias.1 = Tensor::full([5], f64::NAN, (Kind::Float, cpu()));
            let text = fs::read_to_string(f.join("state.json")).unwrap();
            let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
            pkv_core::unseal(&mut state).unwrap();
            let new = write_tensors(&f.join("model.safetensors"), &bad, &WriteBudget::unlimited()).unwrap();
            state["files"]["model.safetensors"]["sha256"] = json!(new.sha256);
            fs::write(f.join("state.json"), state.to_string()).unwrap();
        }),
        ("it is damaged, or was edited", |f| {
            let text = fs::read_to_string(f.join("state.json")).unwrap();
            fs::write(f.join("state.json"), text.replace("\"validation\": 0.9", "\"validation\": 0.1"))
                .unwrap();
        }),
        ("expected checkpoint version 1 or 2, found 7", |f| {
            let text = fs::read_to_string(f.join("state.json")).unwrap();
            fs::write(f.join("state.json"), text.replace("\"schema_version\": 2", "\"schema_version\": 7"))
                .unwrap();
        }),
    ];
    for (said, damage) in damages {
        let dir = tempdir().unwrap();
        let store = open(dir.path());
        store.save(&state(100, Some(0.5), true)).unwrap();
        let newest = store.save(&state(200, Some(0.9), true)).unwrap();
        damage(&newest);
        let (found, warnings) =
            warnings(|| (store.latest(cpu()).unwrap().unwrap(), store.best(cpu()).unwrap().unwrap()));
        same_state(&found.0, &state(100, Some(0.5), true));
        same_state(&found.1, &state(100, Some(0.5), true));
        assert!(
            warnings.iter().any(|w| w.contains("step-000200") && w.contains(said)),
            "{said}: {warnings:?}"
        );
        // Training comes by again and replaces it.
        store.save(&state(200, Some(0.9), true)).unwrap();
        same_state(&store.latest(cpu()).unwrap().unwrap(), &state(200, Some(0.9), true));
        assert_eq!(names(dir.path()), ["step-000100", "step-000200"]);
    }
}

#[test]
fn the_best_checkpoint_outlives_a_disk_that_cannot_read_it() {
    let dir = tempdir().unwrap();
    let store = open(dir.path());
    let best = store.save(&state(100, Some(0.9), false)).unwrap();
    store.save(&state(200, Some(0.4), false)).unwrap();
    // A link to itself can no more be opened than a file on a failing disk.
    let (file, kept) = (best.join("state.json"), best.join("kept"));
    fs::rename(&file, &kept).unwrap();
    symlink(&file, &file).unwrap();
    let (_, warnings) = warnings(|| store.save(&state(300, Some(0.5), false)).unwrap());
    assert!(warnings.iter().any(|w| w.contains("passing over") && w.contains("step-000100")), "{warnings:?}");
    assert_eq!(store.best_validation().unwrap(), Some((300, 0.5)));
    store.save(&state(400, Some(0.4), false)).unwrap();
    fs::rename(&kept, &file).unwrap();
    assert_eq!(names(dir.path()), ["step-000100", "step-000300", "step-000400"]);
    same_state(&store.best(cpu()).unwrap().unwrap(), &state(100, Some(0.9), false));
    // What is there and wrong makes room.
    fs::write(&file, "{}").unwrap();
    store.save(&state(500, Some(0.1), false)).unwrap();
    assert_eq!(names(dir.path()), ["step-000300", "step-000400", "step-000500"]);
}

#[test]
fn other_choices_are_stale() {
    let dir = tempdir().unwrap();
    open(dir.path()).save(&state(100, None, false)).unwrap();
    let other = Fingerprint::new().with("train", json!({"lr": 1e-3, "steps": 1500}));
    let error = CheckpointStore::open(dir.path(), &other, 2).unwrap_err();
    let (said, hint) = text_and_hint(&error);
    assert!(said.contains("`train.lr` was 0.002 when it was written and is 0.001 now"), "{said}");
    assert!(hint.contains("--redo train"), "{hint}");
    assert_eq!(error.downcast_ref::<StaleError>().unwrap().stage, "train");
}

#[test]
fn a_cut_of_the_rate_leaves_the_checkpoints_before_it() {
    let dir = tempdir().unwrap();
    let with = |cuts: serde_json::Value| {
        Fingerprint::new().with("train", json!({"lr": 2e-3, "steps": 1500, "lr_cuts": cuts}))
    };
    for step in [100, 200] {
        open(dir.path()).save(&state(step, None, false)).unwrap();
    }
    for (cuts, is_fresh) in [
        (json!([[200, 0.1]]), true),
        (json!([[200, 0.1], [300, 0.5]]), true),
        (json!([[199, 0.1]]), false),
        (json!([[100, 0.1], [300, 0.5]]), false),
        (json!("none"), true),
    ] {
        let opened = CheckpointStore::open(dir.path(), &with(cuts.clone()), 9);
        assert_eq!(opened.is_ok(), is_fresh, "{cuts}");
        if let Err(e) = opened {
            let (said, hint) = text_and_hint(&e);
            assert!(
                said.contains("train.lr_cuts") && hint.contains("remove `step-000200`"),
                "{said}, {hint}"
            );
        }
    }
    // From a checkpoint that was made with a cut, there is no way back to none.
    CheckpointStore::open(dir.path(), &with(json!([[200, 0.1]])), 9)
        .unwrap()
        .save(&state(300, None, false))
        .unwrap();
    assert!(CheckpointStore::open(dir.path(), &choices(), 9).is_err());
    assert!(CheckpointStore::open(dir.path(), &with(json!([[200, 0.1], [300, 0.1]])), 9).is_ok());
}

#[test]
fn one_process_trains_at_a_time() {
    let dir = tempdir().unwrap();
    let _first = open(dir.path());
    let error = CheckpointStore::open(dir.path(), &choices(), 2).unwrap_err();
    assert!(text_and_hint(&error).0.contains("another process writes"));
    CheckpointStore::read_only(dir.path()).unwrap();
    let (said, hint) = text_and_hint(&CheckpointStore::read_only(&dir.path().join("none")).unwrap_err());
    assert!(said.contains("does not exist") && hint.contains("proxykv-train train"), "{said}");
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    let dir = tempdir().unwrap();
    open(dir.path()).save(&state(100, Some(0.5), true)).unwrap();
    let size: u64 = files(&dir.path().join("step-000100")).values().map(|f| f.len() as u64).sum();
    for budget in (0..size).step_by(97) {
        let store = open(dir.path()).with_write_budget(WriteBudget::bytes(budget));
        let (said, hint) = text_and_hint(&store.save(&state(200, Some(0.9), true)).unwrap_err());
        assert!(
            said.starts_with("cannot save checkpoint") && hint.contains("free some space"),
            "{said} {hint}"
        );
        assert_eq!(names(dir.path()), ["step-000100"]);
        same_state(&store.latest(cpu()).unwrap().unwrap(), &state(100, Some(0.5), true));
    }
    let store = open(dir.path()).with_write_budget(WriteBudget::bytes(size + 64));
    store.save(&state(200, Some(0.9), true)).unwrap();
}

/// SIGKILL at random moments: what is there is whole, and the next process continues.
#[test]
fn a_killed_process_leaves_whole_checkpoints() {
    let dir = tempdir().unwrap();
    let mut last = None;
    for attempt in 0..12u64 {
        let (before, delay) = (names(dir.path()), Duration::from_millis(attempt * 29 % 150));
        kill("store::child", dir.path(), || names(dir.path()) != before, delay);
        let store = open(dir.path());
        assert!(names(dir.path()).iter().all(|n| !n.ends_with(".tmp")), "an interrupted save was left");
        let (found, warnings) = warnings(|| store.latest(cpu()).unwrap());
        assert_eq!(warnings, [""; 0], "a checkpoint was damaged");
        if let Some(found) = found {
            same_state(&found, &child_state(found.step));
            assert!(last <= Some(found.step), "step {} after {last:?}", found.step);
            last = Some(found.step);
        }
    }
    assert!(last > Some(8), "the process saved next to nothing: {last:?}");
}

fn child_state(step: u64) -> pkv_checkpoint::TrainingState {
    state(step, step.is_multiple_of(3).then_some(((step * 7) % 11) as f64), true)
}

/// Not a test: the process that the test above kills. It saves as fast as it can.
#[test]
#[ignore = "run by a_killed_process_leaves_whole_checkpoints"]
fn child() {
    let dir = std::env::var(FOLDER).expect("run by a_killed_process_leaves_whole_checkpoints");
    let store = open(dir.as_ref());
    let from = store.latest(cpu()).unwrap().map_or(0, |s| s.step);
    for step in from + 1..=u64::MAX {
        store.save(&child_state(step)).unwrap();
    }
}

/// The warnings that `f` logs.
fn warnings<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let result = tracing::subscriber::with_default(Warnings(Arc::clone(&seen)), f);
    let seen = seen.lock().unwrap().clone();
    (result, seen)
}

struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
