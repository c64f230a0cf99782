//! Single files of a run, and the folders that hold nothing else: tables of the evaluation, outcomes,
//! tensors, journals.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_checkpoint::{BUDGETS_FILE, read_tensors};
use pkv_core::hinted;
use pkv_recipe::plan::human_bytes;
use pkv_results::{CONTEXTS_FOLDER, Columns};
use serde_json::Value;
use tch::{Device, Kind};

use super::run::{results, run};
use super::shards::shard;
use super::weights::{checkpoint, export, model};
use super::{Lines, stage};

/// Content of a file as text; `None` if this program writes no such file.
///
/// # Errors
/// It is damaged.
pub fn file(path: &Path) -> Result<Option<String>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match path.extension().and_then(|e| e.to_str()) {
        Some("parquet") => table(path).map(Some),
        Some("json") => json(path),
        Some("jsonl") => journal(path).map(Some),
        Some("safetensors") => tensors(path).map(Some),
        _ => plain(path, &name),
    }
}

/// Content of a folder of such files as text; `None` for other folders.
///
/// # Errors
/// A file cannot be looked at.
pub fn folder(dir: &Path) -> Result<Option<String>> {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("cannot read folder `{}`", dir.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    entries.sort();
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is = |path: &PathBuf| {
        let (name, extension) = (name(path), path.extension().and_then(|e| e.to_str()));
        // Of `train/`, `tb/`, `hidden/` and `eval/scorers/`; of `eval/` before its results; of
        // `eval/contexts/`.
        name == "metrics.jsonl"
            || name.contains(".tfevents.")
            || extension == Some("safetensors")
            || (name == CONTEXTS_FOLDER && path.is_dir())
            || name == "users.lock"
            || is_outcome(path)
    };
    if !entries.iter().any(is) {
        return Ok(None);
    }
    let mut out = Lines::new(format!("folder `{}`", dir.display()));
    for path in &entries {
        let value = match fs::metadata(path)? {
            m if m.is_dir() => match fs::read_dir(path)?.count() {
                1 => "folder, 1 file".to_owned(),
                n => format!("folder, {n} files"),
            },
            m => human_bytes(m.len()),
        };
        out.add(&name(path), value);
    }
    Ok(Some(out.text))
}

fn is_outcome(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "json")
        && read_json(path).is_ok_and(|value| value.get("outcome").is_some())
}

/// The evaluation's tables, or a shard.
fn table(path: &Path) -> Result<String> {
    let Some(file) = Columns::read(path).ok().filter(|f| f.has("context_id") && f.has("method")) else {
        return shard(path);
    };
    let is_answers = file.has("answer");
    let what = if is_answers { "answers" } else { "agreement with KVzip by context" };
    let mut out = Lines::new(format!("{what} `{}`", path.display()));
    let methods = file.text("method")?;
    out.add("rows", methods.len());
    let tasks = if is_answers { file.text("task")? } else { vec!["labels".to_owned(); methods.len()] };
    let ids = file.text("context_id")?;
    // By task: its contexts, and the rows of each method.
    let mut seen: BTreeMap<&str, (Vec<&str>, BTreeMap<&str, usize>)> = BTreeMap::new();
    for ((task, method), id) in tasks.iter().zip(&methods).zip(&ids) {
        let (contexts, rows) = seen.entry(task).or_default();
        if contexts.last() != Some(&id.as_str()) {
            contexts.push(id);
        }
        *rows.entry(method).or_default() += 1;
    }
    for (task, (contexts, rows)) in seen {
        out.block(&format!("{task}: {} contexts", contexts.len()));
        for (method, rows) in rows {
            out.add(method, format!("{rows} rows"));
        }
    }
    if is_answers {
        samples(&file, &mut out)?;
    }
    Ok(out.text)
}

/// Questions of each task that are shown with their answers.
const SAMPLES: usize = 6;

/// Of each task the first questions, each of another context if there are enough, with the mapper's answers
/// where least was kept, or those of the first method that pruned.
fn samples(file: &Columns, out: &mut Lines) -> Result<()> {
    let (tasks, methods, policies) = (file.text("task")?, file.text("method")?, file.text("policy")?);
    let (ratios, scores, ids) = (file.numbers("ratio")?, file.numbers("score")?, file.text("context_id")?);
    let (asked, wanted, given) = (file.text("question_text")?, file.text("gold")?, file.text("answer")?);
    let names: BTreeSet<&String> = tasks.iter().collect();
    for task in names {
        let pruned = || (0..tasks.len()).filter(|&i| tasks[i] == *task && methods[i] != "full");
        let Some(first) = pruned().find(|&i| methods[i] == "mapper").or_else(|| pruned().next()) else {
            continue;
        };
        let (method, policy) = (&methods[first], &policies[first]);
        let of = || pruned().filter(|&i| methods[i] == *method && policies[i] == *policy);
        let least = of().map(|i| ratios[i]).fold(1.0, f64::min);
        let mut rows: Vec<usize> = of().filter(|&i| ratios[i] == least).collect();
        let mut contexts = BTreeSet::new();
        // Those of contexts that were not seen before come first.
        rows.sort_by_key(|&i| !contexts.insert(&ids[i]));
        let all = rows.len();
        rows.truncate(SAMPLES);
        out.block(&format!(
            "{task}: {} of {all} answers, {method}, {policy}, {}% kept",
            rows.len(),
            100.0 * least
        ));
        for i in rows {
            let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let cut = |text: &str| line(text).chars().take(160).collect::<String>();
            out.add("question", cut(&asked[i]));
            out.add("  right answer", cut(&wanted[i]));
            out.add("  given", format!("{}  ({:.0}%)", cut(&given[i]), 100.0 * scores[i]));
        }
    }
    Ok(())
}

