//! What `run`, `eval` and `report` say to the user.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, ensure};
use pkv_core::{Policy, hinted};
use pkv_eval::methods;
use pkv_recipe::MethodName;
use pkv_recipe::plan::human_secs;
use pkv_results::{AnswerResults, Interval, RESULTS_FILE, Results};
use pkv_run::session::Session;
use pkv_run::stages::eval::{EvalOptions, folder};
use pkv_shard::{RunJson, RunLayout, Stage};
use serde_json::json;

use crate::args::{Cli, RecipeArgs};
use crate::{output, terminal};

/// The results on stdout: tables, or the whole file with `--json`.
///
/// # Errors
/// There are no results.
pub fn print(cli: &Cli, s: &Session, options: &EvalOptions) -> Result<()> {
    let path = folder(s, options).join(RESULTS_FILE);
    let results = Results::read(&path)?;
    output::print_either(cli.json, &results, || pkv_results::table::all_tables(&results))
}

/// A stage's record and the files and folders that it wrote, as JSON on stdout.
///
/// # Errors
/// stdout takes no more.
pub fn print_stage(s: &Session, stage: Stage) -> Result<()> {
    let record = s.run.stage(stage.name());
    let shown = |path: &Path| path.display().to_string();
    let written = stage.writes(&s.run).into_iter().filter(|path| path.exists());
    let written: Vec<String> = written.map(|path| shown(&path)).collect();
    output::print_json(
        &json!({"stage": stage.name(), "run": shown(s.run.root()), "wrote": written, "record": record}),
    )
}

/// What a run ends with: one table, what it says, and what to do next; the whole file with `--json`.
///
/// # Errors
/// There are no results.
pub fn print_run(cli: &Cli, s: &Session, options: &EvalOptions) -> Result<()> {
    let results = Results::read(&folder(s, options).join(RESULTS_FILE))?;
    if cli.json {
        return output::print_json(&results);
    }
    let task = results.facts.as_ref().or(results.benchmarks.first());
    let Some(end) = task.and_then(|task| end_of_run(&results, task, terminal::has_color(&std::io::stdout())))
    else {
        // Nothing was asked.
        output::print(&pkv_results::table::all_tables(&results))?;
        return output::print(&next(s.run.root()));
    };
    let took: f64 = RunJson::read(&s.run)?.unwrap_or_default().stages.values().map(|stage| stage.secs).sum();
    output::print_styled(&format!("{end}All stages took {}.\n{}", human_secs(took), next(s.run.root())))
}

/// Where things are, and the command that uses them.
fn next(run: &Path) -> String {
    let run = run.display();
    format!(
        "\nreport      {run}/report.html\n\
         all tables  proxykv-train inspect {run}/eval\n\
         next        proxykv-train infer --mapper {run} --context FILE --retain 0.2 \\\n            \
                     --question \"...\"\n"
    )
}

/// A share kept at which the lines below the table speak: where methods begin to part.
const SPOKEN: f64 = 0.05;

/// Shares kept that a table of 80 columns has room for.
const COLUMNS: usize = 8;

