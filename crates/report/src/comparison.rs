//! The page that puts several runs side by side; `templates/comparison.html` lays it out.
//!
//! The numbers come from `pkv_eval::compare`; here they become charts and tables, of the same make as a run's
//! own.

use std::path::Path;

use anyhow::Result;
use pkv_eval::Interval;
use pkv_eval::compare::{Comparison, Metric, value_text};
use pkv_recipe::MethodName;
use serde::Serialize;

use crate::chart::{self, Marker, percent_text};
use crate::figures::{self, LayerLine, RunLine};
use crate::headline::short;
use crate::method;
use crate::page::{PAGE_CSS, fill};
use crate::tables::{Cell, Row, Table, excludes_zero, interval, points, range, signed_points};

/// Classes of `chart.css` for runs; more runs share them, and markers tell them apart.
const CLASSES: usize = 8;
const MARKERS: [Marker; 5] =
    [Marker::Circle, Marker::Square, Marker::Diamond, Marker::TriangleUp, Marker::TriangleDown];

#[derive(Serialize)]
struct Page {
    chart_css: &'static str,
    page_css: &'static str,
    title: String,
    target: String,
    policy: &'static str,
    policy_meaning: &'static str,
    runs: Vec<RunView>,
    notes: Vec<String>,
    answers: Option<Part>,
    recall: Option<Part>,
    tasks: Option<Table>,
    layers: Option<Layers>,
    recipe: Option<Recipe>,
}

#[derive(Serialize)]
struct RunView {
    name: String,
    class: String,
    folder: String,
    proxy: String,
    mapper: String,
    first: bool,
}

/// A chart with its tables.
#[derive(Serialize)]
struct Part {
    svg: Option<String>,
    tables: Vec<Table>,
}

#[derive(Serialize)]
struct Layers {
    note: String,
    svg: String,
}

#[derive(Serialize)]
struct Recipe {
    names: Vec<String>,
    rows: Vec<(String, Vec<String>)>,
}

/// Write the page of a comparison to `path`.
///
/// # Errors
/// The file cannot be written.
pub fn write_comparison(comparison: &Comparison, path: &Path) -> Result<()> {
    crate::write_whole(path, &render(comparison)?)
}

fn render(c: &Comparison) -> Result<String> {
    let page = Page {
        chart_css: chart::CSS,
        page_css: PAGE_CSS,
        title: format!("{} mappers for {}", c.runs.len(), short(&c.target)),
        target: c.target.clone(),
        policy: c.policy.name(),
        policy_meaning: method::policy_meaning(c.policy),
        runs: runs(c),
        notes: c.notes.clone(),
        answers: c.answers.as_ref().map(|m| answers(c, m)),
        recall: c.recall.as_ref().map(|m| recall(c, m)),
        tasks: by_task(c),
        layers: layers(c),
        recipe: recipe(c),
    };
    fill("comparison.html", page)
}

fn class(run: usize) -> String {
    format!("c-run{}", run % CLASSES)
}

fn runs(c: &Comparison) -> Vec<RunView> {
    let view = |(i, r): (usize, &pkv_eval::compare::RunName)| RunView {
        name: r.name.clone(),
        class: class(i),
        folder: r.folder.clone(),
        proxy: r.proxy.clone().unwrap_or_else(|| "none".to_owned()),
        mapper: r.mapper.clone(),
        first: i == 0,
    };
    c.runs.iter().enumerate().map(view).collect()
}

fn answers(c: &Comparison, m: &Metric) -> Part {
    let over = match c.tasks.as_slice() {
        [one] => one.task.clone(),
        several => format!("mean of {} tasks, each counting alike", several.len()),
    };
    let mut tables = vec![own(c, m, &format!("Answers from the pruned cache, percent ({over})"))];
    tables.extend(differences(c, m, "Answers"));
    tables.extend(
        c.recovered.as_ref().map(|r| own(c, r, "Recovered accuracy: answers relative to KVzip's, percent")),
    );
    Part { svg: curve(c, m, "questions answered"), tables }
}

fn recall(c: &Comparison, m: &Metric) -> Part {
    let mut tables = vec![own(c, m, "Recall of the KV pairs that KVzip keeps, percent")];
    tables.extend(differences(c, m, "Recall"));
    Part { svg: curve(c, m, "of KVzip's choice found"), tables }
}

fn curve(c: &Comparison, m: &Metric, what: &str) -> Option<String> {
    let kvzip = m.references.iter().filter(|r| r.name == method::label(MethodName::KVZIP)).map(|r| RunLine {
        label: r.name.clone(),
        class: method::class(MethodName::KVZIP),
        marker: Marker::Ring,
        ratios: &m.ratios,
        values: &r.values,
    });
    // The first run is drawn last, on top.
    let runs = (0..c.runs.len()).rev().map(|i| RunLine {
        label: c.runs[i].name.clone(),
        class: class(i),
        marker: MARKERS[i % MARKERS.len()],
        ratios: &m.ratios,
        values: &m.runs[i],
    });
    figures::by_run(&kvzip.chain(runs).collect::<Vec<_>>(), what).map(|chart| chart.svg())
}

fn columns(m: &Metric) -> Vec<String> {
    m.ratios.iter().map(|&r| format!("{} kept", percent_text(r))).collect()
}

