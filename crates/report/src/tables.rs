//! Tables of an evaluation: methods down, retention ratios across, the best in bold.

use pkv_core::Policy;
use pkv_eval::{BenchmarkResults, FactsResults, Interval, LabelResults, PerplexityResults};
use pkv_recipe::Method;
use serde::Serialize;

use crate::chart::percent_text;
use crate::figures::percent;
use crate::method;

/// One table, ready for the template.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    pub caption: String,
    /// What to read off, in a sentence or two.
    pub note: String,
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub class: String,
    /// Compared with, not competed with: the full cache and KVzip's own scores.
    pub reference: bool,
    pub cells: Vec<Option<Cell>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    pub value: String,
    /// The 95% interval, in small type.
    pub interval: String,
    pub best: bool,
}

/// Which end of a scale is good.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Best {
    Highest,
    Lowest,
}

/// Answers, and what they lack, for one policy: the first table is the one to show.
pub fn facts(facts: &FactsResults, policy: Policy) -> Vec<Table> {
    let cells = || facts.cells.iter().filter(|c| c.policy == policy);
    let mut answers = build(
        "Questions answered, percent",
        &format!(
            "{} questions about {} contexts, asked after pruning. Small type: 95% interval over contexts.",
            facts.questions, facts.contexts
        ),
        cells().map(|c| (c.method, c.ratio, c.accuracy)),
        Best::Highest,
        points,
    );
    let full = Cell { value: points(facts.full.mean), interval: interval(facts.full, points), best: false };
    answers.rows.insert(
        0,
        Row {
            name: "full cache".to_owned(),
            class: "m-full".to_owned(),
            reference: true,
            cells: answers.columns.iter().map(|_| Some(full.clone())).collect(),
        },
    );
    let relative = build(
        "Recovered: answers relative to KVzip's at the same budget, percent",
        "Above 100 means better than the scores that the mapper was trained on.",
        cells().filter_map(|c| Some((c.method, c.ratio, c.of_kvzip?))),
        Best::Highest,
        points,
    );
    let of_full = build(
        "Answers relative to the full cache's, percent",
        "",
        cells().filter_map(|c| Some((c.method, c.ratio, c.of_full?))),
        Best::Highest,
        points,
    );
    let kl = build(
        "KL(full ‖ pruned) of the answer's tokens, nats per token",
        "Separates methods that answer equally well.",
        cells().map(|c| (c.method, c.ratio, c.kl)),
        Best::Lowest,
        thousandths,
    );
    let flips = build(
        "Answer tokens whose most likely token changes, percent",
        "",
        cells().map(|c| (c.method, c.ratio, c.flips)),
        Best::Lowest,
        points,
    );
    [answers, relative, of_full, kl, flips].into_iter().filter(|t| !t.rows.is_empty()).collect()
}

/// Scores of one task of a benchmark, for one policy.
pub fn benchmark(b: &BenchmarkResults, policy: Policy) -> Option<Table> {
    let cells = b.cells.iter().filter(|c| c.policy == policy);
    let cut = if b.cut > 0 { format!(" Of {} the middle was cut out.", b.cut) } else { String::new() };
    let mut table = build(
        &format!("{} {}, score in percent", b.suite, b.task),
        &format!(
            "{} questions about {} contexts of {:.0} tokens; policy {}. Small type: 95% interval over contexts.{cut}",
            b.questions,
            b.contexts,
            b.mean_context_tokens,
            policy.name()
        ),
        cells.map(|c| (c.method, c.ratio, c.score)),
        Best::Highest,
        points,
    );
    let full = Cell { value: points(b.full.mean), interval: interval(b.full, points), best: false };
    let cells = table.columns.iter().map(|_| Some(full.clone())).collect();
    let row = Row { name: "full cache".to_owned(), class: "m-full".to_owned(), reference: true, cells };
    (!table.rows.is_empty()).then(|| {
        table.rows.insert(0, row);
        table
    })
}

/// Recall of KVzip's kept set and the share of its score mass, for one policy.
pub fn labels(labels: &LabelResults, policy: Policy) -> Vec<Table> {
    let cells = || labels.cells.iter().filter(|c| c.policy == policy && c.method != Method::Kvzip);
    let recall = build(
        "Recall of the KV pairs that KVzip keeps, percent",
        &format!("{} contexts of the test split. Small type: 95% interval over contexts.", labels.contexts),
        cells().map(|c| (c.method, c.ratio, c.recall)),
        Best::Highest,
        points,
    );
    let mass = build(
        "Score mass kept relative to KVzip's, percent",
        "",
        cells().map(|c| (c.method, c.ratio, c.mass)),
        Best::Highest,
        points,
    );
    [recall, mass].into_iter().filter(|t| !t.rows.is_empty()).collect()
}

