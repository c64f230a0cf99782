//! The page that puts several runs side by side; `templates/comparison.html` lays it out.
//!
//! The numbers come from `pkv_results::compare`, curves and times from the run folders; here they become
//! charts and tables, of the same make as a run's own.

use std::path::Path;

use anyhow::Result;
use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::compare::{Comparison, Difference, Metric, RecipeKey, TaskScores, value_text, verdict};
use pkv_results::{Interval, MethodInfo, Results};
use serde::Serialize;

use crate::chart::{self, LineChart, Marker, percent_text};
use crate::figures::{self, LayerLine, Multiples, RunLine};
use crate::headline::{nearest, short};
use crate::method::{self, Methods};
use crate::metrics::Metrics;
use crate::page::{PAGE_CSS, PAGE_JS, fill};
use crate::run::RunData;
use crate::stages::{Stages, stages};
use crate::tables::{Cell, Row, Table, excludes_zero, interval, points, range, signed_points, thousandths};

/// Classes of `chart.css` for runs; more runs share them, and markers tell them apart.
const CLASSES: usize = 8;
const MARKERS: [Marker; 5] =
    [Marker::Circle, Marker::Square, Marker::Diamond, Marker::TriangleUp, Marker::TriangleDown];

#[derive(Serialize)]
struct Page {
    chart_css: &'static str,
    page_css: &'static str,
    script: &'static str,
    sections: Vec<(&'static str, &'static str)>,
    title: String,
    target: String,
    verdict: Option<String>,
    policy: &'static str,
    policy_meaning: &'static str,
    runs: Vec<RunView>,
    notes: Vec<String>,
    answers: Option<Part>,
    recall: Option<Part>,
    relation: Option<Part>,
    likelihood: Option<Part>,
    training: Option<Part>,
    cost: Option<Part>,
    layers: Option<Layers>,
    recipe: Recipe,
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

/// Charts with their tables.
#[derive(Default, Serialize)]
struct Part {
    reading: Option<String>,
    /// Each with its caption, which may be empty.
    charts: Vec<(&'static str, String)>,
    multiples: Option<Multiples>,
    tables: Vec<Table>,
}

#[derive(Serialize)]
struct Layers {
    note: String,
    svg: String,
}

#[derive(Serialize)]
struct Recipe {
    differs: bool,
    has_same: bool,
    rows: Vec<Setting>,
}

#[derive(Serialize)]
struct Setting {
    key: String,
    values: Vec<String>,
    same: bool,
}

/// Write the page of a comparison to `path`; `methods` are those that are known.
///
/// # Errors
/// The file cannot be written.
pub fn write_comparison(comparison: &Comparison, methods: &[MethodInfo], path: &Path) -> Result<()> {
    crate::write_whole(path, &render(Methods(methods), comparison)?)
}

fn render(methods: Methods, c: &Comparison) -> Result<String> {
    let data: Vec<Option<RunData>> =
        c.runs.iter().map(|r| RunData::read(Path::new(&r.folder)).ok()).collect();
    let (likelihood, training, cost) = (likelihood(c, &data), training(c, &data), cost(c, &data));
    let relation = relation(c);
    let all = [
        ("answers", "Answers", true),
        ("recall", "Recall", true),
        ("relation", "Recall and answers", relation.is_some()),
        ("likelihood", "Likelihood", likelihood.is_some()),
        ("training", "Training", training.is_some()),
        ("cost", "Times and sizes", cost.is_some()),
        ("layers", "Layers", true),
        ("recipes", "Recipes", true),
    ];
    let page = Page {
        chart_css: chart::CSS,
        page_css: PAGE_CSS,
        script: PAGE_JS,
        sections: all.into_iter().filter(|s| s.2).map(|s| (s.0, s.1)).collect(),
        verdict: verdict(c),
        title: format!("{} mappers for {}", c.runs.len(), short(&c.target)),
        target: c.target.clone(),
        policy: c.policy.name(),
        policy_meaning: method::policy_meaning(c.policy),
        runs: runs(c),
        notes: c.notes.clone(),
        answers: c.answers.as_ref().map(|m| answers(methods, c, m)),
        recall: c.recall.as_ref().map(|m| recall(methods, c, m)),
        relation,
        likelihood,
        training,
        cost,
        layers: layers(methods, c),
        recipe: recipe(c),
    };
    fill("comparison.html", page)
}

fn class(run: usize) -> String {
    format!("c-run{}", run % CLASSES)
}

fn runs(c: &Comparison) -> Vec<RunView> {
    let view = |(i, r): (usize, &pkv_results::compare::RunName)| RunView {
        name: r.name.clone(),
        class: class(i),
        folder: r.folder.clone(),
        proxy: r.proxy.clone().unwrap_or_else(|| "none".to_owned()),
        mapper: r.mapper.clone(),
        first: i == 0,
    };
    c.runs.iter().enumerate().map(view).collect()
}

fn answers(methods: Methods, c: &Comparison, m: &Metric) -> Part {
    let over = match c.tasks.as_slice() {
        [one] => one.task.clone(),
        several => format!("mean of {} tasks, each counting alike", several.len()),
    };
    let mut tables = vec![own(methods, c, m, &format!("Answers from the pruned cache, percent ({over})"))];
    tables.extend(differences(c, m, "Answers minus those"));
    tables.extend(
        c.recovered
            .as_ref()
            .map(|r| own(methods, c, r, "Recovered accuracy: answers relative to KVzip's, percent")),
    );
    tables.extend(by_task(c));
    let multiples = match c.tasks.as_slice() {
        [_, _, ..] => {
            let small = |t: &TaskScores| Some((t.task.clone(), lines(methods, c, &t.metric, "score")?));
            figures::multiples(c.tasks.iter().filter_map(small).collect())
        }
        _ => None,
    };
    Part { charts: charts(curve(methods, c, m, "questions answered")), multiples, tables, ..Part::default() }
}

fn recall(methods: Methods, c: &Comparison, m: &Metric) -> Part {
    let mut tables = vec![own(methods, c, m, "Recall of the KV pairs that KVzip keeps, percent")];
    tables.extend(differences(c, m, "Recall minus that"));
    Part { charts: charts(curve(methods, c, m, "of KVzip's choice found")), tables, ..Part::default() }
}

/// A chart whose section's heading is caption enough.
fn charts(one: Option<String>) -> Vec<(&'static str, String)> {
    one.into_iter().map(|chart| ("", chart)).collect()
}

fn curve(methods: Methods, c: &Comparison, m: &Metric, what: &str) -> Option<String> {
    lines(methods, c, m, what).map(|chart| chart.figure())
}

/// A line for each run, and KVzip's where it is known.
fn lines(methods: Methods, c: &Comparison, m: &Metric, what: &str) -> Option<LineChart> {
    let kvzip = m.references.iter().filter(|r| r.name == MethodName::KVZIP.name()).map(|r| RunLine {
        label: r.name.clone(),
        class: methods.class(MethodName::KVZIP),
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
    figures::by_run(&kvzip.chain(runs).collect::<Vec<_>>(), what)
}

/// Recall against answers, a point for each run and share kept; `None` without two runs that have both.
fn relation(c: &Comparison) -> Option<Part> {
    let (recall, answers) = (c.recall.as_ref()?, c.answers.as_ref()?);
    let at = |m: &Metric, ratio: f64| m.ratios.iter().position(|r| *r == ratio);
    let shared: Vec<(f64, usize, usize)> =
        recall.ratios.iter().filter_map(|&r| Some((r, at(recall, r)?, at(answers, r)?))).collect();
    let place =
        |run: usize, &(_, i, k): &(f64, usize, usize)| (recall.runs[run][i].mean, answers.runs[run][k].mean);
    let dots = (0..c.runs.len()).rev().map(|run| figures::Dots {
        label: c.runs[run].name.clone(),
        class: class(run),
        marker: MARKERS[run % MARKERS.len()],
        points: shared.iter().map(|s| (s.0, place(run, s).0, place(run, s).1)).collect(),
    });
    let chart = figures::scatter(&dots.collect::<Vec<_>>())?;
    let reading = || {
        let ratio = nearest(shared.iter().map(|s| s.0))?;
        let one = shared.iter().find(|s| s.0 == ratio)?;
        let runs: Vec<(f64, f64)> = (0..c.runs.len()).map(|run| place(run, one)).collect();
        let (mut alike, mut pairs) = (0, 0);
        for (i, a) in runs.iter().enumerate() {
            for b in &runs[..i] {
                pairs += 1;
                alike += usize::from((a.0 - b.0) * (a.1 - b.1) > 0.0);
            }
        }
        Some(format!(
            "With {} kept, the run of higher recall also answers more in {alike} of {pairs} pair{} of runs.",
            percent_text(ratio),
            if pairs == 1 { "" } else { "s" }
        ))
    };
    (c.runs.len() > 1).then(|| Part {
        reading: reading(),
        charts: charts(Some(chart.figure())),
        ..Part::default()
    })
}

fn columns(m: &Metric) -> Vec<String> {
    m.ratios.iter().map(|&r| format!("{} kept", percent_text(r))).collect()
}

/// Every run's own numbers, over its own contexts.
fn own(methods: Methods, c: &Comparison, m: &Metric, caption: &str) -> Table {
    let bests: Vec<Option<f64>> =
        (0..m.ratios.len()).map(|i| m.runs.iter().map(|values| values[i].mean).reduce(f64::max)).collect();
    let cell =
        |v: Interval, best: bool| Some(Cell { value: points(v.mean), interval: interval(v, points), best });
    let references = m.references.iter().map(|r| Row {
        name: r.name.clone(),
        class: if r.name == MethodName::KVZIP.name() {
            methods.class(MethodName::KVZIP)
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
        ..Table::default()
    }
}

/// Later runs minus the first.
fn differences(c: &Comparison, m: &Metric, what: &str) -> Option<Table> {
    let row = |d: &Difference| Row {
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
        caption: format!("{what} of {}, points", c.runs[0].name),
        note: "Over the contexts that both runs answered, their number is in brackets. Small type: 95% interval of a \
               paired bootstrap over them. Bold: the interval excludes 0."
            .to_owned(),
        columns: columns(m),
        rows,
        ..Table::default()
    })
}

/// Tasks across, runs down, at one ratio; `None` unless there are several tasks.
fn by_task(c: &Comparison) -> Option<Table> {
    let [_, _, ..] = c.tasks.as_slice() else { return None };
    let ratio = pkv_results::compare::one_ratio(c)?;
    let at = |m: &Metric| m.ratios.iter().position(|r| *r == ratio);
    let best = |t: &pkv_results::compare::TaskScores| {
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
        ..Table::default()
    })
}

fn layers(methods: Methods, c: &Comparison) -> Option<Layers> {
    let b = c.budgets.as_ref()?;
    let kvzip = LayerLine {
        label: MethodName::KVZIP.name().to_owned(),
        class: methods.class(MethodName::KVZIP),
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
        svg: figures::layers(&lines)?.figure(),
    })
}

fn recipe(c: &Comparison) -> Recipe {
    let row = |k: &RecipeKey, same| Setting {
        key: k.key.clone(),
        values: k.values.iter().map(value_text).collect(),
        same,
    };
    let different = c.recipe.iter().map(|k| row(k, false));
    Recipe {
        differs: !c.recipe.is_empty(),
        has_same: !c.same.is_empty(),
        rows: different.chain(c.same.iter().map(|k| row(k, true))).collect(),
    }
}

/// The mapper's own numbers of each run, as its results have them; the ratios that every run measured.
fn mappers(c: &Comparison, caption: &str, note: &str, cells: &[Vec<(f64, Interval)>]) -> Option<Table> {
    let everywhere = |r: &f64| cells.iter().all(|run| run.iter().any(|x| x.0 == *r));
    let ratios: Vec<f64> = cells.first()?.iter().map(|x| x.0).filter(everywhere).collect();
    let of = |run: &[(f64, Interval)], r: f64| run.iter().find(|x| x.0 == r).map(|x| x.1);
    let bests: Vec<Option<f64>> = ratios
        .iter()
        .map(|&r| cells.iter().filter_map(|run| Some(of(run, r)?.mean)).reduce(f64::min))
        .collect();
    let row = |(i, run): (usize, &Vec<(f64, Interval)>)| Row {
        name: c.runs[i].name.clone(),
        class: class(i),
        reference: false,
        cells: ratios
            .iter()
            .zip(&bests)
            .map(|(&r, best)| {
                let v = of(run, r)?;
                let best = best.is_some_and(|b| thousandths(b) == thousandths(v.mean));
                Some(Cell { value: thousandths(v.mean), interval: interval(v, thousandths), best })
            })
            .collect(),
    };
    (!ratios.is_empty()).then(|| Table {
        caption: caption.to_owned(),
        note: note.to_owned(),
        columns: ratios.iter().map(|&r| format!("{} kept", percent_text(r))).collect(),
        rows: cells.iter().enumerate().map(row).collect(),
        ..Table::default()
    })
}

/// Likelihood of continuations and distance of answers, where every run has them.
fn likelihood(c: &Comparison, data: &[Option<RunData>]) -> Option<Part> {
    let results = data.iter().map(|d| d.as_ref()?.results.as_ref()).collect::<Option<Vec<_>>>()?;
    let mapper = |m, p| (m, p) == (MethodName::MAPPER, c.policy);
    type Cells = Vec<(f64, Interval)>;
    let excess = |r: &&Results| -> Cells {
        let cells = r.perplexity.iter().flat_map(|p| &p.cells);
        cells.filter(|x| mapper(x.method, x.policy)).map(|x| (x.ratio, x.excess)).collect()
    };
    let kl = |r: &&Results| -> Cells {
        let cells = r.facts.iter().flat_map(|p| &p.cells);
        cells.filter(|x| mapper(x.method, x.policy)).map(|x| (x.ratio, x.kl)).collect()
    };
    let (excess, kl): (Vec<Cells>, Vec<Cells>) = results.iter().map(|r| (excess(r), kl(r))).unzip();
    let note = "Small type: 95% interval over the run's own contexts. Bold: the lowest.";
    let tables: Vec<Table> = [
        mappers(c, "Likelihood lost on the continuation, nats per token above the full cache", note, &excess),
        mappers(c, "KL(full ‖ pruned) of the answer's tokens, nats per token", note, &kl),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!tables.is_empty()).then(|| Part { tables, ..Part::default() })
}

/// Curves of the runs over each other.
fn training(c: &Comparison, data: &[Option<RunData>]) -> Option<Part> {
    let metrics = || {
        let of = |(i, d): (usize, &'_ Option<RunData>)| Some((i, d.as_ref()?.metrics.clone()?));
        data.iter().enumerate().filter_map(of).collect::<Vec<_>>()
    };
    let chart = |title: &'static str, label: &str, points: &dyn Fn(&Metrics) -> Vec<(u64, f64)>| {
        let line = |(i, m): &(usize, Metrics)| {
            (c.runs[*i].name.clone(), class(*i), MARKERS[i % MARKERS.len()], points(m))
        };
        let lines: Vec<_> = metrics().iter().map(line).filter(|l| !l.3.is_empty()).collect();
        Some((title, figures::runs_by_step(title, label, &lines)?.figure()))
    };
    let loss = |m: &Metrics| -> Vec<(u64, f64)> {
        m.validation.iter().filter_map(|p| Some((p.step, p.loss?))).collect()
    };
    let recall = |m: &Metrics| -> Vec<(u64, f64)> {
        let of = |p: &crate::metrics::ValidationPoint| {
            let found: Vec<f64> =
                p.recall.iter().filter(|r| r.0 == Policy::Pair.name()).map(|r| 100.0 * r.2).collect();
            (!found.is_empty()).then(|| (p.step, found.iter().sum::<f64>() / found.len() as f64))
        };
        m.validation.iter().filter_map(of).collect()
    };
    let charts: Vec<_> = [
        chart("Validation loss of each run", "validation loss", &loss),
        chart(
            "Validation recall of each run, mean over the shares kept",
            "recall of KVzip's choice, %",
            &recall,
        ),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!charts.is_empty()).then(|| Part { charts, ..Part::default() })
}

/// Time of every stage, and bytes on disk.
fn cost(c: &Comparison, data: &[Option<RunData>]) -> Option<Part> {
    let all: Vec<Option<Stages>> = data.iter().map(|d| d.as_ref().map(stages)).collect();
    let mut columns: Vec<String> = Vec::new();
    for row in all.iter().flatten().flat_map(|s| &s.rows) {
        if !columns.contains(&row.name) {
            columns.push(row.name.clone());
        }
    }
    if columns.is_empty() {
        return None;
    }
    let row = |(i, run): (usize, &Option<Stages>)| {
        let cell = |value: String, interval: String| Some(Cell { value, interval, best: false });
        let stage = |name: &String| {
            let found = run.as_ref()?.rows.iter().find(|r| r.name == *name)?;
            cell(found.time.clone(), found.size.clone())
        };
        let total = run.as_ref().and_then(|s| cell(s.total_time.clone(), s.total_size.clone()));
        Row {
            name: c.runs[i].name.clone(),
            class: class(i),
            reference: false,
            cells: columns.iter().map(stage).chain([total]).collect(),
        }
    };
    let table = Table {
        caption: "Time of each stage".to_owned(),
        note: "Small type: size on disk.".to_owned(),
        rows: all.iter().enumerate().map(row).collect(),
        columns: columns.iter().cloned().chain(["all".to_owned()]).collect(),
        ..Table::default()
    };
    Some(Part { tables: vec![table], ..Part::default() })
}
