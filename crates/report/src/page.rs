//! The page's content, section by section; `templates/report.html` has its layout.
//!
//! Sentences are made here, from numbers; the template has only the ones that never change.

use std::fmt::Write;

use anyhow::{Context, Result};
use minijinja::{AutoEscape, Environment};
use pkv_core::{Policy, Seed, neutral};
use pkv_recipe::MethodName;
use pkv_results::{Interval, Results};
use serde::Serialize;

use crate::cache::Cache;
use crate::chart::{self, LineChart};
use crate::cost;
use crate::example::{self, ExampleView};
use crate::figures::{self, Multiples};
use crate::headline::{self, Headline};
use crate::method::{self, Methods};
use crate::origin::{self, Origin};
use crate::reading;
use crate::run::RunData;
use crate::samples::{self, Samples};
use crate::stages::{self, Stages};
use crate::tables::{self, Table};

/// Styles of pages, beside those of charts.
pub const PAGE_CSS: &str = include_str!("../templates/page.css");

/// Tables and figures of pages.
pub const PAGE_JS: &str = include_str!("../templates/page.js");
const EXAMPLE_JS: &str = include_str!("../templates/example.js");

/// Everything the template reads.
#[derive(Serialize)]
struct Page {
    chart_css: &'static str,
    page_css: &'static str,
    scripts: Vec<&'static str>,
    problems: Vec<String>,
    headline: Headline,
    stages: Stages,
    training: Option<Training>,
    /// Anchor and name of every section, in order.
    sections: Vec<(&'static str, &'static str)>,
    /// Per policy, the recipe's first one first.
    recall: Vec<Figure>,
    ranks: Option<Table>,
    answers: Vec<Figure>,
    perplexity: Vec<Figure>,
    benchmarks: Vec<Table>,
    /// All tasks at one share kept, and the same relative to KVzip.
    by_task: Option<Table>,
    by_task_recovered: Option<Table>,
    /// Scores by share kept, a small chart for each task.
    multiples: Option<Multiples>,
    methods: Vec<Meaning>,
    heads: Option<Heads>,
    example: Option<ExampleView>,
    samples: Option<Samples>,
    cost: Option<Table>,
    readings: Readings,
    origin: Origin,
    limits: Vec<String>,
}

/// What each section's numbers say.
#[derive(Default, Serialize)]
struct Readings {
    answers: Option<String>,
    likelihood: Option<String>,
    recall: Option<String>,
    heads: Option<String>,
    cost: Option<String>,
    training: Option<String>,
    stages: Option<String>,
}

