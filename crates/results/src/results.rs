//! The types of `eval/results.json`.
//!
//! Plain numbers and names, in the order tables show them; reading and writing the file is all that happens
//! here. How the numbers are defined is written where they are computed (`labels`, `answered`, `perplexity`),
//! how they are shown in `table` and in the report.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{Policy, hinted, seal, unseal};
use pkv_files::{WriteBudget, write_file};
use pkv_recipe::{AnswerMatch, MethodName};
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

/// Version of [`Results`]; raised when a reader of the old form would misread the new one.
pub const RESULTS_VERSION: u32 = 1;

/// Everything one evaluation measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub schema_version: u32,
    /// Hash of every choice that these numbers depend on.
    pub fingerprint: String,
    pub seed: u64,
    /// Resamples of the intervals; absent in results of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<usize>,
    /// Origin of the mapper, in words: a checkpoint's step or an export's folder.
    pub mapper: String,
    pub target: ModelName,
    /// Absent if no feature comes from it; results of earlier versions name one all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ModelName>,
    /// Notes on a method's numbers, such as the channel that a baseline fell back to.
    pub notes: Vec<MethodNote>,
    /// Predictions against labels, over the test split.
    pub labels: LabelResults,
    /// Answers with a pruned cache; absent if the recipe does not ask for them.
    #[serde(serialize_with = "with_accuracy")]
    pub facts: Option<AnswerResults>,
    /// Likelihood of the continuation after a pruned context; absent if the recipe does not ask for it.
    pub perplexity: Option<PerplexityResults>,
    /// Standard benchmarks, one entry per task; empty if the recipe asks for none.
    #[serde(default)]
    pub benchmarks: Vec<AnswerResults>,
    /// One context, shown position by position; absent if there was no test example to show.
    pub worked_example: Option<WorkedExample>,
    /// Wall-clock times, in the order of the work.
    pub timings: Vec<Timing>,
}

/// A model, as far as a table names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelName {
    pub name: String,
    pub layers: usize,
    pub kv_heads: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MethodNote {
    pub method: MethodName,
    pub note: String,
}

/// Settings with which a task's numbers were measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// Hash of every choice that they depend on; empty in results of earlier versions.
    pub fingerprint: String,
    /// `YYYY-MM-DD` of the last addition, UTC.
    pub measured: String,
    /// Cells of single contexts that they sum up.
    pub outcomes: usize,
}

/// A mean over contexts with its bootstrap 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// Agreement with KVzip's raw scores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LabelResults {
    #[serde(flatten)]
    pub made: Made,
    /// Test examples.
    pub contexts: usize,
    /// Positions in them.
    pub positions: u64,
    /// Per method, policy and retention ratio, in the order of measuring; ratios from the most kept to the
    /// least.
    pub cells: Vec<LabelCell>,
    /// Per method.
    pub ranks: Vec<RankCell>,
    /// Recall by head, at one policy and ratio.
    pub heads: Option<HeadRecall>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelCell {
    pub method: MethodName,
    pub policy: Policy,
    pub ratio: f64,
    /// Contexts that it was measured on, where these are not all of the task's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<usize>,
    /// |kept by the method and by KVzip| / |kept by KVzip|.
    pub recall: Interval,
    /// The same of what KVzip keeps under `pair`, whatever the policy: what the policy costs. Absent in older
    /// results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall_of_pair: Option<Interval>,
    /// Score mass that the method keeps / score mass that KVzip keeps. Above 1 is possible where KVzip
    /// itself does not rank by mass: under `token`, which ranks positions by their ranks.
    pub mass: Interval,
    /// Kept KV pairs / all KV pairs, as the masks have it.
    pub realised: f64,
}

/// Correlation with KVzip's raw scores: of ranks the mean over (layer, KV head), then over contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankCell {
    pub method: MethodName,
    pub spearman: f64,
    /// Kendall's tau-b.
    pub kendall: f64,
    /// Squared Pearson correlation with the logarithm of KVzip's scores, all KV pairs of a context together:
    /// how KVzap's scorers are judged. Absent where the scores have no variance, and in results of earlier
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_r2: Option<f64>,
}

/// Recall of KVzip's kept set in each head, all test examples together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadRecall {
    pub policy: Policy,
    pub ratio: f64,
    /// [layer][KV head]: share of the head's positions that KVzip keeps.
    pub kvzip_kept: Vec<Vec<f64>>,
    pub methods: Vec<MethodHeads>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodHeads {
    pub method: MethodName,
    /// [layer][KV head]; absent where KVzip keeps nothing.
    pub recall: Vec<Vec<Option<f64>>>,
    /// [layer][KV head]: share of the head's positions that the method keeps; empty in results of earlier
    /// versions.
    #[serde(default)]
    pub kept: Vec<Vec<f64>>,
}