/// Every run's own numbers, over its own contexts.
fn own(c: &Comparison, m: &Metric, caption: &str) -> Table {
    let bests: Vec<Option<f64>> =
        (0..m.ratios.len()).map(|i| m.runs.iter().map(|values| values[i].mean).reduce(f64::max)).collect();
    let cell =
        |v: Interval, best: bool| Some(Cell { value: points(v.mean), interval: interval(v, points), best });
    let references = m.references.iter().map(|r| Row {
        name: r.name.clone(),
        class: if r.name == method::label(MethodName::KVZIP) {
            method::class(MethodName::KVZIP)
        } else {
            "full".to_owned()
        },
        reference: true,
        cells: r.values.iter().map(|v| cell(*v, false)).collect(),
    });
    let runs = m.runs.iter().enumerate().map(|(i, values)| Row {
        name: c.runs[i].name.clone(),
        class: class(i),
        reference: false,
        cells: values
            .iter()
            .zip(&bests)
            .map(|(v, best)| cell(*v, best.is_some_and(|b| points(b) == points(v.mean))))
            .collect(),
    });
    let contexts: Vec<String> = m.contexts.iter().map(ToString::to_string).collect();
    Table {
        caption: caption.to_owned(),
        note: format!(
            "Small type: 95% interval over the run's own contexts ({} in the order of the runs). Bold: the highest.",
            contexts.join(", ")
        ),
        columns: columns(m),
        rows: references.chain(runs).collect(),
    }
}

/// Later runs minus the first.
fn differences(c: &Comparison, m: &Metric, what: &str) -> Option<Table> {
    let row = |d: &pkv_eval::compare::Difference| Row {
        name: format!("{} ({} shared)", c.runs[d.run].name, d.contexts),
        class: class(d.run),
        reference: false,
        cells: (0..m.ratios.len())
            .map(|i| {
                let v = d.values.get(i)?;
                Some(Cell {
                    value: signed_points(v.mean),
                    interval: range(*v, signed_points),
                    best: excludes_zero(*v),
                })
            })
            .collect(),
    };
    let rows: Vec<Row> = m.differences.iter().map(row).collect();
    (!rows.is_empty()).then(|| Table {
        caption: format!("{what} minus those of {}, points", c.runs[0].name),
        note: "Over the contexts that both runs answered, as many as stand behind the name. Small type: 95% interval of a \
               paired bootstrap over them. Bold: the interval excludes 0."
            .to_owned(),
        columns: columns(m),
        rows,
    })
}

/// Tasks across, runs down, at one ratio; `None` unless there are several tasks.
fn by_task(c: &Comparison) -> Option<Table> {
    let [_, _, ..] = c.tasks.as_slice() else { return None };
    let ratio = pkv_eval::compare::one_ratio(c)?;
    let at = |m: &Metric| m.ratios.iter().position(|r| *r == ratio);
    let best = |t: &pkv_eval::compare::TaskScores| {
        t.metric.runs.iter().filter_map(|values| Some(values[at(&t.metric)?].mean)).reduce(f64::max)
    };
    let bests: Vec<Option<f64>> = c.tasks.iter().map(best).collect();
    let row = |i: usize| Row {
        name: c.runs[i].name.clone(),
        class: class(i),
        reference: false,
        cells: c
            .tasks
            .iter()
            .zip(&bests)
            .map(|(t, best)| {
                let v = t.metric.runs[i][at(&t.metric)?];
                let best = best.is_some_and(|b| points(b) == points(v.mean));
                Some(Cell { value: points(v.mean), interval: interval(v, points), best })
            })
            .collect(),
    };
    Some(Table {
        caption: format!("Answers by task at {} kept, percent", percent_text(ratio)),
        note: "Small type: 95% interval over contexts. Bold: the highest.".to_owned(),
        columns: c.tasks.iter().map(|t| t.task.clone()).collect(),
        rows: (0..c.runs.len()).map(row).collect(),
    })
}

fn layers(c: &Comparison) -> Option<Layers> {
    let b = c.budgets.as_ref()?;
    let kvzip = LayerLine {
        label: method::label(MethodName::KVZIP).to_owned(),
        class: method::class(MethodName::KVZIP),
        marker: Marker::Ring,
        shares: b.kvzip.clone(),
    };
    let run = |i: usize| {
        Some(LayerLine {
            label: c.runs[i].name.clone(),
            class: class(i),
            marker: MARKERS[i % MARKERS.len()],
            shares: b.runs[i].clone()?,
        })
    };
    let lines: Vec<LayerLine> = [kvzip].into_iter().chain((0..c.runs.len()).rev().filter_map(run)).collect();
    Some(Layers {
        note: format!(
            "Share of each layer's KV pairs that stays when {} of all do, policy {}; the mean over its KV heads and the test \
             examples.",
            percent_text(b.ratio),
            b.policy.name()
        ),
        svg: figures::layers(&lines)?.svg(),
    })
}

fn recipe(c: &Comparison) -> Option<Recipe> {
    let rows: Vec<_> =
        c.recipe.iter().map(|k| (k.key.clone(), k.values.iter().map(value_text).collect())).collect();
    (!rows.is_empty()).then(|| Recipe { names: c.runs.iter().map(|r| r.name.clone()).collect(), rows })
}