#[derive(Serialize)]
struct Training {
    /// Captions and charts.
    charts: Vec<(&'static str, String)>,
    note: String,
}

/// A chart and the tables of its numbers.
#[derive(Serialize)]
struct Figure {
    policy: String,
    policy_meaning: String,
    /// The chart with its legend.
    chart: String,
    tables: Vec<Table>,
}

#[derive(Serialize)]
struct Meaning {
    name: &'static str,
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
pub fn render(methods: Methods, data: &RunData) -> Result<String> {
    let results = data.results.as_ref();
    let lead = lead(data);
    let example = results.and_then(|r| example::view(methods, r.worked_example.as_ref()?, &data.samples));
    let samples = results.and_then(|r| {
        let (policy, ratio) = headline::choice(r.facts.as_ref()?)?;
        samples::samples(methods, &data.samples, policy, ratio)
    });
    let cost = results.and_then(|r| cost::cost(methods, r));
    let cache = Cache::of(data);
    let stages = stages::stages(data);
    let mut readings = Readings {
        stages: stages.reading.clone(),
        training: data.metrics.as_ref().and_then(reading::training),
        ..Readings::default()
    };
    if let Some(r) = results {
        // Of the policy whose chart is open.
        readings.answers = r.facts.as_ref().and_then(|f| {
            let policy = f.cells.first()?.policy;
            reading::answers(f, policy, &lead(policy))
        });
        readings.likelihood =
            r.perplexity.as_ref().and_then(|p| reading::likelihood(p, p.cells.first()?.policy));
        readings.recall = r.labels.cells.first().and_then(|c| reading::recall(methods, &r.labels, c.policy));
        readings.heads = r.labels.heads.as_ref().and_then(reading::heads);
        readings.cost = cost.as_ref().and_then(|c| c.reading.clone());
    }
    let all = [
        ("answers", "Answers", true),
        ("samples", "Samples", samples.is_some()),
        ("likelihood", "Likelihood", results.is_some_and(|r| r.perplexity.is_some())),
        ("benchmarks", "Benchmarks", results.is_some_and(|r| !r.benchmarks.is_empty())),
        ("recall", "Recall", true),
        ("heads", "Heads", true),
        ("example", "Example", true),
        ("cost", "Cost", cost.is_some()),
        ("training", "Training", true),
        ("stages", "Stages", true),
        ("choices", "Choices", true),
        ("limits", "Limits", true),
    ];
    let page = Page {
        chart_css: chart::CSS,
        page_css: PAGE_CSS,
        sections: all.into_iter().filter(|s| s.2).map(|s| (s.0, s.1)).collect(),
        scripts: [PAGE_JS].into_iter().chain(example.is_some().then_some(EXAMPLE_JS)).collect(),
        problems: data.problems.clone(),
        headline: headline::headline(methods, data, &lead),
        stages,
        readings,
        samples,
        cost: cost.map(|c| c.table),
        training: training(data),
        recall: results.map(|r| recall(methods, r, cache.as_ref())).unwrap_or_default(),
        ranks: results.and_then(|r| tables::ranks(methods, &r.labels)),
        answers: results.map(|r| answers(methods, r, &lead, cache.as_ref())).unwrap_or_default(),
        perplexity: results.map(|r| perplexity(methods, r)).unwrap_or_default(),
        benchmarks: results.map(|r| benchmarks(methods, r)).unwrap_or_default(),
        by_task: results.and_then(|r| tables::by_task(methods, &r.benchmarks)),
        by_task_recovered: results.and_then(|r| tables::by_task_recovered(methods, &r.benchmarks)),
        multiples: results.and_then(|r| multiples(methods, r)),
        methods: results.map(|r| meanings(methods, r)).unwrap_or_default(),
        heads: results.and_then(|r| heads(methods, r)),
        example,
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
    let charts = [
        ("Loss", figures::loss(metrics)),
        ("Recall on validation documents, by share kept", figures::validation_recall(metrics)),
        ("Learning rate", figures::learning_rate(metrics)),
        ("Norm of the gradient, before clipping", figures::gradient_norm(metrics)),
    ];
    let charts: Vec<_> =
        charts.into_iter().filter_map(|(caption, chart)| Some((caption, chart?.figure()))).collect();
    if charts.is_empty() {
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
    Some(Training { charts, note })
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

fn figure(policy: Policy, chart: &LineChart, tables: Vec<Table>) -> Figure {
    Figure {
        policy: policy.name().to_owned(),
        policy_meaning: method::policy_meaning(policy).to_owned(),
        chart: chart.figure(),
        tables,
    }
}

fn recall(methods: Methods, results: &Results, cache: Option<&Cache>) -> Vec<Figure> {
    let of = |policy| {
        let chart = figures::recall(methods, &results.labels, policy)?;
        Some(figure(policy, &chart, with_bytes(tables::labels(methods, &results.labels, policy), cache)))
    };
    policies(results.labels.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

/// Paired differences of the mapper's answers from those of each method, by policy.
pub type Lead<'a> = dyn Fn(Policy) -> Vec<(MethodName, f64, Interval)> + 'a;

fn lead(data: &RunData) -> impl Fn(Policy) -> Vec<(MethodName, f64, Interval)> {
    let resamples = data.recipe.as_ref().map_or(1000, |r| r.eval.bootstrap);
    move |policy| match (&data.answers, &data.results) {
        (Some(answers), Some(results)) => {
            pkv_results::compare::mapper_lead(answers, "facts", policy, Seed(results.seed), resamples)
        }
        _ => Vec::new(),
    }
}

/// The first table, which is open, with the bytes of each share kept.
fn with_bytes(tables: Vec<Table>, cache: Option<&Cache>) -> Vec<Table> {
    let first = |(i, table): (usize, Table)| if i == 0 { table.with_bytes(cache) } else { table };
    tables.into_iter().enumerate().map(first).collect()
}

fn answers(methods: Methods, results: &Results, lead: &Lead, cache: Option<&Cache>) -> Vec<Figure> {
    let Some(facts) = &results.facts else { return Vec::new() };
    let of = |policy| {
        let mut shown = tables::facts(methods, facts, policy);
        // After the answers themselves.
        shown.splice(shown.len().min(1)..shown.len().min(1), tables::lead(methods, &lead(policy)));
        Some(figure(policy, &figures::answers(methods, facts, policy)?, with_bytes(shown, cache)))
    };
    policies(facts.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

fn perplexity(methods: Methods, results: &Results) -> Vec<Figure> {
    let Some(found) = &results.perplexity else { return Vec::new() };
    let of = |policy| {
        let table = tables::perplexity(methods, found, policy).into_iter().collect();
        Some(figure(policy, &figures::perplexity(methods, found, policy)?, table))
    };
    policies(found.cells.iter().map(|c| c.policy)).into_iter().filter_map(of).collect()
}

/// Tasks of standard benchmarks, each under every policy.
fn benchmarks(methods: Methods, results: &Results) -> Vec<Table> {
    let of = |b| policies_of(b).into_iter().flat_map(move |policy| tables::benchmark(methods, b, policy));
    results.benchmarks.iter().flat_map(of).collect()
}

/// Facts and benchmarks, under the policy that the first benchmark was asked with.
fn multiples(methods: Methods, results: &Results) -> Option<Multiples> {
    let policy = results.benchmarks.first()?.cells.first()?.policy;
    let facts = results.facts.iter().map(|facts| ("facts".to_owned(), facts));
    let others = results.benchmarks.iter().map(|b| (format!("{} {}", b.suite, b.task), b));
    figures::by_task(methods, &facts.chain(others).collect::<Vec<_>>(), policy)
}

fn policies_of(b: &pkv_results::AnswerResults) -> Vec<Policy> {
    policies(b.cells.iter().map(|c| c.policy))
}

/// The methods that were measured, each in a sentence.
fn meanings(methods: Methods, results: &Results) -> Vec<Meaning> {
    let measured = (results.labels.cells.iter().map(|c| c.method))
        .chain(results.facts.iter().flat_map(|f| &f.cells).map(|c| c.method))
        .chain(results.perplexity.iter().flat_map(|p| &p.cells).map(|c| c.method))
        .chain(results.benchmarks.iter().flat_map(|b| &b.cells).map(|c| c.method));
    methods
        .ordered(measured)
        .into_iter()
        .map(|m| Meaning {
            name: m.name(),
            class: methods.class(m),
            text: match results.note(m) {
                Some(note) => format!("{} ({note})", methods.meaning(m)),
                None => methods.meaning(m).to_owned(),
            },
        })
        .collect()
}

fn heads(methods: Methods, results: &Results) -> Option<Heads> {
    let heads = results.labels.heads.as_ref()?;
    let maps: Vec<String> = figures::heads(heads).iter().map(|m| m.svg(340.0)).collect();
    Some(Heads {
        layers: figures::layers(&budgets(methods, heads)).map(|c| c.figure()),
        note: format!(
            "At {} kept, policy {}. First, how KVzip spreads its budget over layers and KV heads. \
             Then, of what KVzip keeps in a head, the share that the method finds; hollow where KVzip keeps nothing.",
            chart::percent_text(heads.ratio),
            heads.policy.name()
        ),
        maps,
    })
}

/// Mean over its heads of what each layer keeps: KVzip, the mapper and the floor.
fn budgets(methods: Methods, heads: &pkv_results::HeadRecall) -> Vec<figures::LayerLine> {
    let line = |m: MethodName, kept: &[Vec<f64>]| figures::LayerLine {
        label: m.name().to_owned(),
        class: methods.class(m),
        marker: methods.marker(m),
        shares: kept.iter().map(|row| row.iter().sum::<f64>() / row.len().max(1) as f64).collect(),
    };
    let of = |m: MethodName| {
        let found = heads.methods.iter().find(|h| h.method == m && !h.kept.is_empty())?;
        Some(line(m, &found.kept))
    };
    let kvzip = line(MethodName::KVZIP, &heads.kvzip_kept);
    let others = [MethodName::HEAD_PRIOR, MethodName::MAPPER];
    let others: Vec<_> = others.into_iter().filter_map(of).collect();
    // KVzip's alone is in the map above already.
    if others.is_empty() { Vec::new() } else { [kvzip].into_iter().chain(others).collect() }
}
