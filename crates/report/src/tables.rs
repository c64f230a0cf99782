//! Tables of an evaluation: methods down, retention ratios across, the best in bold.

use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::{AnswerResults, Interval, LabelResults, PerplexityResults};
use serde::Serialize;

use crate::chart::percent_text;
use crate::figures::percent;
use crate::method::Methods;

/// One table, ready for the template.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    pub caption: String,
    /// Explanation, in a sentence or two.
    pub note: String,
    pub columns: Vec<String>,
    /// Small type under each column's name; empty for none.
    pub under: Vec<String>,
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
pub fn facts(methods: Methods, facts: &AnswerResults, policy: Policy) -> Vec<Table> {
    let cells = || facts.cells.iter().filter(|c| c.policy == policy);
    let answers = scores(
        methods,
        facts,
        policy,
        "Questions answered, percent",
        format!(
            "{} questions about {} contexts, asked after pruning. Small type: 95% interval over contexts.",
            facts.questions, facts.contexts
        ),
    );
    let [exact, f1] = squads(
        methods,
        facts,
        policy,
        [
            (
                "Exact match, percent",
                "Answers that are the wanted one once lower-cased, without punctuation and articles, as SQuAD compares them.",
            ),
            ("Token F1, percent", "F1 of the words of answer and wanted answer, as SQuAD measures it."),
        ],
    );
    let relative = build(
        methods,
        "Recovered: answers relative to KVzip's at the same budget, percent",
        "Above 100 means better than the scores that the mapper was trained on. Blank where KVzip itself may answer less \
         than 20% (its interval reaches below).",
        cells().filter_map(|c| Some((c.method, c.ratio, facts.recovered(c)?))),
        Best::Highest,
        points,
    );
    let of_full = build(
        methods,
        "Answers relative to the full cache's, percent",
        "",
        cells().filter_map(|c| Some((c.method, c.ratio, c.of_full?))),
        Best::Highest,
        points,
    );
    let kl = build(
        methods,
        "KL(full ‖ pruned) of the answer's tokens, nats per token",
        "Separates methods that answer equally well.",
        cells().map(|c| (c.method, c.ratio, c.kl)),
        Best::Lowest,
        thousandths,
    );
    let flips = build(
        methods,
        "Answer tokens whose most likely token changes, percent",
        "",
        cells().map(|c| (c.method, c.ratio, c.flips)),
        Best::Lowest,
        points,
    );
    [answers, relative, of_full, exact, f1, kl, flips].into_iter().filter(|t| !t.rows.is_empty()).collect()
}

/// Scores of a task, the full cache's in the first row.
fn scores(methods: Methods, task: &AnswerResults, policy: Policy, caption: &str, note: String) -> Table {
    let cells = || task.cells.iter().filter(|c| c.policy == policy);
    let note = noted(note, cells().map(|c| (c.method, c.ratio, c.contexts)));
    shares(methods, caption, &note, cells().map(|c| (c.method, c.ratio, c.score)), Some(task.full))
}

/// Exact match and F1 of a task, each with its caption and note.
fn squads(
    methods: Methods,
    task: &AnswerResults,
    policy: Policy,
    [exact, f1]: [(&str, &str); 2],
) -> [Table; 2] {
    let cells = || task.cells.iter().filter(|c| c.policy == policy);
    let exact_match = cells().filter_map(|c| Some((c.method, c.ratio, c.exact_match?)));
    let token_f1 = cells().filter_map(|c| Some((c.method, c.ratio, c.f1?)));
    [
        shares(methods, exact.0, exact.1, exact_match, task.full_exact_match),
        shares(methods, f1.0, f1.1, token_f1, task.full_f1),
    ]
}

/// A table of shares whose first row, if it has any, is the full cache's.
fn shares(
    methods: Methods,
    caption: &str,
    note: &str,
    cells: impl Iterator<Item = (MethodName, f64, Interval)>,
    full: Option<Interval>,
) -> Table {
    let mut table = build(methods, caption, note, cells, Best::Highest, points);
    if let Some(full) = full.filter(|_| !table.rows.is_empty()) {
        add_full(&mut table, full);
    }
    table
}

/// The full cache's share in the first row.
fn add_full(table: &mut Table, full: Interval) {
    let cell = Cell { value: points(full.mean), interval: interval(full, points), best: false };
    let cells = table.columns.iter().map(|_| Some(cell.clone())).collect();
    let row = Row { name: "full cache".to_owned(), class: "full".to_owned(), reference: true, cells };
    table.rows.insert(0, row);
}