/// One task whose questions are asked of a pruned cache, unknown while pruning: planted facts, or a
/// benchmark's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerResults {
    #[serde(flatten)]
    pub made: Made,
    /// The benchmark, such as `ruler`; empty for planted facts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub suite: String,
    /// The benchmark's task; where one mixes several kinds of question, `task/kind`. Empty for planted facts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task: String,
    pub contexts: usize,
    pub questions: usize,
    /// When an answer to a planted fact counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_match: Option<AnswerMatch>,
    /// Of benchmarks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_context_tokens: Option<f64>,
    /// Contexts of a benchmark whose middle was cut out because they were too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<usize>,
    /// Score of the full cache by the task's own metric, in [0, 1]; of planted facts the share that it
    /// answers.
    pub full: Interval,
    /// Its exact match and F1; absent where no short answer is wanted, and in results of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_exact_match: Option<Interval>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_f1: Option<Interval>,
    /// Per method, policy and retention ratio, in the order of measuring; ratios from the most kept to the
    /// least.
    pub cells: Vec<AnswerCell>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerCell {
    pub method: MethodName,
    pub policy: Policy,
    pub ratio: f64,
    /// Contexts that it was measured on, where these are not all of the task's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<usize>,
    /// By the task's own metric, in [0, 1]; `accuracy` in the file's `facts`, the share of questions
    /// answered.
    #[serde(alias = "accuracy")]
    pub score: Interval,
    /// Exact match and F1 as SQuAD measures them; absent where no short answer is wanted, and in results of
    /// earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<Interval>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f1: Option<Interval>,
    /// KL(full || pruned) along the right answer or the full cache's, nats per token.
    pub kl: Interval,
    /// Share of that answer's tokens whose most likely token differs from the full cache's.
    pub flips: Interval,
    /// Score over KVzip's at the same policy and ratio; absent without KVzip or where that scores 0.
    pub of_kvzip: Option<Interval>,
    /// Score over the full cache's; absent where that is 0.
    pub of_full: Option<Interval>,
}

/// `facts` as the file has it: the score of a cell is its `accuracy`.
fn with_accuracy<S: Serializer>(facts: &Option<AnswerResults>, to: S) -> Result<S::Ok, S::Error> {
    let mut value = serde_json::to_value(facts).map_err(S::Error::custom)?;
    for cell in value.get_mut("cells").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(entries) = cell {
            let named =
                |(key, v): (String, Value)| (if key == "score" { "accuracy".to_owned() } else { key }, v);
            *entries = std::mem::take(entries).into_iter().map(named).collect();
        }
    }
    value.serialize(to)
}

/// The document's own continuation after a pruned context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityResults {
    #[serde(flatten)]
    pub made: Made,
    pub contexts: usize,
    /// Tokens of each continuation.
    pub continuation_tokens: usize,
    /// Nats per token with the full cache.
    pub full: Interval,
    /// Per method, policy and retention ratio, in the order of measuring; ratios from the most kept to the
    /// least.
    pub cells: Vec<PerplexityCell>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityCell {
    pub method: MethodName,
    pub policy: Policy,
    pub ratio: f64,
    /// Contexts that it was measured on, where these are not all of the task's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<usize>,
    /// Nats per token.
    pub nll: Interval,
    /// Nats per token above the full cache's, context by context.
    pub excess: Interval,
}

/// One context with what each method keeps of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkedExample {
    pub id: String,
    /// Text of each position's token.
    pub tokens: Vec<String>,
    /// Planted facts, if any.
    pub facts: Vec<FactSpan>,
    pub policy: Policy,
    /// KV pairs of one position: the most that a count can be.
    pub pairs_per_position: u32,
    pub kept: Vec<KeptCounts>,
}

/// A fact's sentence: positions `start..start + len`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FactSpan {
    pub start: usize,
    pub len: usize,
    pub question: String,
    pub answer: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptCounts {
    pub method: MethodName,
    pub ratio: f64,
    /// Kept KV pairs of each position.
    pub counts: Vec<u32>,
}

/// What [`Timing`] calls the metrics against labels.
pub const LABEL_METRICS: &str = "labels: metrics";

/// Wall-clock time of one kind of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    pub what: String,
    pub secs: f64,
    /// Number of runs in that time.
    pub times: u64,
}

