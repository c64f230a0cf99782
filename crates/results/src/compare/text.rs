//! A comparison as Markdown tables for a terminal: rows are runs, columns retention ratios.

use pkv_recipe::MethodName;
use serde_json::Value;

use super::{Comparison, Metric, ONE_RATIO};
use crate::results::Interval;
use crate::table::{markdown, percent, trimmed};

/// Longest value of a recipe's key that is printed.
const MAX_VALUE: usize = 48;
/// Widest table.
const WIDTH: usize = 120;

/// Every table, each under a heading, then what a reader must know.
pub fn text(c: &Comparison) -> String {
    let mut out = format!(
        "{} runs for `{}`: the mapper of each, policy `{}`\n\n",
        c.runs.len(),
        c.target,
        c.policy.name()
    );
    if let Some(verdict) = verdict(c) {
        out.push_str(&format!("{verdict}\n\n"));
    }
    let mut left_out = false;
    let mut add = |title: &str, table: Option<(String, bool)>| {
        if let Some((table, is_cut)) = table {
            left_out |= is_cut;
            out.push_str(&format!("### {title}\n\n{table}\n"));
        }
    };
    let whole = |table: String| (table, false);
    let first = &c.runs[0].name;
    let tasks: Vec<&str> = c.tasks.iter().map(|t| t.task.as_str()).collect();
    let over = match tasks.as_slice() {
        [one] => (*one).to_owned(),
        several => format!("mean of {} tasks", several.len()),
    };
    add(
        &format!("Answers from the pruned cache, {over} (%, 95% interval)"),
        c.answers.as_ref().map(|m| values(c, m, one_ratio(c))),
    );
    add("Recovered accuracy (KVzip = 100, 95% interval)", c.recovered.as_ref().map(|m| values(c, m, None)));
    add("Recall of KVzip's kept set (%, 95% interval)", c.recall.as_ref().map(|m| values(c, m, None)));
    let paired =
        "points, 95% interval of a paired bootstrap over the contexts that both answered; * excludes 0";
    add(
        &format!("Answers minus those of `{first}` ({paired})"),
        c.answers.as_ref().and_then(|m| differences(c, m)),
    );
    add(
        &format!("Recall minus that of `{first}` ({paired})"),
        c.recall.as_ref().and_then(|m| differences(c, m)),
    );
    if let (Some(at), 2..) = (one_ratio(c), c.tasks.len()) {
        add(&format!("Answers by task at {}% kept (%, 95% interval)", kept(at)), Some(whole(by_task(c, at))));
    }
    if let Some(b) = &c.budgets {
        let title = format!(
            "Share of each layer's KV pairs kept at {}% of all, policy `{}` (%)",
            kept(b.ratio),
            b.policy.name()
        );
        add(&title, Some(whole(budgets(c))));
    }
    add("What differs between the recipes", recipe(c).map(whole));
    if left_out {
        out.push_str("- Shares kept for which these tables have no room are in `--json` and `--out`.\n");
    }
    for note in &c.notes {
        out.push_str(&format!("- {note}\n"));
    }
    out
}

fn kept(ratio: f64) -> String {
    trimmed(100.0 * ratio)
}

/// The ratio of tables that show one.
pub fn one_ratio(c: &Comparison) -> Option<f64> {
    let distance = |r: &&f64| (*r / ONE_RATIO).ln().abs();
    let ratios = &c.answers.as_ref()?.ratios;
    ratios.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).copied()
}

/// Places of the shares kept that a table has room for: all, or those nearest to [`ONE_RATIO`].
fn fitting(m: &Metric, table: impl Fn(&[usize]) -> String) -> (String, bool) {
    let distance = |at: usize| (m.ratios[at] / ONE_RATIO).ln().abs();
    let mut columns: Vec<usize> = (0..m.ratios.len()).collect();
    loop {
        let text = table(&columns);
        let width = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        let furthest =
            (0..columns.len()).max_by(|&a, &b| distance(columns[a]).total_cmp(&distance(columns[b])));
        match furthest.filter(|_| width > WIDTH && columns.len() > 1) {
            Some(furthest) => drop(columns.remove(furthest)),
            None => return (text, columns.len() < m.ratios.len()),
        }
    }
}

fn head(m: &Metric, columns: &[usize], before: &[String]) -> Vec<String> {
    before.iter().cloned().chain(columns.iter().map(|&at| format!("{}%", kept(m.ratios[at])))).collect()
}

/// Each run's own numbers; with `ranked`, its place among the runs there.
fn values(c: &Comparison, m: &Metric, ranked: Option<f64>) -> (String, bool) {
    let ranked = ranked.and_then(|ratio| Some((ratio, m.ratios.iter().position(|r| *r == ratio)?)));
    let mut first = vec!["run".to_owned(), "contexts".to_owned()];
    first.extend(ranked.map(|(ratio, _)| format!("rank at {}%", kept(ratio))));
    // As it is printed: what looks the same has one rank.
    let shown = |values: &[Interval], at: usize| (1000.0 * values[at].mean).round();
    let rank = |values: &[Interval], at: usize| {
        1 + m.runs.iter().filter(|r| shown(r, at) > shown(values, at)).count()
    };
    fitting(m, |columns| {
        let row = |name: &str, contexts: usize, place: Option<String>, values: &[Interval]| {
            let cells = columns.iter().map(|&at| percent(values[at]));
            [name.to_owned(), contexts.to_string()].into_iter().chain(place).chain(cells).collect::<Vec<_>>()
        };
        let none = || ranked.map(|_| "-".to_owned());
        let references = m.references.iter().map(|r| row(&r.name, m.contexts[0], none(), &r.values));
        let runs = c.runs.iter().zip(&m.runs).zip(&m.contexts);
        let runs = runs.map(|((run, values), &n)| {
            row(&run.name, n, ranked.map(|(_, at)| rank(values, at).to_string()), values)
        });
        markdown(&head(m, columns, &first), &references.chain(runs).collect::<Vec<_>>())
    })
}

