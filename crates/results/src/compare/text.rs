//! A comparison as Markdown tables for a terminal: rows are runs, columns retention ratios.

use serde_json::Value;

use super::{Comparison, Metric, ONE_RATIO};
use crate::results::Interval;
use crate::table::{markdown, percent, trimmed};

/// Longest value of a recipe's key that is printed.
const MAX_VALUE: usize = 48;

/// Every table, each under a heading, then what a reader must know.
pub fn text(c: &Comparison) -> String {
    let mut out = format!(
        "{} runs for `{}`: the mapper of each, policy `{}`\n\n",
        c.runs.len(),
        c.target,
        c.policy.name()
    );
    let mut add = |title: &str, table: Option<String>| {
        if let Some(table) = table {
            out.push_str(&format!("### {title}\n\n{table}\n"));
        }
    };
    let first = &c.runs[0].name;
    let tasks: Vec<&str> = c.tasks.iter().map(|t| t.task.as_str()).collect();
    let over = match tasks.as_slice() {
        [one] => (*one).to_owned(),
        several => format!("mean of {} tasks", several.len()),
    };
    add(
        &format!("Answers from the pruned cache, {over} (%, 95% interval)"),
        c.answers.as_ref().map(|m| values(c, m)),
    );
    add("Recovered accuracy (KVzip = 100, 95% interval)", c.recovered.as_ref().map(|m| values(c, m)));
    add("Recall of KVzip's kept set (%, 95% interval)", c.recall.as_ref().map(|m| values(c, m)));
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
        add(&format!("Answers by task at {}% kept (%, 95% interval)", kept(at)), Some(by_task(c, at)));
    }
    if let Some(b) = &c.budgets {
        let title = format!(
            "Share of each layer's KV pairs kept at {}% of all, policy `{}` (%)",
            kept(b.ratio),
            b.policy.name()
        );
        add(&title, Some(budgets(c)));
    }
    add("What differs between the recipes", recipe(c));
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

fn head(m: &Metric, second: Option<&str>) -> Vec<String> {
    let first = ["run".to_owned()].into_iter().chain(second.map(str::to_owned));
    first.chain(m.ratios.iter().map(|&r| format!("{}%", kept(r)))).collect()
}

fn values(c: &Comparison, m: &Metric) -> String {
    let row = |name: &str, contexts: String, values: &[Interval]| {
        [name.to_owned(), contexts].into_iter().chain(values.iter().map(|v| percent(*v))).collect::<Vec<_>>()
    };
    let references = m.references.iter().map(|r| row(&r.name, m.contexts[0].to_string(), &r.values));
    let runs = c.runs.iter().zip(&m.runs).zip(&m.contexts);
    let runs = runs.map(|((run, values), n)| row(&run.name, n.to_string(), values));
    markdown(&head(m, Some("contexts")), &references.chain(runs).collect::<Vec<_>>())
}

fn differences(c: &Comparison, m: &Metric) -> Option<String> {
    let row = |d: &super::Difference| {
        let contexts = format!("{} of {}", d.contexts, m.contexts[d.run].max(m.contexts[0]));
        let values =
            (0..m.ratios.len()).map(|i| d.values.get(i).map_or_else(|| "-".to_owned(), |v| points(*v)));
        [c.runs[d.run].name.clone(), contexts].into_iter().chain(values).collect::<Vec<_>>()
    };
    let rows: Vec<_> = m.differences.iter().map(row).collect();
    (!rows.is_empty()).then(|| markdown(&head(m, Some("shared contexts")), &rows))
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
    let names = ["layer".to_owned(), "KVzip".to_owned()];
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