impl Results {
    /// Read `eval/results.json`.
    ///
    /// # Errors
    /// The file is absent, no JSON of this kind, or of another schema version.
    pub fn read(path: &Path) -> Result<Self> {
        let redo = "run `proxykv-train eval` to write it";
        let text = pkv_core::read_small_text(path)
            .with_context(|| hinted(format!("cannot read results `{}`", path.display()), redo))?;
        let invalid = || hinted(format!("`{}` holds no results of an evaluation", path.display()), redo);
        let mut value: Value = serde_json::from_str(&text).with_context(invalid)?;
        let version = value.get("schema_version").and_then(Value::as_u64);
        ensure!(
            version == Some(RESULTS_VERSION.into()),
            hinted(
                format!(
                    "`{}` has schema version {}, expected {RESULTS_VERSION}",
                    path.display(),
                    version.map_or_else(|| "none".to_owned(), |v| v.to_string())
                ),
                redo
            )
        );
        // What is measured is kept in `contexts/`; the results are its sum.
        unseal(&mut value).with_context(|| hinted(format!("cannot use `{}`", path.display()), redo))?;
        serde_json::from_value(value).with_context(invalid)
    }

    /// Write `eval/results.json`, whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(&self, path: &Path) -> Result<()> {
        // On one line: indented, the worked example alone would fill 100,000 of them.
        let text = serde_json::to_string(self).context("results have a number that JSON cannot hold")?;
        write_file(path, seal(&text).as_bytes(), &WriteBudget::from_env()).map(drop)
    }

    /// Settings of each task, by its name in `answers.parquet`; the labels' is `labels`.
    pub fn made(&self) -> Vec<(String, &Made)> {
        let mut all = vec![("labels".to_owned(), &self.labels.made)];
        all.extend(self.facts.iter().map(|f| ("facts".to_owned(), &f.made)));
        all.extend(self.perplexity.iter().map(|p| ("perplexity".to_owned(), &p.made)));
        for b in &self.benchmarks {
            let task = b.task.split('/').next().unwrap_or_default();
            let name = format!("{}.{task}", b.suite);
            if all.last().is_none_or(|(last, _)| *last != name) {
                all.push((name, &b.made));
            }
        }
        all
    }

    /// Note on `method`, if there is one.
    pub fn note(&self, method: MethodName) -> Option<&str> {
        self.notes.iter().find(|n| n.method == method).map(|n| n.note.as_str())
    }
}

impl LabelResults {
    pub fn cell(&self, method: MethodName, policy: Policy, ratio: f64) -> Option<&LabelCell> {
        self.cells.iter().find(|c| (c.method, c.policy, c.ratio) == (method, policy, ratio))
    }
}

/// KVzip must answer this share beyond doubt before anything is relative to its answers.
pub(crate) const KVZIP_ANSWERS: f64 = 0.2;

impl AnswerResults {
    /// Score of `cell` over KVzip's; `None` where KVzip's interval reaches below a fifth: shares of next to
    /// nothing say nothing.
    pub fn recovered(&self, cell: &AnswerCell) -> Option<Interval> {
        let kvzip = self.cell(MethodName::KVZIP, cell.policy, cell.ratio)?;
        cell.of_kvzip.filter(|_| kvzip.score.low >= KVZIP_ANSWERS)
    }

    pub fn cell(&self, method: MethodName, policy: Policy, ratio: f64) -> Option<&AnswerCell> {
        self.cells.iter().find(|c| (c.method, c.policy, c.ratio) == (method, policy, ratio))
    }
}

impl PerplexityResults {
    pub fn cell(&self, method: MethodName, policy: Policy, ratio: f64) -> Option<&PerplexityCell> {
        self.cells.iter().find(|c| (c.method, c.policy, c.ratio) == (method, policy, ratio))
    }
}

impl Interval {
    /// No spread: one context, or a number known exactly.
    pub const fn exact(mean: f64) -> Self {
        Self { mean, low: mean, high: mean }
    }

