//! Results as Markdown tables: rows are methods, columns retention ratios.
//!
//! Only text is made here; callers print it or write it to a file. Columns are padded, so that Markdown reads
//! well on a terminal too.

use pkv_core::Policy;
use pkv_recipe::MethodName;

use crate::results::{AnswerCell, AnswerResults, Interval, LabelCell, Results};

/// Every table that `results` has numbers for, each under a heading.
pub fn all_tables(results: &Results) -> String {
    let mut out = String::new();
    let mut add = |title: String, table: Option<String>| {
        if let Some(table) = table {
            out.push_str(&format!("### {title}\n\n{table}\n"));
        }
    };
    for policy in Policy::ALL {
        for (title, table) in results.facts.iter().flat_map(|f| answered(facts_title(f, policy), f, policy)) {
            add(title, table);
        }
        add(format!("Recall of KVzip's kept set, {} (%)", policy.name()), recall_table(results, policy));
    }
    add("What a policy costs: recall of what KVzip keeps under pair (%)".to_owned(), policy_table(results));
    add(
        "Correlation with KVzip's scores: of ranks by head, squared with their logarithm".to_owned(),
        rank_table(results),
    );
    for policy in Policy::ALL {
        add(
            format!("KL(full || pruned) of the answer tokens, {} (nats)", policy.name()),
            kl_table(results, policy),
        );
        add(
            format!("Continuation: nats per token above the full cache, {}", policy.name()),
            perplexity_table(results, policy),
        );
    }
    for policy in Policy::ALL {
        for suite in suites(results) {
            add(
                format!(
                    "{suite}, mean score of its tasks, {} (%, 95% interval from the tasks')",
                    policy.name()
                ),
                suite_table(results, suite, policy),
            );
        }
        for benchmark in &results.benchmarks {
            for (title, table) in answered(benchmark_title(benchmark, policy), benchmark, policy) {
                add(title, table);
            }
        }
    }
    let notes: Vec<String> =
        results.notes.iter().map(|n| format!("- `{}`: {}\n", n.method.name(), n.note)).collect();
    if !notes.is_empty() {
        out.push_str(&format!("{}\n", notes.concat()));
    }
    out
}

fn facts_title(facts: &AnswerResults, policy: Policy) -> String {
    format!(
        "Questions answered from the pruned cache, {} (% of {} questions in {} contexts, 95% interval)",
        policy.name(),
        facts.questions,
        facts.contexts
    )
}

/// A task's scores, and exact match and F1 where it has them, each under its title.
fn answered(title: String, task: &AnswerResults, policy: Policy) -> [(String, Option<String>); 3] {
    let of = |figure: &str| format!("{figure} of these answers, {} (%)", policy.name());
    let squad = |full: Option<Interval>, value: fn(&AnswerCell) -> Option<Interval>| {
        let cells = task.cells.iter().filter(|c| c.policy == policy);
        let shown = cells.filter_map(|c| Some((c.method, c.ratio, percent(value(c)?))));
        Grid::new(shown).render(full.map(|full| ("full cache", percent(full))))
    };
    [
        (title, scores_table(task, policy)),
        (of("Exact match"), squad(task.full_exact_match, |c| c.exact_match)),
        (of("Token F1"), squad(task.full_f1, |c| c.f1)),
    ]
}

/// Answers in percent with their intervals; the full cache in the first row. `None` without the task or
/// policy.
pub fn answers_table(results: &Results, policy: Policy) -> Option<String> {
    scores_table(results.facts.as_ref()?, policy)
}

/// The benchmarks that were asked, each once.
fn suites(results: &Results) -> Vec<&str> {
    let mut suites: Vec<&str> = results.benchmarks.iter().map(|b| b.suite.as_str()).collect();
    suites.dedup();
    suites
}