/// Paired difference of the mapper from each other method.
pub fn lead(methods: Methods, cells: &[(MethodName, f64, Interval)]) -> Option<Table> {
    let mut table = build(
        methods,
        "The mapper's answers minus those of each method, points",
        "Small type: 95% interval of a paired bootstrap, which draws both methods' answers to the same contexts. Bold: the \
         interval excludes 0.",
        cells.iter().copied(),
        Best::Highest,
        signed_points,
    );
    for row in &mut table.rows {
        for (cell, column) in row.cells.iter_mut().zip(&table.columns) {
            let of = |c: &&(MethodName, f64, Interval)| {
                c.0.name() == row.name && format!("{} kept", percent_text(c.1)) == *column
            };
            if let (Some(cell), Some((_, _, v))) = (cell.as_mut(), cells.iter().find(of)) {
                cell.best = excludes_zero(*v);
                cell.interval = range(*v, signed_points);
            }
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

/// Tasks across, methods down, at the share kept that tells most; `None` unless there are several tasks.
pub fn by_task(methods: Methods, benchmarks: &[AnswerResults]) -> Option<Table> {
    across_tasks(methods, benchmarks, "score in percent", "", |b, c| Some((c.score, Some(b.full))))
}

/// The same relative to KVzip's score.
pub fn by_task_recovered(methods: Methods, benchmarks: &[AnswerResults]) -> Option<Table> {
    across_tasks(
        methods,
        benchmarks,
        "recovered: score relative to KVzip's, percent",
        "Above 100 means better than the scores that the mapper was trained on.",
        |b, c| Some((b.recovered(c)?, None)),
    )
}

fn across_tasks(
    methods: Methods,
    benchmarks: &[AnswerResults],
    what: &str,
    note: &str,
    value: impl Fn(&AnswerResults, &pkv_results::AnswerCell) -> Option<(Interval, Option<Interval>)>,
) -> Option<Table> {
    let [first, _, ..] = benchmarks else { return None };
    let policy = first.cells.first()?.policy;
    let everywhere =
        |r: &f64| benchmarks.iter().all(|b| b.cells.iter().any(|c| (c.policy, c.ratio) == (policy, *r)));
    let ratios = first.cells.iter().filter(|c| c.policy == policy).map(|c| c.ratio).filter(everywhere);
    let ratio = ratios.min_by(|a, b| (a / 0.05).ln().abs().total_cmp(&(b / 0.05).ln().abs()))?;
    let of = |b: &AnswerResults, m| value(b, b.cell(m, policy, ratio)?);
    let occurring = methods.oracles_first(benchmarks.iter().flat_map(|b| &b.cells).map(|c| c.method));
    let mean = |values: &[Option<Interval>]| -> Option<Interval> {
        Interval::mean_of(&values.iter().copied().collect::<Option<Vec<_>>>()?)
    };
    let bests: Vec<Option<f64>> = benchmarks
        .iter()
        .map(|b| {
            let rivals = occurring.iter().filter(|m| !methods.is_oracle(**m));
            rivals.filter_map(|&m| Some(of(b, m)?.0.mean)).reduce(f64::max)
        })
        .collect();
    let plain = |v: Interval| Cell { value: points(v.mean), interval: interval(v, points), best: false };
    let cells = |m: MethodName| -> Vec<Option<Cell>> {
        let values: Vec<Option<Interval>> = benchmarks.iter().map(|b| Some(of(b, m)?.0)).collect();
        let shown = values.iter().zip(&bests).map(|(v, best)| {
            let v = (*v)?;
            let best = !methods.is_oracle(m) && best.is_some_and(|b| points(b) == points(v.mean));
            Some(Cell { value: points(v.mean), interval: interval(v, points), best })
        });
        shown.chain([mean(&values).map(plain)]).collect()
    };
    let measured = occurring.iter().copied().filter(|&m| benchmarks.iter().any(|b| of(b, m).is_some()));
    let mut rows: Vec<Row> = measured.map(|m| Row { cells: cells(m), ..row(methods, m) }).collect();
    let full: Vec<Option<Interval>> = benchmarks.iter().map(|b| of(b, MethodName::MAPPER)?.1).collect();
    if full.iter().all(Option::is_some) {
        let cells = full.iter().copied().chain([mean(&full)]).map(|v| v.map(plain)).collect();
        rows.insert(
            0,
            Row { name: "full cache".to_owned(), class: "full".to_owned(), reference: true, cells },
        );
    }
    let columns = benchmarks.iter().map(|b| format!("{} {}", b.suite, b.task)).chain(["mean".to_owned()]);
    (!rows.is_empty()).then(|| Table {
        caption: format!("All tasks at {} kept, {what}", percent_text(ratio)),
        note: format!("Policy {}. Every task counts alike in the mean. {note}", policy.name()),
        columns: columns.collect(),
        rows,
        ..Table::default()
    })
}

/// Scores of one task of a benchmark, for one policy; exact match and F1 where short answers are wanted.
pub fn benchmark(methods: Methods, b: &AnswerResults, policy: Policy) -> Vec<Table> {
    let cut =
        b.cut.filter(|&n| n > 0).map_or_else(String::new, |n| format!(" Of {n} the middle was cut out."));
    let table = scores(
        methods,
        b,
        policy,
        &format!("{} {}, score in percent", b.suite, b.task),
        format!(
            "{} questions about {} contexts of {:.0} tokens; policy {}. Small type: 95% interval over contexts.{cut}",
            b.questions,
            b.contexts,
            b.mean_context_tokens.unwrap_or_default(),
            policy.name()
        ),
    );
    let exact = format!("{} {}, exact match in percent", b.suite, b.task);
    let f1 = format!("{} {}, token F1 in percent", b.suite, b.task);
    let [exact, f1] = squads(methods, b, policy, [(&exact, ""), (&f1, "")]);
    [table, exact, f1].into_iter().filter(|t| !t.rows.is_empty()).collect()
}

/// Recall of KVzip's kept set and the share of its score mass, for one policy.
pub fn labels(methods: Methods, labels: &LabelResults, policy: Policy) -> Vec<Table> {
    let cells = || labels.cells.iter().filter(|c| c.policy == policy && c.method != MethodName::KVZIP);
    let recall = build(
        methods,
        "Recall of the KV pairs that KVzip keeps, percent",
        &noted(
            format!(
                "{} contexts of the test split. Small type: 95% interval over contexts.",
                labels.contexts
            ),
            cells().map(|c| (c.method, c.ratio, c.contexts)),
        ),
        cells().map(|c| (c.method, c.ratio, c.recall)),
        Best::Highest,
        points,
    );
    let mass = build(
        methods,
        "Score mass kept relative to KVzip's, percent",
        "",
        cells().map(|c| (c.method, c.ratio, c.mass)),
        Best::Highest,
        points,
    );
    let competing = labels.cells.iter().filter(|c| c.policy == policy && policy != Policy::Pair);
    let of_pair = build(
        methods,
        "Recall of the KV pairs that KVzip keeps where all compete (policy pair), percent",
        "KVzip's own row is what the policy costs without any error of prediction.",
        competing.filter_map(|c| Some((c.method, c.ratio, c.recall_of_pair?))),
        Best::Highest,
        points,
    );
    [recall, mass, of_pair].into_iter().filter(|t| !t.rows.is_empty()).collect()
}

/// Correlations with KVzip's scores.
pub fn ranks(methods: Methods, labels: &LabelResults) -> Option<Table> {
    let cells = labels.ranks.iter().filter(|r| r.method != MethodName::KVZIP);
    let best = |of: fn(&pkv_results::RankCell) -> f64| {
        cells.clone().filter(|r| !methods.is_oracle(r.method)).map(of).fold(f64::NEG_INFINITY, f64::max)
    };
    let (spearman, kendall) = (best(|r| r.spearman), best(|r| r.kendall));
    let log_r2 = best(|r| r.log_r2.unwrap_or(f64::NEG_INFINITY));
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
            let oracle = methods.is_oracle(r.method);
            Row {
                cells: vec![
                    cell(r.spearman, spearman, oracle),
                    cell(r.kendall, kendall, oracle),
                    r.log_r2.and_then(|r2| cell(r2, log_r2, oracle)),
                ],
                ..row(methods, r.method)
            }
        })
        .collect();
    (!rows.is_empty()).then(|| Table {
        caption: "Correlation with KVzip's scores".to_owned(),
        note: "Of ranks: mean over (layer, KV head), then over contexts. r² to log scores: squared Pearson correlation of the \
               predictions, as each method gives them, with the logarithm of KVzip's scores, all KV pairs of a context together \
               (KVzap's figure)."
            .to_owned(),
        columns: vec!["Spearman".to_owned(), "Kendall τ-b".to_owned(), "r² to log scores".to_owned()],
        rows,
        ..Table::default()
    })
}

/// Nats per token above the full cache, for one policy.
pub fn perplexity(methods: Methods, results: &PerplexityResults, policy: Policy) -> Option<Table> {
    let cells = || results.cells.iter().filter(|c| c.policy == policy);
    let table = build(
        methods,
        "Likelihood lost on the continuation, nats per token above the full cache",
        &noted(
            format!(
                "{} contexts, {} tokens of each continuation; {:.3} nats per token with the full cache.",
                results.contexts, results.continuation_tokens, results.full.mean
            ),
            cells().map(|c| (c.method, c.ratio, c.contexts)),
        ),
        cells().map(|c| (c.method, c.ratio, c.excess)),
        Best::Lowest,
        thousandths,
    );
    (!table.rows.is_empty()).then_some(table)
}

/// `note`, and which methods were measured on fewer contexts.
fn noted(note: String, cells: impl Iterator<Item = (MethodName, f64, Option<usize>)>) -> String {
    match pkv_results::table::fewer_contexts(cells) {
        Some(fewer) => format!("{note} {fewer}"),
        None => note,
    }
}

fn build(
    methods: Methods,
    caption: &str,
    note: &str,
    cells: impl Iterator<Item = (MethodName, f64, Interval)>,
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
            let rivals = cells.iter().filter(|c| c.1 == ratio && !methods.is_oracle(c.0)).map(|c| c.2.mean);
            rivals.reduce(|a, b| if (best == Best::Highest) == (b > a) { b } else { a })
        })
        .collect();
    // References first, then the mapper, then its rivals.
    let rows = methods
        .oracles_first(cells.iter().map(|c| c.0))
        .into_iter()
        .map(|m| {
            let cell = |(i, &ratio): (usize, &f64)| {
                let (_, _, v) = cells.iter().find(|c| c.0 == m && c.1 == ratio)?;
                Some(Cell {
                    value: show(v.mean),
                    interval: interval(*v, show),
                    // What is shown equal is equally good.
                    best: !methods.is_oracle(m) && bests[i].is_some_and(|b| show(b) == show(v.mean)),
                })
            };
            Row { cells: ratios.iter().enumerate().map(cell).collect(), ..row(methods, m) }
        })
        .collect();
    let columns = ratios.iter().map(|&r| format!("{} kept", percent_text(r))).collect();
    Table { caption: caption.to_owned(), note: note.to_owned(), columns, rows, ..Table::default() }
}