/// Answers by method and share kept, and two lines about them. With `bold`, the mapper's row and the best of
/// each column are; without, `*` marks the best.
fn end_of_run(results: &Results, task: &AnswerResults, bold: bool) -> Option<String> {
    let policy = task.cells.first()?.policy;
    let cells = || task.cells.iter().filter(|c| c.policy == policy);
    let mut ratios: Vec<f64> = cells().map(|c| c.ratio).collect();
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios.dedup();
    // As many as fit; where most is kept, methods hardly differ.
    ratios.drain(..ratios.len().saturating_sub(COLUMNS));
    let mut named: Vec<MethodName> = Vec::new();
    for cell in cells() {
        if !named.contains(&cell.method) {
            named.push(cell.method);
        }
    }
    // Compared with, not competed with: first.
    named.sort_by_key(|m| !is_oracle(*m));
    let best = |ratio: f64| {
        let rivals = cells().filter(|c| c.ratio == ratio && !is_oracle(c.method)).map(|c| c.score.mean);
        rivals.reduce(f64::max).map(points)
    };
    let width = named.iter().map(|m| label(*m).chars().count()).max()?.max("KV pairs kept".len()) + 2;
    let strong = |text: String, is_strong: bool| {
        if bold && is_strong { format!("\u{1b}[1m{text}\u{1b}[0m") } else { text }
    };
    let what =
        if task.task.is_empty() { "facts".to_owned() } else { format!("{} {}", task.suite, task.task) };
    let mut out = format!(
        "\n{what}: % of {} questions answered from the pruned cache, policy {}\n\n{:width$}",
        task.questions,
        policy.name(),
        "  KV pairs kept"
    );
    let line = |out: &mut String, cells: Vec<String>| {
        let _ = writeln!(out, "{}", cells.concat().trim_end());
    };
    line(&mut out, ratios.iter().map(|r| format!("{:>6} ", percent_kept(*r))).collect());
    let _ = write!(out, "{:width$}", "  full cache");
    line(&mut out, ratios.iter().map(|_| format!("{:>6} ", points(task.full.mean))).collect());
    for method in named {
        let is_ours = method == MethodName::MAPPER;
        let name = format!("{} {}", if is_ours { '>' } else { ' ' }, label(method));
        out.push_str(&strong(format!("{name:width$}"), is_ours));
        let cell = |&ratio: &f64| {
            let value = task.cell(method, policy, ratio).map(|c| points(c.score.mean));
            let is_best = value.is_some() && !is_oracle(method) && value == best(ratio);
            let mark = if is_best && !bold { '*' } else { ' ' };
            strong(format!("{:>6}{mark}", value.as_deref().unwrap_or("-")), is_best)
        };
        line(&mut out, ratios.iter().map(cell).collect());
    }
    let _ = writeln!(out, "\n{}", said(results, task, policy, &ratios)?);
    Some(out)
}

/// The mapper's answers beside the full cache's and KVzip's, and its recall.
fn said(results: &Results, task: &AnswerResults, policy: Policy, ratios: &[f64]) -> Option<String> {
    let distance = |r: f64| (r / SPOKEN).ln().abs();
    let of = |m, r| task.cell(m, policy, r);
    let measured = ratios.iter().copied().filter(|&r| of(MethodName::MAPPER, r).is_some());
    let Some(ratio) = measured.min_by(|a, b| distance(*a).total_cmp(&distance(*b))) else {
        return Some("The mapper was not asked.".to_owned());
    };
    let mapper = of(MethodName::MAPPER, ratio)?.score;
    let kept = percent_kept(ratio);
    let mut out = format!(
        "With {kept} kept: mapper {}% ({} to {}), full cache {}%",
        points(mapper.mean),
        points(mapper.low),
        points(mapper.high),
        points(task.full.mean)
    );
    if let Some(kvzip) = of(MethodName::KVZIP, ratio) {
        let _ = write!(out, ", KVzip {}%", points(kvzip.score.mean));
    }
    out.push('.');
    if let Some(Interval { mean, .. }) =
        results.labels.cell(MethodName::MAPPER, policy, ratio).map(|c| c.recall)
    {
        let _ = write!(out, "\nThe mapper finds {}% of the KV pairs that KVzip keeps there.", points(mean));
    }
    Some(out)
}

fn is_oracle(method: MethodName) -> bool {
    methods::find(method).is_some_and(methods::Method::is_oracle)
}

fn label(method: MethodName) -> &'static str {
    methods::find(method).map_or(method.name(), |m| m.label)
}

