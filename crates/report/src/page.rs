//! The page's content, section by section; `templates/report.html` has its layout.
//!
//! Sentences are made here, from numbers; the template has only the ones that never change.

use std::fmt::Write;

use anyhow::{Context, Result};
use minijinja::{AutoEscape, Environment};
use pkv_core::{Policy, Seed, neutral};
use pkv_eval::Results;
use serde::Serialize;

use crate::chart;
use crate::example::{self, ExampleView};
use crate::figures;
use crate::headline::{self, Headline};
use crate::method;
use crate::origin::{self, Origin};
use crate::run::RunData;
use crate::stages::{self, Stages};
use crate::tables::{self, Table};

/// Styles of pages, beside those of charts.
pub const PAGE_CSS: &str = include_str!("../templates/page.css");

/// Everything the template reads.
#[derive(Serialize)]
struct Page {
    chart_css: &'static str,
    page_css: &'static str,
    script: &'static str,
    problems: Vec<String>,
    headline: Headline,
    stages: Stages,
    training: Option<Training>,
    /// Per policy, the recipe's first one first.
    recall: Vec<Figure>,
    ranks: Option<Table>,
    answers: Vec<Figure>,
    perplexity: Vec<Figure>,
    benchmarks: Vec<Table>,
    /// All tasks at one share kept, and the same relative to KVzip.
    by_task: Option<Table>,
    by_task_recovered: Option<Table>,
    methods: Vec<Meaning>,
    heads: Option<Heads>,
    example: Option<ExampleView>,
    origin: Origin,
    limits: Vec<String>,
}

#[derive(Serialize)]
struct Training {
    loss: Option<String>,
    recall: Option<String>,
    note: String,
}

/// A chart and the tables of its numbers.
#[derive(Serialize)]
struct Figure {
    policy: String,
    policy_meaning: String,
    svg: String,
    tables: Vec<Table>,
}

#[derive(Serialize)]
struct Meaning {
    name: String,
    class: String,
    text: String,
}

#[derive(Serialize)]
struct Heads {
    note: String,
    maps: Vec<String>,
    layers: Option<String>,
}

/// The page of a run.
///
/// # Errors
/// The template does not fit the values; a fault of this crate.
pub fn render(data: &RunData) -> Result<String> {
    let results = data.results.as_ref();
    let page = Page {
        chart_css: chart::CSS,
        page_css: PAGE_CSS,
        script: include_str!("../templates/example.js"),
        problems: data.problems.clone(),
        headline: headline::headline(data),
        stages: stages::stages(data),
        training: training(data),
        recall: results.map(recall).unwrap_or_default(),
        ranks: results.and_then(|r| tables::ranks(&r.labels)),
        answers: results.map(|r| answers(r, data)).unwrap_or_default(),
        perplexity: results.map(perplexity).unwrap_or_default(),
        benchmarks: results.map(benchmarks).unwrap_or_default(),
        by_task: results.and_then(|r| tables::by_task(&r.benchmarks)),
        by_task_recovered: results.and_then(|r| tables::by_task_recovered(&r.benchmarks)),
        methods: results.map(meanings).unwrap_or_default(),
        heads: results.and_then(heads),
        example: results.and_then(|r| r.worked_example.as_ref()).and_then(example::view),
        origin: origin::origin(data),
        limits: origin::limits(data),
    };
    fill("report.html", page)
}

/// One of the pages, filled with `values`.
///
/// # Errors
/// The template does not fit the values; a fault of this crate.
pub fn fill(name: &str, values: impl Serialize) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    let broken = || format!("the template `{name}` is broken");
    for (name, text) in [
        ("head.html", include_str!("../templates/head.html")),
        ("table.html", include_str!("../templates/table.html")),
        ("report.html", include_str!("../templates/report.html")),
        ("comparison.html", include_str!("../templates/comparison.html")),
    ] {
        environment.add_template(name, text).with_context(broken)?;
    }
    let template = environment.get_template(name).with_context(broken)?;
    let page = template.render(values).with_context(|| format!("cannot fill the template `{name}`"))?;
    // Markup was escaped by the template; control characters mean nothing to it.
    Ok(neutral(&page).into_owned())
}

fn training(data: &RunData) -> Option<Training> {
    let metrics = data.metrics.as_ref()?;
    let loss = figures::loss(metrics).map(|c| c.svg());
    let recall = figures::validation_recall(metrics).map(|c| c.svg());
    if loss.is_none() && recall.is_none() {
        return None;
    }
    let mut note = String::new();
    if let Some(last) = metrics.train.last() {
        let _ = write!(note, "Loss {:.3} at step {}", last.loss, last.step);
        if !last.terms.is_empty() {
            let terms: Vec<String> =
                last.terms.iter().map(|(k, v)| format!("{} {v:.3}", k.replace('_', " "))).collect();
            let _ = write!(note, " (before weighting: {})", terms.join(", "));
        }
        note.push('.');
    }
    if let Some(best) = metrics.validation.iter().rev().find(|p| p.best) {
        let _ = write!(note, " The checkpoint of step {} did best on validation.", best.step);
    }
    Some(Training { loss, recall, note })
}

