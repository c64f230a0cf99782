//! `train/metrics.jsonl`: one JSON object per log line or validation of the training loop.
//!
//! Read leniently: a key that is absent leaves a gap in a curve, and a last line that a killed
//! run left unfinished is skipped. When a run was resumed from an earlier checkpoint, steps occur
//! twice; the later line counts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Curves of a training run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// In the order of the steps.
    pub train: Vec<TrainPoint>,
    pub validation: Vec<ValidationPoint>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainPoint {
    pub step: u64,
    pub loss: f64,
    /// Terms of the loss by name, before their weights.
    pub terms: Vec<(String, f64)>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Before clipping.
    pub gradient_norm: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValidationPoint {
    pub step: u64,
    pub loss: Option<f64>,
    /// The best so far when it was measured.
    pub best: bool,
    /// Recall of KVzip's kept set: policy, ratio, share.
    pub recall: Vec<(String, f64, f64)>,
}

impl Metrics {
    /// # Errors
    /// The file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            pkv_core::read_small_text(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut train = BTreeMap::new();
        let mut validation = BTreeMap::new();
        for value in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let Some(step) = value["step"].as_u64() else { continue };
            let loss = value["loss"].as_f64();
            match (value["kind"].as_str(), loss) {
                (Some("train"), Some(loss)) => {
                    let (lr, gradient_norm) = (value["lr"].as_f64(), value["gradient_norm"].as_f64());
                    let terms = numbers(&value["terms"]);
                    train.insert(step, TrainPoint { step, loss, terms, lr, gradient_norm });
                }
                (Some("validation"), _) => {
                    let (best, recall) = (value["best"] == true, recall(&value["recall"]));
                    validation.insert(step, ValidationPoint { step, loss, best, recall });
                }
                _ => {}
            }
        }
        Self { train: train.into_values().collect(), validation: validation.into_values().collect() }
    }
}

/// Entries of an object whose values are numbers.
fn numbers(value: &Value) -> Vec<(String, f64)> {
    let entries = value.as_object().into_iter().flatten();
    entries.filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect()
}

fn recall(value: &Value) -> Vec<(String, f64, f64)> {
    let mut out = Vec::new();
    for (policy, ratios) in value.as_object().into_iter().flatten() {
        for (ratio, share) in numbers(ratios) {
            out.extend(ratio.parse().ok().map(|r| (policy.clone(), r, share)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_lines_win_and_broken_ones_are_skipped() {
        let metrics = Metrics::parse(
            r#"{"step":10,"kind":"train","loss":2.0,"terms":{"binary":1.5}}
{"step":20,"kind":"train","loss":1.0}
{"step":20,"kind":"validation","loss":1.1,"best":true,"recall":{"pair":{"0.05":0.8,"0.01":0.5}}}
{"step":20,"kind":"train","loss":0.9,"lr":0.001,"gradient_norm":2.5}
{"step":30,"kind":"train","lo"#,
        );
        let losses: Vec<_> = metrics.train.iter().map(|p| (p.step, p.loss)).collect();
        assert_eq!(losses, [(10, 2.0), (20, 0.9)]);
        assert_eq!(metrics.train[0].terms, [("binary".to_owned(), 1.5)]);
        assert_eq!((metrics.train[1].lr, metrics.train[1].gradient_norm), (Some(0.001), Some(2.5)));
        assert!(metrics.validation[0].best);
        let recall = &metrics.validation[0].recall;
        assert!(recall.contains(&("pair".to_owned(), 0.05, 0.8)) && recall.len() == 2);
    }
}
