//! `run.json`: the record of how a run was made. One type for all that read it, and one writer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pkv_core::{hinted, seal, unseal};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::RunLayout;
use pkv_files::{TEMPORARY, WriteBudget, is_changed, write_file};

/// Changes of a record while other machines change it as well: one of them succeeds at each try.
const TRIES: u32 = 100;

/// What `run.json` holds. Each part is absent until a stage has written it; earlier versions wrote fewer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The resolved recipe, as the crate `recipe` reads it; null if absent.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub recipe: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<Tool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub libtorch: Option<String>,
    /// `cpu` or `cuda:0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// CPU threads of libtorch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<ModelRecord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ModelRecord>,
    /// Stages that ran, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stages: BTreeMap<String, StageRecord>,
    /// What other versions wrote.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// The program that wrote the record last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tool {
    pub name: String,
    pub version: String,
    pub commit: String,
}

/// One of the two models, as it was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelRecord {
    pub model: String,
    /// Commit of the hub, or hash of a local folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    pub vocab_hash: String,
    pub template_hash: String,
}

/// Record of a stage that ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageRecord {
    /// Wall-clock time, all attempts together.
    pub secs: f64,
    /// Key numbers, such as examples and tokens.
    pub summary: Value,
    /// Device of its last run, in words; empty in runs of earlier versions.
    pub device: String,
    /// GPUs that it held.
    pub gpus: u32,
}

impl RunJson {
    /// The record of a run folder; `None` if it has none.
    ///
    /// # Errors
    /// The file cannot be read, or is no such record.
    pub fn read(layout: &RunLayout) -> Result<Option<Self>> {
        let path = layout.run_json();
        pkv_files::refresh(&path)?;
        match pkv_core::read_small_text(&path) {
            Ok(text) => {
                let unusable = || {
                    hinted(
                        format!("`{}` is no record of a run", path.display()),
                        "remove the file; the next stage writes it again",
                    )
                };
                let mut value: Value = serde_json::from_str(&text).with_context(unusable)?;
                unseal(&mut value).with_context(|| {
                    hinted(
                        format!("cannot use `{}`", path.display()),
                        "remove the file, and the next stage writes it again; if you edited it, remove its member `sha256`",
                    )
                })?;
                serde_json::from_value(value).map(Some).with_context(unusable)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read `{}`", path.display())),
        }
    }

    /// Change the record of a run folder, which must exist.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub fn update(layout: &RunLayout, change: impl Fn(&mut Self)) -> Result<()> {
        let path = layout.run_json();
        let hint = || hinted(format!("cannot write `{}`", path.display()), "check the disk's free space");
        // Several processes may work in one folder: each adds to what the others wrote. Without locks (some
        // network folders have none) the last one counts.
        let folder = File::open(layout.root()).with_context(hint)?;
        let _ = folder.lock();
        sweep(layout.root());
        for _ in 0..TRIES {
            let before = Self::read(layout)?;
            let mut run = before.clone().unwrap_or_default();
            change(&mut run);
            if before.as_ref() == Some(&run) {
                return Ok(());
            }
            let text = seal(&serde_json::to_string_pretty(&run)?) + "\n";
            match write_file(&path, text.as_bytes(), &WriteBudget::from_env()) {
                // On another machine; here the lock keeps others out.
                Err(e) if is_changed(&e) => {}
                written => return written.map(drop).with_context(hint),
            }
        }
        bail!(hinted(
            format!("cannot write `{}`: other processes change it all the time", path.display()),
            "run the same command again"
        ))
    }
}

/// What the line around it says already.
const SAID: [&str; 3] = ["finished", "secs", "steps"];

/// A stage's summary for readers: `key value, key value` of its single values.
pub fn in_words(summary: &Value) -> String {
    let single = |(k, v): (&String, &Value)| {
        if SAID.contains(&k.as_str()) {
            return None;
        }
        let value = match v {
            Value::Number(n) if n.is_f64() => three_digits(n.as_f64()?),
            Value::Number(_) | Value::Bool(_) => v.to_string(),
            Value::String(text) => text.clone(),
            _ => return None,
        };
        Some(match (k.as_str(), v.as_f64()) {
            ("compute_s", _) => format!("computing {value} s"),
            ("idle_share", Some(share)) => format!("idle {}%", three_digits(100.0 * share)),
            _ => format!("{} {value}", k.replace('_', " ")),
        })
    };
    summary.as_object().into_iter().flatten().filter_map(single).collect::<Vec<_>>().join(", ")
}

/// `0.553`, `42.4`, `1370`: what a reader can use of a number.
fn three_digits(v: f64) -> String {
    let digits = if v == 0.0 { 0.0 } else { (2.0 - v.abs().log10().floor()).clamp(0.0, 9.0) };
    let text = format!("{v:.*}", digits as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Remove what processes of earlier versions left when they were killed; nothing depends on it.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = |name: &str| name.starts_with("run.json.") && name.ends_with(TEMPORARY);
        if name.to_str().is_some_and(is_ours) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_of_earlier_versions_are_read_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let layout = RunLayout::new(dir.path());
        assert_eq!(RunJson::read(&layout).unwrap(), None);
        let old = json!({
            "name": "r", "seed": 3, "hostname": "h", "target": {"model": "m", "revision": "r1"},
            "stages": {"prepare": {"secs": 61.0, "summary": null}},
        });
        fs::write(layout.run_json(), old.to_string()).unwrap();
        RunJson::update(&layout, |run| run.stages.entry("label".to_owned()).or_default().secs += 2.0)
            .unwrap();
        let run = RunJson::read(&layout).unwrap().unwrap();
        assert_eq!((run.stages["prepare"].secs, run.stages["label"].secs, run.seed), (61.0, 2.0, Some(3)));
        assert_eq!(run.target.unwrap().revision.as_deref(), Some("r1"));
        let text = fs::read_to_string(layout.run_json()).unwrap();
        assert!(text.contains("\"hostname\": \"h\"") && !text.contains("proxy"), "{text}");
        // What is the same is not written again.
        let written = || fs::metadata(layout.run_json()).unwrap().modified().unwrap();
        let before = written();
        RunJson::update(&layout, |run| run.seed = Some(3)).unwrap();
        assert_eq!(written(), before);
    }

    #[test]
    fn a_stage_is_summed_up_in_single_values_of_three_digits() {
        let summary = json!({"examples": 104_307, "best_score": 0.553_116_936_359_730_5, "ms": 1370.4, "of": "target",
            "secs": 1.5, "finished": true, "compute_s": 84.3, "idle_share": 0.0027, "sources": [{"name": "a"}], "none": null});
        let expected = "examples 104307, best score 0.553, ms 1370, of target, computing 84.3 s, idle 0.27%";
        assert_eq!(in_words(&summary), expected);
        assert_eq!(three_digits(0.0), "0");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let layout = RunLayout::new(dir.path());
        for text in ["{", "[]", "{\"seed\": \"three\"}"] {
            fs::write(layout.run_json(), text).unwrap();
            let e = RunJson::read(&layout).unwrap_err();
            assert!(e.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("remove the file"));
        }
    }
}
