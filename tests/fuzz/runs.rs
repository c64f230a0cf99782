//! What a run folder holds. The folder is a finished run, made once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::ensure;
use pkv_checkpoint::{CheckpointStore, Export};
use pkv_core::{seal, unseal};
use pkv_results::compare;
use pkv_shard::{Example, FeatureRow, LabelRow, Row, RunJson, RunLayout, StageReader};
use pkv_test_support::files::copy_folder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::Device;

use crate::folder;
use crate::harness::Target;
use crate::sandbox::Ran;
use crate::sandbox::Sandbox;

/// A folder `name` with `part` of the finished run.
fn part(name: &str, part: &str) -> PathBuf {
    let dir = folder(name);
    copy_folder(&finished().path("runs/small").join(part), &dir.join(part));
    dir
}

fn finished() -> &'static Sandbox {
    static RUN: OnceLock<Sandbox> = OnceLock::new();
    RUN.get_or_init(|| {
        let s = Sandbox::new();
        s.run(&["run"]).ok();
        s
    })
}

/// Write size and hash of the damaged file wherever its folder's records name it, and the records' own
/// hashes.
fn rehash(dir: &Path, name: &str) {
    let path = dir.join(name);
    let Ok(data) = fs::read(&path) else { return };
    let hash: String = Sha256::digest(&data).iter().map(|b| format!("{b:02x}")).collect();
    let file = path.file_name().unwrap().to_str().unwrap();
    for record in ["index.json", "state.json", "config.json", "results.json"].map(|r| path.with_file_name(r))
    {
        let Some(mut value) = fs::read(&record).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok())
        else {
            continue;
        };
        let put = |entry: &mut Value| {
            if let Some(entry) = entry.as_object_mut() {
                entry.insert("bytes".to_owned(), json!(data.len()));
                entry.insert("sha256".to_owned(), json!(hash));
            }
        };
        // The record may be the damaged file.
        if let Some(entry) = value.pointer_mut(&format!("/files/{file}")) {
            put(entry);
        }
        let shards = value.get_mut("shards").and_then(Value::as_array_mut);
        for shard in shards.into_iter().flatten().filter(|s| s["file"] == file) {
            put(shard);
        }
        let sealed = value.as_object_mut().is_some_and(|object| object.shift_remove("sha256").is_some());
        let text = value.to_string();
        fs::write(record, if sealed { seal(&text) } else { text }).unwrap();
    }
}

fn every_row<R: Row>(dir: &Path) -> anyhow::Result<()> {
    let reader = StageReader::<R>::open(dir)?;
    reader.stage().verify()?;
    reader.iter().try_for_each(|row| row.map(drop))
}

#[test]
fn indexes() {
    let dir = part("index", "labels");
    let files = ["labels/index.json"];
    let read = |dir: &Path| every_row::<LabelRow>(&dir.join("labels"));
    Target { name: "index", folder: &dir, files: &files, repair: None, read: &read }.fuzz();
}

#[test]
fn shards() {
    let dir = part("shard", "labels");
    for stage in ["examples", "features"] {
        copy_folder(&part("shard-more", stage).join(stage), &dir.join(stage));
    }
    let files =
        ["examples/examples-00000.parquet", "labels/labels-00000.parquet", "features/features-00000.parquet"];
    let read = |dir: &Path| {
        every_row::<Example>(&dir.join("examples"))?;
        every_row::<LabelRow>(&dir.join("labels"))?;
        every_row::<FeatureRow>(&dir.join("features"))
    };
    Target { name: "shard", folder: &dir, files: &files, repair: Some(rehash), read: &read }.fuzz();
}

#[test]
fn checkpoints() {
    let dir = part("checkpoint", "checkpoints");
    let all = dir.join("checkpoints");
    // One, so that it is not passed over.
    for entry in fs::read_dir(&all).unwrap().flatten().filter(|e| e.file_name() != "step-000024") {
        fs::remove_dir_all(entry.path()).unwrap();
    }
    let files = ["state.json", "model.safetensors", "optimizer.safetensors"]
        .map(|f| format!("checkpoints/step-000024/{f}"));
    let read = |dir: &Path| {
        let store = CheckpointStore::read_only(&dir.join("checkpoints"))?;
        store.best(Device::Cpu)?;
        ensure!(store.latest(Device::Cpu)?.is_some(), "passed over");
        Ok(())
    };
    let files = files.each_ref().map(String::as_str);
    Target { name: "checkpoint", folder: &dir, files: &files, repair: Some(rehash), read: &read }.fuzz();
}