/// By its keys.
fn json(path: &Path) -> Result<Option<String>> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let value = read_json(path)?;
    let has = |key: &str| value.get(key).is_some();
    let name = path.file_name().unwrap_or_default();
    if has("outcome") {
        outcome(path, &value).map(Some)
    } else if has("schema_version") && has("labels") && has("mapper") || name == pkv_results::RESULTS_FILE {
        results(path).map(Some)
    } else if name == "run.json" {
        run(dir).map(Some)
    } else if name == "state.json" {
        checkpoint(dir).map(Some)
    } else if (name == "config.json" || name == BUDGETS_FILE) && dir.join("parity.safetensors").is_file() {
        export(dir).map(Some)
    } else if name == "config.json" {
        model(dir).map(Some)
    } else if name == pkv_shard::INDEX_FILE {
        stage(dir).map(Some)
    } else {
        Ok(None)
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text =
        pkv_core::read_small_text(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        hinted(
            format!("`{}` is no JSON", path.display()),
            "it was damaged; the stage that wrote it writes it again",
        )
    })
}

/// One context of a task.
fn outcome(path: &Path, value: &Value) -> Result<String> {
    let mut out = Lines::new(format!("outcome of one context `{}`", path.display()));
    out.add("task", &value["about"]).add("fingerprint", value["fingerprint"].as_str().unwrap_or("?"));
    let cells = value["outcome"]["cells"].as_array().map_or(0, Vec::len);
    out.add("cells", cells);
    Ok(out.text)
}

fn journal(path: &Path) -> Result<String> {
    let text =
        pkv_core::read_small_text(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut out = Lines::new(format!("journal `{}`", path.display()));
    out.add("lines", text.lines().count());
    for (key, line) in [("first", text.lines().next()), ("last", text.lines().last())] {
        if let Some(line) = line {
            out.add(key, line.chars().take(200).collect::<String>());
        }
    }
    Ok(out.text)
}

fn tensors(path: &Path) -> Result<String> {
    let mut out = Lines::new(format!("tensors `{}`", path.display()));
    let dir = path.parent().unwrap_or(Path::new(""));
    let is_export = dir.join("config.json").is_file() && dir.join("parity.safetensors").is_file();
    // Their hashes are there.
    let whole = match dir.join("state.json").is_file() {
        true => Some(("checkpoint", checkpoint(dir)?)),
        false if is_export => Some(("export", export(dir)?)),
        false => None,
    };
    if let Some((what, _)) = whole {
        out.add("part of", format!("{what} `{}`, all hashes match", dir.display()));
    }
    for (name, tensor) in read_tensors(path, Device::Cpu)? {
        let _ = writeln!(out.text, "  {name:<44} {:?} {}", tensor.size(), dtype(tensor.kind()));
    }
    Ok(out.text)
}

fn dtype(kind: Kind) -> String {
    named_dtype(&format!("{kind:?}"))
}

/// A dtype of libtorch, as exports name it too, as recipes name it, where they do.
pub fn named_dtype(libtorch: &str) -> String {
    match libtorch {
        "Float" => "f32".to_owned(),
        "Half" => "f16".to_owned(),
        "BFloat16" => "bf16".to_owned(),
        "Double" => "f64".to_owned(),
        other => other.to_lowercase(),
    }
}

/// Files that other programs show.
fn plain(path: &Path, name: &str) -> Result<Option<String>> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let what = match name {
        "report.html" => "report of a run, for a browser",
        "answers.svg" => "chart of answers by share kept, for a browser",
        "README.md" if dir.join("parity.safetensors").is_file() => "model card of an export",
        _ if name.contains(".tfevents.") => "training curves, for TensorBoard",
        _ if name.ends_with(".lock") => {
            "lock that keeps a second process out while one writes; needed by no reader"
        }
        _ => return Ok(None),
    };
    let bytes = fs::metadata(path).with_context(|| format!("cannot read `{}`", path.display()))?.len();
    let mut out = Lines::new(format!("{what} `{}`", path.display()));
    out.add("size", human_bytes(bytes));
    Ok(Some(out.text))
}