fn benchmark_title(b: &AnswerResults, policy: Policy) -> String {
    let cut =
        b.cut.filter(|&n| n > 0).map_or_else(String::new, |n| format!(", {n} of them cut in the middle"));
    format!(
        "{} {}, {} (score in %, {} questions in {} contexts of {:.0} tokens{cut}, 95% interval)",
        b.suite,
        b.task,
        policy.name(),
        b.questions,
        b.contexts,
        b.mean_context_tokens.unwrap_or_default()
    )
}

/// Scores of one task in percent with their intervals; the full cache in the first row. `None` without the
/// policy.
fn scores_table(task: &AnswerResults, policy: Policy) -> Option<String> {
    let cells = || task.cells.iter().filter(|c| c.policy == policy);
    let grid = Grid::new(cells().map(|c| (c.method, c.ratio, percent(c.score))));
    let table = grid.render(Some(("full cache", percent(task.full))));
    noted(table, cells().map(|c| (c.method, c.ratio, c.contexts)))
}

/// Mean scores in percent with their intervals, every task of a suite counting alike. `None` if it has one
/// task only, or without the policy.
pub fn suite_table(results: &Results, suite: &str, policy: Policy) -> Option<String> {
    let tasks: Vec<&AnswerResults> = results.benchmarks.iter().filter(|b| b.suite == suite).collect();
    let [first, _, ..] = tasks.as_slice() else { return None };
    let mean = |of: &dyn Fn(&AnswerResults) -> Option<Interval>| {
        let all: Option<Vec<Interval>> = tasks.iter().map(|b| of(b)).collect();
        all.as_deref().and_then(Interval::mean_of).map_or_else(|| "-".to_owned(), percent)
    };
    // What one task lacks has no mean.
    let shared = |c: &&AnswerCell| tasks.iter().all(|b| b.cell(c.method, policy, c.ratio).is_some());
    let cells = first.cells.iter().filter(|c| c.policy == policy).filter(shared).map(|c| {
        let score = |b: &AnswerResults| b.cell(c.method, policy, c.ratio).map(|c| c.score);
        (c.method, c.ratio, mean(&score))
    });
    Grid::new(cells).render(Some(("full cache", mean(&|b| Some(b.full)))))
}

/// Recall of KVzip's kept set in percent. `None` if the policy was not measured.
pub fn recall_table(results: &Results, policy: Policy) -> Option<String> {
    let cells = || results.labels.cells.iter().filter(|c| c.policy == policy);
    let recall = |c: &LabelCell| (c.method, c.ratio, format!("{:.1}", 100.0 * c.recall.mean));
    let table = Grid::new(cells().map(recall)).render(None);
    noted(table, cells().map(|c| (c.method, c.ratio, c.contexts)))
}

/// What KVzip's and the mapper's choices under each policy hold of what KVzip keeps where all pairs compete,
/// in percent. `None` where one policy was measured only, or an older version measured.
pub fn policy_table(results: &Results) -> Option<String> {
    let cells = &results.labels.cells;
    let mut ratios: Vec<f64> = cells.iter().map(|c| c.ratio).collect();
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios.dedup();
    let mut rows = Vec::new();
    for method in [MethodName::KVZIP, MethodName::MAPPER] {
        let of = |policy, ratio: &f64| results.labels.cell(method, policy, *ratio)?.recall_of_pair;
        let measured: Vec<Policy> =
            Policy::ALL.into_iter().filter(|p| ratios.iter().any(|r| of(*p, r).is_some())).collect();
        if measured.len() < 2 {
            continue;
        }
        rows.extend(measured.into_iter().map(|policy| {
            let value =
                |r| of(policy, r).map_or_else(|| "-".to_owned(), |i| format!("{:.1}", 100.0 * i.mean));
            let name = format!("{}, {}", method.name(), policy.name());
            std::iter::once(name).chain(ratios.iter().map(value)).collect()
        }));
    }
    let columns = ratios.iter().map(|r| format!("{}%", trimmed(100.0 * r)));
    let head: Vec<String> = std::iter::once("kept".to_owned()).chain(columns).collect();
    (!rows.is_empty()).then(|| markdown(&head, &rows))
}