    /// The mean of several, each counting alike: their half widths in quadrature, a side at a time. That is
    /// the interval where each is of contexts of its own, as tasks of a benchmark are. `None` of none.
    ///
    /// ```
    /// use pkv_results::Interval;
    ///
    /// let sure = Interval { mean: 0.8, low: 0.7, high: 0.9 };
    /// let unsure = Interval { mean: 0.4, low: 0.0, high: 0.8 };
    /// let mean = Interval::mean_of(&[sure, unsure]).unwrap();
    /// assert!((mean.mean - 0.6).abs() < 1e-12 && mean.high - mean.low < 0.8);
    /// ```
    pub fn mean_of(all: &[Self]) -> Option<Self> {
        let count = (!all.is_empty()).then_some(all.len() as f64)?;
        let mean = all.iter().map(|i| i.mean).sum::<f64>() / count;
        let side =
            |half: &dyn Fn(&Self) -> f64| all.iter().map(|i| half(i).powi(2)).sum::<f64>().sqrt() / count;
        Some(Self { mean, low: mean - side(&|i| i.mean - i.low), high: mean + side(&|i| i.high - i.mean) })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_mean_of_tasks_is_surer_than_each() {
        let tasks =
            [Interval { mean: 0.8, low: 0.5, high: 0.9 }, Interval { mean: 0.4, low: 0.0, high: 0.4 }];
        let mean = Interval::mean_of(&tasks).unwrap();
        // Half widths 0.3 and 0.4 below, 0.1 and 0 above.
        for (found, expected) in [(mean.mean, 0.6), (mean.low, 0.6 - 0.25), (mean.high, 0.6 + 0.05)] {
            assert!((found - expected).abs() < 1e-12, "{mean:?}");
        }
        assert_eq!(Interval::mean_of(&tasks[..1]), Some(tasks[0]));
        assert_eq!(Interval::mean_of(&[]), None);
    }

    fn results() -> Results {
        Results {
            schema_version: RESULTS_VERSION,
            fingerprint: "f".to_owned(),
            seed: 1,
            bootstrap: Some(1000),
            mapper: "step 10".to_owned(),
            target: ModelName { name: "t".to_owned(), layers: 2, kv_heads: 1 },
            proxy: Some(ModelName { name: "p".to_owned(), layers: 1, kv_heads: 1 }),
            notes: vec![MethodNote {
                method: MethodName::of("proxy-linear"),
                note: "from `max_all`".to_owned(),
            }],
            labels: LabelResults {
                made: Made { fingerprint: "a".to_owned(), measured: "2026-01-31".to_owned(), outcomes: 1 },
                contexts: 1,
                positions: 9,
                cells: vec![LabelCell {
                    method: MethodName::MAPPER,
                    policy: Policy::PairUniform,
                    ratio: 0.05,
                    contexts: None,
                    recall: Interval { mean: 0.5, low: 0.4, high: 0.6 },
                    recall_of_pair: None,
                    mass: Interval::exact(0.9),
                    realised: 0.05,
                }],
                ranks: vec![RankCell {
                    method: MethodName::MAPPER,
                    spearman: 0.6,
                    kendall: 0.5,
                    log_r2: Some(0.7),
                }],
                heads: Some(HeadRecall {
                    policy: Policy::Pair,
                    ratio: 0.05,
                    kvzip_kept: vec![vec![0.1], vec![0.0]],
                    methods: vec![MethodHeads {
                        method: MethodName::MAPPER,
                        recall: vec![vec![Some(0.5)], vec![None]],
                        kept: vec![vec![0.05], vec![0.0]],
                    }],
                }),
            },
            facts: None,
            perplexity: None,
            benchmarks: Vec::new(),
            worked_example: None,
            timings: vec![Timing { what: "labels".to_owned(), secs: 0.5, times: 1 }],
        }
    }

    #[test]
    fn results_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        results().write(&path).unwrap();
        let back = Results::read(&path).unwrap();
        assert_eq!(back, results());
        assert_eq!(back.note(MethodName::of("proxy-linear")), Some("from `max_all`"));
        assert!(back.labels.cell(MethodName::MAPPER, Policy::PairUniform, 0.05).is_some());
        assert!(back.labels.cell(MethodName::MAPPER, Policy::Pair, 0.05).is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn what_earlier_versions_did_not_measure_is_absent_not_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        let mut old = serde_json::to_value(results()).unwrap();
        assert!(old["labels"]["ranks"][0].as_object_mut().unwrap().remove("log_r2").is_some());
        let zero = serde_json::json!({"mean": 0.5, "low": 0.5, "high": 0.5});
        old["facts"] = serde_json::json!({
            "contexts": 1, "questions": 1, "answer_match": "exact", "full": zero, "cells": [{
                "method": "mapper", "policy": "pair", "ratio": 0.05, "accuracy": zero, "kl": zero, "flips": zero,
                "of_kvzip": null, "of_full": null
            }]
        });
        fs::write(&path, old.to_string()).unwrap();
        let back = Results::read(&path).unwrap();
        assert_eq!(back.labels.ranks[0].log_r2, None);
        let facts = back.facts.as_ref().unwrap();
        assert_eq!(
            (facts.full_exact_match, facts.cells[0].exact_match, facts.cells[0].f1),
            (None, None, None)
        );
        let tables = crate::table::all_tables(&back);
        assert!(!tables.contains("Exact match") && !tables.contains("F1"), "{tables}");
        back.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("exact_match") && !text.contains("log_r2"), "{text}");
    }

    #[test]
    fn other_versions_and_other_files_are_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        let hint = |e: &anyhow::Error| e.downcast_ref::<pkv_core::Hinted>().map(|h| h.hint().to_owned());
        let absent = Results::read(&path).unwrap_err();
        assert!(hint(&absent).unwrap().contains("proxykv-train eval"));
        fs::write(&path, "{\"schema_version\": 99}").unwrap();
        let newer = Results::read(&path).unwrap_err();
        assert!(newer.to_string().ends_with("has schema version 99, expected 1"), "{newer}");
        fs::write(&path, "nonsense").unwrap();
        assert!(Results::read(&path).unwrap_err().to_string().contains("holds no results"));
    }
}