/// Rank correlations with KVzip's scores.
pub fn ranks(labels: &LabelResults) -> Option<Table> {
    let cells = labels.ranks.iter().filter(|r| r.method != Method::Kvzip);
    let best = |of: fn(&pkv_eval::RankCell) -> f64| {
        cells.clone().filter(|r| !method::is_oracle(r.method)).map(of).fold(f64::NEG_INFINITY, f64::max)
    };
    let (spearman, kendall) = (best(|r| r.spearman), best(|r| r.kendall));
    let cell = |value: f64, best: f64, oracle: bool| {
        Some(Cell {
            value: thousandths(value),
            interval: String::new(),
            best: !oracle && thousandths(value) == thousandths(best),
        })
    };
    let rows: Vec<Row> = cells
        .clone()
        .map(|r| {
            let oracle = method::is_oracle(r.method);
            Row {
                cells: vec![cell(r.spearman, spearman, oracle), cell(r.kendall, kendall, oracle)],
                ..row(r.method)
            }
        })
        .collect();
    (!rows.is_empty()).then(|| Table {
        caption: "Rank correlation with KVzip's scores".to_owned(),
        note: "Mean over (layer, KV head), then over contexts.".to_owned(),
        columns: vec!["Spearman".to_owned(), "Kendall τ-b".to_owned()],
        rows,
    })
}

/// Nats per token above the full cache, for one policy.
pub fn perplexity(results: &PerplexityResults, policy: Policy) -> Option<Table> {
    let cells = results.cells.iter().filter(|c| c.policy == policy);
    let table = build(
        "Likelihood lost on the continuation, nats per token above the full cache",
        &format!(
            "{} contexts, {} tokens of each continuation; {:.3} nats per token with the full cache.",
            results.contexts, results.continuation_tokens, results.full.mean
        ),
        cells.map(|c| (c.method, c.ratio, c.excess)),
        Best::Lowest,
        thousandths,
    );
    (!table.rows.is_empty()).then_some(table)
}

fn build(
    caption: &str,
    note: &str,
    cells: impl Iterator<Item = (Method, f64, Interval)>,
    best: Best,
    show: fn(f64) -> String,
) -> Table {
    let cells: Vec<_> = cells.collect();
    let mut ratios: Vec<f64> = cells.iter().map(|c| c.1).collect();
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios.dedup();
    let bests: Vec<Option<f64>> = ratios
        .iter()
        .map(|&ratio| {
            let rivals = cells.iter().filter(|c| c.1 == ratio && !method::is_oracle(c.0)).map(|c| c.2.mean);
            rivals.reduce(|a, b| if (best == Best::Highest) == (b > a) { b } else { a })
        })
        .collect();
    // References first, then the mapper, then its rivals.
    let order = Method::ALL.into_iter().filter(|&m| method::is_oracle(m));
    let order = order.chain(Method::ALL.into_iter().filter(|&m| !method::is_oracle(m)));
    let rows = order
        .filter(|&m| cells.iter().any(|c| c.0 == m))
        .map(|m| {
            let cell = |(i, &ratio): (usize, &f64)| {
                let (_, _, v) = cells.iter().find(|c| c.0 == m && c.1 == ratio)?;
                Some(Cell {
                    value: show(v.mean),
                    interval: interval(*v, show),
                    // What is shown equal is equally good.
                    best: !method::is_oracle(m) && bests[i].is_some_and(|b| show(b) == show(v.mean)),
                })
            };
            Row { cells: ratios.iter().enumerate().map(cell).collect(), ..row(m) }
        })
        .collect();
    let columns = ratios.iter().map(|&r| format!("{} kept", percent_text(r))).collect();
    Table { caption: caption.to_owned(), note: note.to_owned(), columns, rows }
}

fn row(m: Method) -> Row {
    Row {
        name: method::label(m).to_owned(),
        class: method::class(m),
        reference: method::is_oracle(m),
        cells: Vec::new(),
    }
}

fn interval(v: Interval, show: fn(f64) -> String) -> String {
    if v.high > v.low { format!("{}–{}", show(v.low), show(v.high)) } else { String::new() }
}

/// A share in percent, without its sign: the caption says it.
fn points(share: f64) -> String {
    percent(share).trim_end_matches('%').to_owned()
}

fn thousandths(v: f64) -> String {
    format!("{v:.3}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_sought_among_rivals_only_and_ties_share_it() {
        let at = |mean| Interval { mean, low: mean - 0.01, high: mean + 0.01 };
        let cells = [
            (Method::Kvzip, 0.05, at(0.98)),
            (Method::Mapper, 0.05, at(0.97)),
            (Method::Linear, 0.05, at(0.97004)),
            (Method::Random, 0.05, at(0.01)),
            (Method::Random, 0.1, at(0.02)),
        ];
        let table = build("c", "n", cells.into_iter(), Best::Highest, points);
        assert_eq!(table.columns, ["10% kept", "5% kept"]);
        let names: Vec<_> = table.rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["KVzip", "mapper", "ridge, linear", "random"]);
        let best: Vec<bool> = table.rows.iter().map(|r| r.cells[1].as_ref().unwrap().best).collect();
        assert_eq!(best, [false, true, true, false]);
        assert!(table.rows[0].cells[0].is_none());
        assert_eq!(table.rows[1].cells[1].as_ref().unwrap().interval, "96.0–98.0");
        let lowest = build("c", "n", cells.into_iter(), Best::Lowest, points);
        assert!(lowest.rows[3].cells[1].as_ref().unwrap().best);
    }
}