/// KL(full || pruned) in nats per answer token. `None` without the task or policy.
pub fn kl_table(results: &Results, policy: Policy) -> Option<String> {
    let cells = results.facts.as_ref()?.cells.iter().filter(|c| c.policy == policy);
    Grid::new(cells.map(|c| (c.method, c.ratio, format!("{:.3}", c.kl.mean)))).render(None)
}

/// Nats per continuation token above the full cache's. `None` without the task or policy.
pub fn perplexity_table(results: &Results, policy: Policy) -> Option<String> {
    let perplexity = results.perplexity.as_ref()?;
    let cells = || perplexity.cells.iter().filter(|c| c.policy == policy);
    let table =
        Grid::new(cells().map(|c| (c.method, c.ratio, format!("{:+.3}", c.excess.mean)))).render(None);
    noted(table, cells().map(|c| (c.method, c.ratio, c.contexts)))
}

/// Spearman's and Kendall's coefficients, and the squared correlation with log scores. `None` if no method
/// was measured.
pub fn rank_table(results: &Results) -> Option<String> {
    let ranks = &results.labels.ranks;
    let head = ["method", "Spearman", "Kendall tau-b", "r2 to log scores"].map(str::to_owned).to_vec();
    let rows = ranks.iter().map(|r| {
        let log_r2 = r.log_r2.map_or_else(|| "-".to_owned(), |r2| format!("{r2:.3}"));
        vec![r.method.name().to_owned(), format!("{:.3}", r.spearman), format!("{:.3}", r.kendall), log_r2]
    });
    (!ranks.is_empty()).then(|| markdown(&head, &rows.collect::<Vec<_>>()))
}

/// What a table does not show: the methods that were measured on fewer contexts than others, each with its
/// ratios and contexts. `None` where all were measured on all.
pub fn fewer_contexts(cells: impl Iterator<Item = (MethodName, f64, Option<usize>)>) -> Option<String> {
    let mut found: Vec<(MethodName, usize, Vec<String>)> = Vec::new();
    for (method, ratio, contexts) in cells {
        let Some(contexts) = contexts else { continue };
        let ratio = format!("{}%", trimmed(100.0 * ratio));
        match found.iter_mut().find(|f| (f.0, f.1) == (method, contexts)) {
            Some(f) => f.2.push(ratio),
            None => found.push((method, contexts, vec![ratio])),
        }
    }
    let one = |(method, contexts, ratios): &(MethodName, usize, Vec<String>)| {
        format!("{method} on {contexts} (at {} kept)", ratios.join(", "))
    };
    (!found.is_empty())
        .then(|| format!("Fewer contexts: {}.", found.iter().map(one).collect::<Vec<_>>().join("; ")))
}

/// A table with the sentence of [`fewer_contexts`] below it.
fn noted(
    table: Option<String>,
    cells: impl Iterator<Item = (MethodName, f64, Option<usize>)>,
) -> Option<String> {
    let note = fewer_contexts(cells).map(|note| format!("\n{note}\n"));
    table.map(|table| table + &note.unwrap_or_default())
}

/// Cells by method, in the order of first sight, and ratio, from the most kept to the least.
struct Grid {
    methods: Vec<MethodName>,
    ratios: Vec<f64>,
    cells: Vec<(MethodName, f64, String)>,
}

impl Grid {
    fn new(cells: impl Iterator<Item = (MethodName, f64, String)>) -> Self {
        let cells: Vec<_> = cells.collect();
        let (mut methods, mut ratios) = (Vec::new(), Vec::new());
        for (method, ratio, _) in &cells {
            if !methods.contains(method) {
                methods.push(*method);
            }
            if !ratios.contains(ratio) {
                ratios.push(*ratio);
            }
        }
        ratios.sort_by(|a, b| b.total_cmp(a));
        Self { methods, ratios, cells }
    }