#[test]
fn exports() {
    let dir = part("export", "export");
    let files = ["config.json", "model.safetensors", "parity.safetensors", "budgets.json", "README.md"];
    let files = files.map(|f| format!("export/{f}"));
    let read = |dir: &Path| {
        let export = Export::read(&dir.join("export"))?;
        export.mapper(Device::Cpu)?;
        export.check()
    };
    let files = files.each_ref().map(String::as_str);
    Target { name: "export", folder: &dir, files: &files, repair: Some(rehash), read: &read }.fuzz();
}

#[test]
fn results() {
    let dir = part("results", "eval");
    let other = dir.with_file_name("results-other");
    let _ = fs::remove_dir_all(&other);
    copy_folder(&dir, &other);
    let files = ["eval/results.json", "eval/agreement.parquet", "eval/answers.parquet"];
    let read = move |dir: &Path| {
        let runs = compare::Run::read_all(&[dir.to_path_buf(), other.clone()])?;
        let comparison = compare::compare(&runs)?;
        compare::text(&comparison);
        Ok(())
    };
    Target { name: "results", folder: &dir, files: &files, repair: Some(rehash), read: &read }.fuzz();
}

#[test]
fn reports() {
    let dir = part("report", ".");
    let files = ["run.json", "train/metrics.jsonl", "eval/results.json"];
    let read = |dir: &Path| {
        RunJson::read(&RunLayout::new(dir))?;
        pkv_report::render(dir, &pkv_eval::methods::infos()).map(drop)
    };
    Target { name: "report", folder: &dir, files: &files, repair: Some(reseal), read: &read }.fuzz();
}

/// Write the damaged record's own hash anew.
fn reseal(dir: &Path, name: &str) {
    let value = fs::read(dir.join(name)).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    if let Some(Value::Object(mut object)) = value {
        object.shift_remove("sha256");
        fs::write(dir.join(name), seal(&Value::Object(object).to_string())).unwrap();
    }
}

/// Stored outcomes of single contexts: a damaged one is measured anew, and the results are the same.
#[test]
fn contexts() {
    let s = Sandbox::new();
    copy_folder(&finished().path("runs"), &s.path("runs"));
    let mut files = Vec::new();
    for task in
        fs::read_dir(s.path("runs/small/eval/contexts")).unwrap().flatten().filter(|e| e.path().is_dir())
    {
        let first = format!("runs/small/eval/contexts/{}/00000.json", task.file_name().display());
        assert!(s.path(&first).is_file(), "{first}");
        files.push(first);
    }
    files.sort();
    assert!(files.len() > 3, "{files:?}");
    let tables = ["agreement.parquet", "answers.parquet"]
        .map(|t| fs::read(s.path("runs/small/eval").join(t)).unwrap());
    let is_sealed = |file: &String| {
        let value = fs::read(s.path(file)).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
        value.is_some_and(|mut v| unseal(&mut v).is_ok())
    };
    let read = |_: &Path| {
        let sealed = files.iter().all(is_sealed);
        let command = s.command(&["eval", "--recipe", "recipe.toml"]);
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -v 8000000; exec \"$0\" \"$@\""]).arg(command.get_program());
        let ran = Ran::new(limited.args(command.get_args()).current_dir(s.path(".")).output()?);
        assert!(ran.code == 0 || ran.code == 1, "{}\n{}", ran.code, ran.stderr);
        ensure!(ran.code == 0, "{}", ran.stderr);
        let now = ["agreement.parquet", "answers.parquet"]
            .map(|t| fs::read(s.path("runs/small/eval").join(t)).unwrap());
        assert!(sealed || now == tables, "damaged outcomes changed the tables");
        Ok(())
    };
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    Target { name: "contexts", folder: &s.path("."), files: &names, repair: Some(reseal), read: &read }
        .fuzz();
}