fn points(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

/// `12.5%`.
fn percent_kept(ratio: f64) -> String {
    format!("{}%", (ratio * 1e6).round() / 1e4)
}

/// A run that is not there has no report, and must not be made by asking for one.
///
/// # Errors
/// The recipe is invalid, or its run folder absent.
pub fn check_run(cli: &Cli, args: &RecipeArgs) -> Result<()> {
    let recipe = args.load()?;
    let run = RunLayout::new(cli.runs.join(&recipe.name));
    pkv_files::refresh(&run.run_json())?;
    ensure!(
        run.run_json().is_file(),
        hinted(
            format!("cannot report on `{}`: there is no run `{}`", recipe.name, run.root().display()),
            "run folders are in `runs/`, or where `--runs` says; `proxykv-train run` makes one"
        )
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let at = |mean: f64| json!({"mean": mean, "low": mean - 0.03, "high": mean + 0.01});
        let mut cells = Vec::new();
        for (method, score) in
            [("mapper", 0.96), ("kvzip", 0.97), ("kvzip-pooled", 0.99), ("linear", 0.9), ("random", 0.97)]
        {
            for (ratio, less) in [
                (0.5, 0.0),
                (0.3, 0.0),
                (0.2, 0.0),
                (0.1, 0.0),
                (0.07, 0.0),
                (0.05, 0.3),
                (0.03, 0.5),
                (0.02, 0.6),
            ] {
                let drop = if method == "random" { 3.0 * less / 2.0 } else { less };
                cells.push(json!({"method": method, "policy": "pair-floor", "ratio": ratio, "accuracy": at(score - drop),
                    "kl": at(0.1), "flips": at(0.1), "of_kvzip": null, "of_full": null}));
            }
        }
        serde_json::from_value(json!({
            "schema_version": 1, "fingerprint": "", "seed": 1, "mapper": "",
            "target": {"name": "t", "layers": 2, "kv_heads": 2}, "notes": [],
            "labels": {"contexts": 2, "positions": 9, "ranks": [], "heads": null, "cells": [
                {"method": "mapper", "policy": "pair-floor", "ratio": 0.05, "recall": at(0.751), "mass": at(0.9), "realised": 0.05}]},
            "facts": {"contexts": 2, "questions": 96, "full": at(0.99), "cells": cells},
            "perplexity": null, "worked_example": null, "timings": []
        }))
        .unwrap()
    }

    #[test]
    fn a_run_ends_in_one_table_of_80_columns() {
        let results = results();
        let task = results.facts.as_ref().unwrap();
        let plain = end_of_run(&results, task, false).unwrap();
        assert!(plain.lines().all(|line| line.chars().count() <= 80), "{plain}");
        assert!(!plain.contains('\u{1b}'));
        let row = |name: &str| plain.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{plain}"));
        assert!(row("mapper ").starts_with("> mapper") && row("> mapper").contains("  66.0*"), "{plain}");
        // Best at 50%, and no more at 5%; oracles are never.
        assert!(row("  random").contains("97.0*") && row("  random").contains(" 52.0 "), "{plain}");
        assert!(!row("  KVzip ").contains('*'), "{plain}");
        let order = ["full cache", "  KVzip ", "> mapper", "  random"].map(|name| plain.find(name).unwrap());
        assert!(order.is_sorted(), "{plain}");
        for said in [
            "facts: % of 96 questions",
            "With 5% kept: mapper 66.0% (63.0 to 67.0), full cache 99.0%, KVzip 67.0%.",
            "The mapper finds 75.1% of the KV pairs that KVzip keeps there.",
        ] {
            assert!(plain.contains(said), "`{said}` is missing\n{plain}");
        }
        let bold = end_of_run(&results, task, true).unwrap();
        assert!(bold.contains("\u{1b}[1m> mapper") && !bold.contains('*'), "{bold:?}");
        assert_eq!(
            bold.replace("\u{1b}[1m", "").replace("\u{1b}[0m", "").lines().count(),
            plain.lines().count()
        );
    }
}