    /// `first` is a row whose one value holds at every ratio.
    fn render(&self, first: Option<(&str, String)>) -> Option<String> {
        if self.cells.is_empty() {
            return None;
        }
        let ratios = self.ratios.iter().map(|r| format!("{}%", trimmed(100.0 * r)));
        let head: Vec<String> = std::iter::once("kept".to_owned()).chain(ratios).collect();
        let constant = first.map(|(name, value)| {
            std::iter::once(name.to_owned()).chain(self.ratios.iter().map(|_| value.clone())).collect()
        });
        let rows = self.methods.iter().map(|method| {
            let value = |ratio: &f64| {
                let cell = self.cells.iter().find(|(m, r, _)| (m, r) == (method, ratio));
                cell.map_or_else(|| "-".to_owned(), |(_, _, text)| text.clone())
            };
            std::iter::once(method.name().to_owned()).chain(self.ratios.iter().map(value)).collect()
        });
        Some(markdown(&head, &constant.into_iter().chain(rows).collect::<Vec<Vec<String>>>()))
    }
}

/// `97.9 (96-99)`; the interval is left out where there is none.
pub(crate) fn percent(i: Interval) -> String {
    let (mean, low, high) = (100.0 * i.mean, 100.0 * i.low, 100.0 * i.high);
    if low == high { format!("{mean:.1}") } else { format!("{mean:.1} ({low:.0}-{high:.0})") }
}

/// At most three decimals, no trailing zeros.
pub(crate) fn trimmed(x: f64) -> String {
    format!("{x:.3}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A Markdown table; the first column to the left, the others to the right, padded to equal width.
pub(crate) fn markdown(head: &[String], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|i| rows.iter().chain([&head.to_vec()]).map(|r| r[i].chars().count()).max().unwrap_or(0).max(3))
        .collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, &w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") })
            .collect();
        format!("| {} |\n", padded.join(" | "))
    };
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(i, &w)| if i == 0 { "-".repeat(w) } else { format!("{}:", "-".repeat(w - 1)) })
        .collect();
    std::iter::once(line(head)).chain([line(&rule)]).chain(rows.iter().map(|r| line(r))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_rows_and_ratios_are_columns() {
        let cells = [
            (MethodName::MAPPER, 0.05, "97.5".to_owned()),
            (MethodName::MAPPER, 0.005, "40.0".to_owned()),
            (MethodName::HEAD_PRIOR, 0.05, "87.3 (84-90)".to_owned()),
        ];
        let text = Grid::new(cells.into_iter()).render(Some(("full cache", "100.0".to_owned()))).unwrap();
        let expected = "\
| kept       |           5% |  0.5% |
| ---------- | -----------: | ----: |
| full cache |        100.0 | 100.0 |
| mapper     |         97.5 |  40.0 |
| head-prior | 87.3 (84-90) |     - |
";
        assert_eq!(text, expected);
        assert!(Grid::new(std::iter::empty()).render(None).is_none());
    }

    #[test]
    fn fewer_contexts_are_named_by_method_and_ratio() {
        let cells = [
            (MethodName::MAPPER, 0.05, None),
            (MethodName::RANDOM, 0.05, Some(3)),
            (MethodName::RANDOM, 0.005, Some(3)),
            (MethodName::RANDOM, 0.2, Some(1)),
        ];
        let note = fewer_contexts(cells.into_iter()).unwrap();
        assert_eq!(note, "Fewer contexts: random on 3 (at 5%, 0.5% kept); random on 1 (at 20% kept).");
        assert!(fewer_contexts(cells[..1].iter().copied()).is_none());
    }

    #[test]
    fn percentages_show_their_interval_where_there_is_one() {
        assert_eq!(percent(Interval { mean: 0.9755, low: 0.951, high: 0.99 }), "97.5 (95-99)");
        assert_eq!(percent(Interval::exact(1.0)), "100.0");
        assert_eq!(
            (trimmed(5.0), trimmed(0.5), trimmed(12.5), trimmed(3.125)),
            ("5".into(), "0.5".into(), "12.5".into(), "3.125".into())
        );
    }
}
