//! A run folder, as far as a comparison reads it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use pkv_core::hinted;
use pkv_recipe::MethodName;
use pkv_shard::{RunJson, RunLayout};
use serde_json::Value;

use super::answers::{Answers, per_context_recall};
use super::{RecipeKey, RunName};
use crate::results::Results;
use crate::{AGREEMENT_FILE, ANSWERS_FILE, RESULTS_FILE};

/// One evaluated run.
pub struct Run {
    /// Name in tables.
    pub name: String,
    pub folder: PathBuf,
    pub results: Results,
    /// Absent if no task was asked.
    pub answers: Option<Answers>,
    /// The mapper's recall by context; absent in evaluations of earlier versions.
    pub recall: Option<Vec<super::ContextScores>>,
    /// The resolved recipe; null if the folder holds none.
    pub recipe: Value,
    /// Commit or hash of the target.
    pub revision: Option<String>,
}

impl Run {
    /// Read the run folder `folder`.
    ///
    /// # Errors
    /// It is none, or was not evaluated.
    pub fn read(folder: &Path) -> Result<Self> {
        ensure!(
            folder.is_dir(),
            hinted(
                format!("there is no run folder `{}`", folder.display()),
                "run folders are in `runs/`; `proxykv-train run --recipe <recipe>` makes one"
            )
        );
        let layout = RunLayout::new(folder);
        let eval = layout.eval();
        ensure!(
            eval.join(RESULTS_FILE).is_file(),
            hinted(
                format!("run `{}` has not been evaluated: `eval/{RESULTS_FILE}` is absent", folder.display()),
                "run `proxykv-train eval` with its recipe"
            )
        );
        let results = Results::read(&eval.join(RESULTS_FILE))?;
        let asked = results.facts.is_some() || !results.benchmarks.is_empty();
        let answers = match asked {
            true => Some(Answers::read(&eval.join(ANSWERS_FILE))?),
            false => None,
        };
        let agreement = eval.join(AGREEMENT_FILE);
        let recall = pkv_core::look_for(&agreement)?
            .map(|_| per_context_recall(&agreement, MethodName::MAPPER))
            .transpose()?;
        let run = RunJson::read(&layout)?.unwrap_or_default();
        let folder_name = folder.file_name().map(|n| n.to_string_lossy().into_owned());
        Ok(Self {
            name: run.name.or(folder_name).unwrap_or_else(|| folder.display().to_string()),
            folder: folder.to_path_buf(),
            results,
            answers,
            recall,
            recipe: run.recipe,
            revision: run.target.and_then(|target| target.revision),
        })
    }

    /// Read several run folders; those of one name are called by their folders.
    ///
    /// # Errors
    /// As [`Run::read`].
    pub fn read_all(folders: &[PathBuf]) -> Result<Vec<Self>> {
        let mut runs = folders.iter().map(|f| Self::read(f)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
        for run in &mut runs {
            if names.iter().filter(|n| **n == run.name).count() > 1 {
                run.name = run.folder.display().to_string();
            }
        }
        Ok(runs)
    }

    pub(super) fn named(&self) -> RunName {
        RunName {
            name: self.name.clone(),
            folder: self.folder.display().to_string(),
            proxy: self.results.proxy.as_ref().map(|proxy| proxy.name.clone()),
            mapper: self.results.mapper.clone(),
        }
    }
}

/// What the last evaluation was asked for: results add up, so it does not say what is compared.
const ASKED: [&str; 8] = [
    "eval.answer_policies",
    "eval.answer_ratios",
    "eval.benchmark.examples",
    "eval.contexts",
    "eval.methods",
    "eval.policies",
    "eval.ratios",
    "eval.tasks",
];

/// Every key of the recipes with its values; names always differ, and are left out with [`ASKED`].
pub fn settings(runs: &[Run]) -> Vec<RecipeKey> {
    let flat: Vec<BTreeMap<String, Value>> = runs
        .iter()
        .map(|run| {
            let mut leaves = BTreeMap::new();
            flatten("", &run.recipe, &mut leaves);
            leaves
        })
        .collect();
    let is_compared = |key: &&String| *key != "name" && !ASKED.contains(&key.as_str());
    let mut keys: Vec<&String> = flat.iter().flat_map(BTreeMap::keys).filter(is_compared).collect();
    keys.sort();
    keys.dedup();
    let values = |key: &str| flat.iter().map(|f| f.get(key).cloned().unwrap_or(Value::Null)).collect();
    keys.into_iter().map(|key| RecipeKey { key: key.clone(), values: values(key) }).collect()
}

/// Dotted keys of everything that is no section; lists stay whole.
fn flatten(path: &str, value: &Value, out: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, value, out);
            }
        }
        Value::Null => {}
        leaf => drop(out.insert(path.to_owned(), leaf.clone())),
    }
}