fn differences(c: &Comparison, m: &Metric) -> Option<(String, bool)> {
    let first = ["run".to_owned(), "shared contexts".to_owned()];
    (!m.differences.is_empty()).then(|| {
        fitting(m, |columns| {
            let row = |d: &super::Difference| {
                let contexts = format!("{} of {}", d.contexts, m.contexts[d.run].max(m.contexts[0]));
                let values =
                    columns.iter().map(|&at| d.values.get(at).map_or_else(|| "-".to_owned(), |v| points(*v)));
                [c.runs[d.run].name.clone(), contexts].into_iter().chain(values).collect::<Vec<_>>()
            };
            markdown(&head(m, columns, &first), &m.differences.iter().map(row).collect::<Vec<_>>())
        })
    })
}

/// Every later run against the first, where methods begin to part, as a sentence.
pub fn verdict(c: &Comparison) -> Option<String> {
    let (m, what) = match (&c.answers, &c.recall) {
        (Some(m), _) if !m.differences.is_empty() => (m, "questions answered"),
        (_, Some(m)) => (m, "recall of KVzip's choice"),
        _ => return None,
    };
    let distance = |at: &usize| (m.ratios[*at] / ONE_RATIO).ln().abs();
    let at = (0..m.ratios.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
    let signed = |v: f64| format!("{:+.1}", 100.0 * v);
    let one = |d: &super::Difference| {
        let v = d.values.get(at)?;
        let place = match excludes_zero(*v) {
            true if v.mean > 0.0 => "above",
            true => "below",
            false => "level with",
        };
        let spread = if v.high > v.low {
            format!(", 95% interval {} to {}", signed(v.low), signed(v.high))
        } else {
            String::new()
        };
        Some(format!(
            "{} is {place} {} ({} points{spread}, {} shared contexts)",
            c.runs[d.run].name,
            c.runs[0].name,
            signed(v.mean),
            d.contexts
        ))
    };
    let said: Vec<String> = m.differences.iter().filter_map(one).collect();
    (!said.is_empty()).then(|| format!("By {what} with {}% kept, {}.", kept(m.ratios[at]), said.join("; ")))
}

/// `-1.2 (-2.3 to -0.1) *`.
fn points(v: Interval) -> String {
    let star = if excludes_zero(v) { " *" } else { "" };
    format!("{:+.1} ({:+.1} to {:+.1}){star}", 100.0 * v.mean, 100.0 * v.low, 100.0 * v.high)
}

/// Whether a difference is one beyond its interval.
fn excludes_zero(v: Interval) -> bool {
    v.low > 0.0 || v.high < 0.0
}

fn by_task(c: &Comparison, ratio: f64) -> String {
    let head: Vec<String> =
        ["task".to_owned()].into_iter().chain(c.runs.iter().map(|r| r.name.clone())).collect();
    let row = |t: &super::TaskScores| {
        let at = t.metric.ratios.iter().position(|r| *r == ratio);
        let value = |values: &Vec<Interval>| at.map_or_else(|| "-".to_owned(), |i| percent(values[i]));
        [t.task.clone()].into_iter().chain(t.metric.runs.iter().map(value)).collect::<Vec<_>>()
    };
    markdown(&head, &c.tasks.iter().map(row).collect::<Vec<_>>())
}

fn budgets(c: &Comparison) -> String {
    let Some(b) = &c.budgets else { return String::new() };
    let names = ["layer".to_owned(), MethodName::KVZIP.name().to_owned()];
    let head: Vec<String> = names.into_iter().chain(c.runs.iter().map(|r| r.name.clone())).collect();
    let row = |layer: usize| {
        let of = |run: &Option<Vec<f64>>| {
            let value = run.as_ref().and_then(|r| r.get(layer));
            value.map_or_else(|| "-".to_owned(), |v| format!("{:.1}", 100.0 * v))
        };
        let first = [layer.to_string(), format!("{:.1}", 100.0 * b.kvzip[layer])];
        first.into_iter().chain(b.runs.iter().map(of)).collect::<Vec<_>>()
    };
    markdown(&head, &(0..b.kvzip.len()).map(row).collect::<Vec<_>>())
}

fn recipe(c: &Comparison) -> Option<String> {
    let head: Vec<String> =
        ["key".to_owned()].into_iter().chain(c.runs.iter().map(|r| r.name.clone())).collect();
    let row = |k: &super::RecipeKey| {
        [format!("`{}`", k.key)].into_iter().chain(k.values.iter().map(value_text)).collect::<Vec<_>>()
    };
    let rows: Vec<_> = c.recipe.iter().map(row).collect();
    (!rows.is_empty()).then(|| markdown(&head, &rows))
}

/// A value of a recipe in a cell of a table.
pub fn value_text(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    // A bar would end the cell.
    let text = text.replace('|', "/");
    match text.char_indices().nth(MAX_VALUE) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