fn row(methods: Methods, m: MethodName) -> Row {
    Row {
        name: m.name().to_owned(),
        class: methods.class(m),
        reference: methods.is_oracle(m),
        cells: Vec::new(),
    }
}

pub fn interval(v: Interval, show: fn(f64) -> String) -> String {
    if v.high > v.low { format!("{}–{}", show(v.low), show(v.high)) } else { String::new() }
}

/// A share in percent, without its sign: the caption says it.
pub fn points(share: f64) -> String {
    percent(share).trim_end_matches('%').to_owned()
}

/// A difference of shares in points.
pub fn signed_points(share: f64) -> String {
    format!("{:+.1}", 100.0 * share)
}

/// Whether a difference is one beyond its interval.
pub fn excludes_zero(v: Interval) -> bool {
    v.low > 0.0 || v.high < 0.0
}

/// `-2.3 to -0.1`: a dash between signed numbers reads as a sign.
pub fn range(v: Interval, show: fn(f64) -> String) -> String {
    if v.high > v.low { format!("{} to {}", show(v.low), show(v.high)) } else { String::new() }
}

pub fn thousandths(v: f64) -> String {
    format!("{v:.3}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;

    #[test]
    fn the_best_is_sought_among_rivals_only_and_ties_share_it() {
        let at = |mean| Interval { mean, low: mean - 0.01, high: mean + 0.01 };
        let cells = [
            (MethodName::KVZIP, 0.05, at(0.98)),
            (MethodName::MAPPER, 0.05, at(0.97)),
            (MethodName::LINEAR, 0.05, at(0.97004)),
            (MethodName::RANDOM, 0.05, at(0.01)),
            (MethodName::RANDOM, 0.1, at(0.02)),
        ];
        let table = build(METHODS, "c", "n", cells.into_iter(), Best::Highest, points);
        assert_eq!(table.columns, ["10% kept", "5% kept"]);
        let names: Vec<_> = table.rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["kvzip", "mapper", "linear", "random"]);
        let best: Vec<bool> = table.rows.iter().map(|r| r.cells[1].as_ref().unwrap().best).collect();
        assert_eq!(best, [false, true, true, false]);
        assert!(table.rows[0].cells[0].is_none());
        assert_eq!(table.rows[1].cells[1].as_ref().unwrap().interval, "96.0–98.0");
        let lowest = build(METHODS, "c", "n", cells.into_iter(), Best::Lowest, points);
        assert!(lowest.rows[3].cells[1].as_ref().unwrap().best);
    }

    fn cells(table: &Table, name: &str) -> Vec<(String, bool)> {
        let row = table.rows.iter().find(|r| r.name == name).unwrap();
        row.cells
            .iter()
            .map(|c| c.as_ref().map_or(("-".into(), false), |c| (c.value.clone(), c.best)))
            .collect()
    }

    #[test]
    fn leads_are_signed_and_bold_where_they_are_clear() {
        let at = |mean, half| Interval { mean, low: mean - half, high: mean + half };
        let table = lead(
            METHODS,
            &[
                (MethodName::KVZIP, 0.1, at(-0.05, 0.01)),
                (MethodName::KVZIP, 0.05, at(0.02, 0.03)),
                (MethodName::RANDOM, 0.05, at(0.9, 0.05)),
            ],
        )
        .unwrap();
        assert_eq!(cells(&table, "kvzip"), [("-5.0".to_owned(), true), ("+2.0".to_owned(), false)]);
        assert_eq!(cells(&table, "random"), [("-".to_owned(), false), ("+90.0".to_owned(), true)]);
        assert_eq!(table.rows[0].cells[1].as_ref().unwrap().interval, "-1.0 to +5.0");
        assert!(lead(METHODS, &[]).is_none());
    }

    #[test]
    fn tasks_stand_side_by_side_with_their_mean() {
        let cell = |method, score: f64| pkv_results::AnswerCell {
            contexts: None,
            method,
            policy: Policy::Pair,
            ratio: 0.05,
            score: Interval::exact(score),
            exact_match: None,
            f1: None,
            kl: Interval::exact(0.0),
            flips: Interval::exact(0.0),
            of_kvzip: (method != MethodName::RANDOM).then_some(Interval::exact(score / 0.8)),
            of_full: None,
        };
        let task = |task: &str, mapper: f64| AnswerResults {
            made: Default::default(),
            suite: "ruler".to_owned(),
            task: task.to_owned(),
            contexts: 5,
            questions: 5,
            answer_match: None,
            mean_context_tokens: Some(100.0),
            cut: Some(0),
            full: Interval::exact(1.0),
            full_exact_match: None,
            full_f1: None,
            cells: vec![
                cell(MethodName::KVZIP, 0.8),
                cell(MethodName::MAPPER, mapper),
                cell(MethodName::RANDOM, 0.5),
            ],
        };
        let two = [task("vt", 0.6), task("cwe", 0.4)];
        let table = by_task(METHODS, &two).unwrap();
        assert_eq!(table.columns, ["ruler vt", "ruler cwe", "mean"]);
        let values = |name| cells(&table, name).into_iter().map(|c| c.0).collect::<Vec<_>>();
        assert_eq!(values("full cache"), ["100", "100", "100"]);
        assert_eq!(values("kvzip"), ["80.0", "80.0", "80.0"]);
        assert_eq!(values("mapper"), ["60.0", "40.0", "50.0"]);
        assert_eq!(cells(&table, "random")[1], ("50.0".to_owned(), true), "the best of the second task");
        assert!(!cells(&table, "kvzip")[0].1 && cells(&table, "mapper")[0].1);
        let recovered = by_task_recovered(METHODS, &two).unwrap();
        assert_eq!(cells(&recovered, "mapper")[2].0, "62.5");
        assert!(recovered.rows.iter().all(|r| r.name != "random" && r.name != "full cache"));
        assert!(by_task(METHODS, &two[..1]).is_none());
    }
}
