//! A run folder as a whole, and the results of its evaluation.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use pkv_checkpoint::CheckpointStore;
use pkv_core::{Policy, hinted};
use pkv_eval::{Interval, RESULTS_FILE, Results};
use pkv_recipe::MethodName;
use pkv_recipe::plan::{human_bytes, human_secs};
use pkv_shard::StageDir;
use serde_json::Value;

use super::shards::rows;
use super::{Lines, short};

/// Stages whose folders lie in a run folder, in order.
const STAGE_FOLDERS: [&str; 3] = ["examples", "labels", "features"];

pub fn run(dir: &Path) -> Result<String> {
    let path = dir.join("run.json");
    let text =
        pkv_core::read_small_text(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let run: Value = serde_json::from_str(&text).with_context(|| {
        hinted(format!("`{}` is no JSON", path.display()), "remove the file; the next stage writes it again")
    })?;
    let mut out = Lines::new(format!("run `{}` in `{}`", run["name"].as_str().unwrap_or("?"), dir.display()));
    let text = |key: &str| run.pointer(key).and_then(Value::as_str).map(str::to_owned);
    for (name, key) in [
        ("recipe", "/recipe_path"),
        ("target", "/target/model"),
        ("proxy", "/proxy/model"),
        ("device", "/device"),
        ("version", "/tool/version"),
    ] {
        if let Some(value) = text(key) {
            out.add(name, value);
        }
    }
    out.add("seed", &run["seed"]);
    out.block("stages");
    for folder in STAGE_FOLDERS {
        let summary = match StageDir::read(&dir.join(folder)) {
            Ok(stage) => format!("{}, {}", rows(&stage), human_bytes(stage.index().bytes())),
            Err(_) => "not there yet".to_owned(),
        };
        out.add(folder, summary);
    }
    out.add("checkpoints", best_checkpoint(&dir.join("checkpoints")));
    let results = Results::read(&dir.join("eval").join(RESULTS_FILE)).ok();
    out.add("eval", results.as_ref().map_or_else(|| "not there yet".to_owned(), headline));
    for (name, file) in [("export", "export/config.json"), ("report", "report.html")] {
        out.add(
            name,
            if dir.join(file).exists() {
                dir.join(file).display().to_string()
            } else {
                "not there yet".to_owned()
            },
        );
    }
    if let Some(stages) = run["stages"].as_object() {
        out.block("times");
        for (name, record) in stages {
            out.add(name, record["secs"].as_f64().map_or_else(|| "?".to_owned(), human_secs));
        }
    }
    Ok(out.text)
}

fn best_checkpoint(dir: &Path) -> String {
    let look = || -> Result<Option<String>> {
        let store = CheckpointStore::read_only(dir)?;
        let steps: Vec<String> = store.list()?.iter().map(|c| c.step.to_string()).collect();
        let best = store.best_validation()?;
        let best = best.map_or_else(String::new, |(step, v)| format!(", best {step} with {v:.4}"));
        Ok((!steps.is_empty()).then(|| format!("steps {}{best}", steps.join(", "))))
    };
    look().ok().flatten().unwrap_or_else(|| "not there yet".to_owned())
}

/// The mapper's answers at every ratio that was measured.
fn headline(r: &Results) -> String {
    let mut parts = Vec::new();
    if let Some(facts) = &r.facts {
        let cells = facts.cells.iter().filter(|c| c.method == MethodName::MAPPER);
        parts.extend(cells.map(|c| format!("{:.1}% at {}", 100.0 * c.score.mean, c.ratio)));
    }
    if parts.is_empty() {
        format!("labels of {} contexts", r.labels.contexts)
    } else {
        format!("mapper answers {}", parts.join(", "))
    }
}

pub fn results(path: &Path) -> Result<String> {
    let r = Results::read(path)?;
    let mut out = Lines::new(format!("results `{}`", path.display()));
    out.add("schema", r.schema_version).add("mapper", &r.mapper).add("target", &r.target.name);
    if let Some(proxy) = &r.proxy {
        out.add("proxy", &proxy.name);
    }
    out.add("fingerprint", &r.fingerprint)
        .add("labels", format!("{} contexts, {} positions", r.labels.contexts, r.labels.positions));
    if let Some(f) = &r.facts {
        out.add(
            "facts",
            format!(
                "{} questions about {} contexts, full cache {:.1}%",
                f.questions,
                f.contexts,
                100.0 * f.full.mean
            ),
        );
    }
    if let Some(p) = &r.perplexity {
        out.add(
            "perplexity",
            format!("{} contexts, full cache {:.3} nats per token", p.contexts, p.full.mean),
        );
    }
    for b in &r.benchmarks {
        out.add(
            &b.suite,
            format!(
                "{}: {} questions about {} contexts, full cache {:.1}%",
                b.task,
                b.questions,
                b.contexts,
                100.0 * b.full.mean
            ),
        );
    }
    for (task, made) in r.made().iter().filter(|(_, made)| !made.fingerprint.is_empty()) {
        out.add("measured", format!("{task} on {}, choices {}", made.measured, short(&made.fingerprint)));
    }
    if let Some(f) = &r.facts {
        out.block("answers");
        for c in &f.cells {
            out.cell(c.method, c.policy, c.ratio, c.score, c.contexts);
        }
    }
    for b in &r.benchmarks {
        out.block(&format!("{} {}", b.suite, b.task));
        for c in &b.cells {
            out.cell(c.method, c.policy, c.ratio, c.score, c.contexts);
        }
    }
    out.block("recall");
    for c in &r.labels.cells {
        out.cell(c.method, c.policy, c.ratio, c.recall, c.contexts);
    }
    Ok(out.text)
}

impl Lines {
    /// One number of a table; `contexts` where it is of fewer than the others.
    fn cell(&mut self, method: MethodName, policy: Policy, ratio: f64, v: Interval, contexts: Option<usize>) {
        let on = contexts.map_or_else(String::new, |n| format!(", {n} contexts only"));
        let at = format!("{:.1}% [{:.1}, {:.1}]{on}", 100.0 * v.mean, 100.0 * v.low, 100.0 * v.high);
        let _ = writeln!(self.text, "  {:<14} {:<13} {ratio:<6} {at}", method.name(), policy.name());
    }
}