/// The policies that occur among `cells`, in the order they do.
fn policies(cells: impl Iterator<Item = Policy>) -> Vec<Policy> {
    let mut seen = Vec::new();
    for policy in cells {
        if !seen.contains(&policy) {
            seen.push(policy);
        }
    }
    seen
}

fn figure(policy: Policy, svg: String, tables: Vec<Table>) -> Figure {
    Figure {
        policy: policy.name().to_owned(),
        policy_meaning: method::policy_meaning(policy).to_owned(),
        svg,
        tables,
    }
}

fn recall(results: &Results) -> Vec<Figure> {
    let of = |policy| {
        let chart = figures::recall(&results.labels, policy)?;
        Some(figure(policy, chart.svg(), tables::labels(&results.labels, policy)))
    };
    policies(results.labels.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

fn answers(results: &Results, data: &RunData) -> Vec<Figure> {
    let Some(facts) = &results.facts else { return Vec::new() };
    let resamples = data.recipe.as_ref().map_or(1000, |r| r.eval.bootstrap);
    let of = |policy| {
        let mut shown = tables::facts(facts, policy);
        let lead = data
            .answers
            .as_ref()
            .map(|a| pkv_eval::compare::mapper_lead(a, "facts", policy, Seed(results.seed), resamples));
        // After the two that are open.
        shown.splice(shown.len().min(2)..shown.len().min(2), lead.and_then(tables::lead));
        Some(figure(policy, figures::answers(facts, policy)?.svg(), shown))
    };
    policies(facts.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

fn perplexity(results: &Results) -> Vec<Figure> {
    let Some(found) = &results.perplexity else { return Vec::new() };
    let of = |policy| {
        let table = tables::perplexity(found, policy).into_iter().collect();
        Some(figure(policy, figures::perplexity(found, policy)?.svg(), table))
    };
    policies(found.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

/// Tasks of standard benchmarks, each under every policy.
fn benchmarks(results: &Results) -> Vec<Table> {
    let of = |b| policies_of(b).into_iter().flat_map(move |policy| tables::benchmark(b, policy));
    results.benchmarks.iter().flat_map(of).collect()
}

fn policies_of(b: &pkv_eval::AnswerResults) -> Vec<Policy> {
    policies(b.cells.iter().map(|c| c.policy))
}

/// The methods that were measured, each in a sentence.
fn meanings(results: &Results) -> Vec<Meaning> {
    let measured = (results.labels.cells.iter().map(|c| c.method))
        .chain(results.facts.iter().flat_map(|f| &f.cells).map(|c| c.method))
        .chain(results.perplexity.iter().flat_map(|p| &p.cells).map(|c| c.method))
        .chain(results.benchmarks.iter().flat_map(|b| &b.cells).map(|c| c.method));
    method::ordered(measured)
        .into_iter()
        .map(|m| Meaning {
            name: method::label(m).to_owned(),
            class: method::class(m),
            text: match results.note(m) {
                Some(note) => format!("{} ({note})", method::meaning(m)),
                None => method::meaning(m).to_owned(),
            },
        })
        .collect()
}

fn heads(results: &Results) -> Option<Heads> {
    let heads = results.labels.heads.as_ref()?;
    let maps: Vec<String> = figures::heads(heads).iter().map(|m| m.svg(340.0)).collect();
    Some(Heads {
        layers: figures::layers(&budgets(heads)).map(|c| c.svg()),
        note: format!(
            "At {} kept, policy {}. Left: how KVzip spreads its budget over layers and KV heads. \
             Then, of what KVzip keeps in a head, the share that the method finds; hollow where KVzip keeps nothing.",
            chart::percent_text(heads.ratio),
            heads.policy.name()
        ),
        maps,
    })
}

/// Mean over its heads of what each layer keeps: KVzip, the mapper and the floor.
fn budgets(heads: &pkv_eval::HeadRecall) -> Vec<figures::LayerLine> {
    let line = |label: &str, class: String, marker, kept: &[Vec<f64>]| figures::LayerLine {
        label: label.to_owned(),
        class,
        marker,
        shares: kept.iter().map(|row| row.iter().sum::<f64>() / row.len().max(1) as f64).collect(),
    };
    let of = |m: pkv_recipe::MethodName| {
        let found = heads.methods.iter().find(|h| h.method == m && !h.kept.is_empty())?;
        Some(line(method::label(m), method::class(m), method::marker(m), &found.kept))
    };
    let kvzip = pkv_recipe::MethodName::KVZIP;
    let kvzip = line(method::label(kvzip), method::class(kvzip), method::marker(kvzip), &heads.kvzip_kept);
    let others = [pkv_recipe::MethodName::HEAD_PRIOR, pkv_recipe::MethodName::MAPPER];
    let others: Vec<_> = others.into_iter().filter_map(of).collect();
    // KVzip's alone is in the map above already.
    if others.is_empty() { Vec::new() } else { [kvzip].into_iter().chain(others).collect() }
}
