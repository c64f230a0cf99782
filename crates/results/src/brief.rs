//! What a command ends in: one table of what was asked, and lines about it.
//!
//! The table fits 80 columns: rows are methods, columns retention ratios. With more tasks than one, the first
//! has the table, and each other task or suite a line. Without any, agreement with the labels has it.

use std::fmt::Write;

use pkv_core::Policy;
use pkv_recipe::{MethodName, TaskName};

use crate::results::{AnswerResults, Interval, Results};
use crate::table::trimmed;

/// A share kept at which the lines below the table speak: where methods begin to part.
const SPOKEN: f64 = 0.05;

/// Shares kept that a table of 80 columns has room for.
const COLUMNS: usize = 8;

/// What is said, and how.
pub struct Brief<'a> {
    pub results: &'a Results,
    /// What was asked.
    pub tasks: &'a [TaskName],
    /// The policies that were asked; the first that was measured has the table.
    pub policies: &'a [Policy],
    pub is_oracle: fn(MethodName) -> bool,
    /// The mapper's row and the best of each column in bold; without, `*` marks the best.
    pub bold: bool,
}

/// One figure by method and share kept, of what a table is of.
struct Figure {
    /// In the lines below the table.
    name: String,
    /// Above the table; the policy is added.
    title: String,
    policy: Policy,
    full: Option<Interval>,
    cells: Vec<(MethodName, f64, Interval)>,
    /// Nats instead of percent: the least is best.
    is_loss: bool,
}

impl Figure {
    fn cell(&self, method: MethodName, ratio: f64) -> Option<Interval> {
        self.cells.iter().find(|c| (c.0, c.1) == (method, ratio)).map(|c| c.2)
    }

    fn show(&self, value: f64) -> String {
        if self.is_loss { format!("{value:.3}") } else { format!("{:.1}", 100.0 * value) }
    }

    /// As many ratios as fit, from the most kept to the least; where most is kept, methods hardly differ.
    fn ratios(&self) -> Vec<f64> {
        let mut ratios: Vec<f64> = self.cells.iter().map(|c| c.1).collect();
        ratios.sort_by(|a, b| b.total_cmp(a));
        ratios.dedup();
        ratios.drain(..ratios.len().saturating_sub(COLUMNS));
        ratios
    }

    /// The mapper's figure beside the full cache's and KVzip's, where methods part.
    fn said(&self) -> String {
        let distance = |r: f64| (r / SPOKEN).ln().abs();
        let measured = self.ratios().into_iter().filter(|r| self.cell(MethodName::MAPPER, *r).is_some());
        let Some(ratio) = measured.min_by(|a, b| distance(*a).total_cmp(&distance(*b))) else {
            return format!("{}: the mapper was not asked.", self.name);
        };
        let unit = if self.is_loss { "" } else { "%" };
        let mut out = format!("{}, {} kept", self.name, kept(ratio));
        if let Some(Interval { mean, low, high }) = self.cell(MethodName::MAPPER, ratio) {
            let [mean, low, high] = [mean, low, high].map(|v| self.show(v));
            let _ = write!(out, ": mapper {mean}{unit} ({low} to {high})");
        }
        let others = [("full cache", self.full), ("kvzip", self.cell(MethodName::KVZIP, ratio))];
        for (name, value) in others {
            if let Some(value) = value {
                let _ = write!(out, ", {name} {}{unit}", self.show(value.mean));
            }
        }
        out + "."
    }
}

impl Brief<'_> {
    /// The table and its lines, ending in a line break; `None` where nothing was measured.
    pub fn text(&self) -> Option<String> {
        let figures: Vec<Figure> = self.asked().collect();
        let (first, others) = match figures.split_first() {
            Some((first, others)) => (first, others),
            None => (&self.recall()?, &[][..]),
        };
        let mut out =
            format!("\n{}, policy {}\n\n{}\n", first.title, first.policy.name(), self.table(first)?);
        for figure in std::iter::once(first).chain(others) {
            let _ = writeln!(out, "{}", figure.said());
        }
        if !figures.is_empty()
            && let Some(recall) = self.recall()
        {
            let _ = writeln!(out, "{}", recall.said());
        }
        Some(out)
    }

    /// The figures of what was asked and measured, suites with the mean of their tasks.
    fn asked(&self) -> impl Iterator<Item = Figure> {
        let mut groups: Vec<&str> = Vec::new();
        for task in self.tasks {
            let group = task.parts().0;
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        groups.into_iter().filter_map(|group| {
            if group == TaskName::FACTS.name() {
                self.facts()
            } else if group == TaskName::PERPLEXITY.name() {
                self.perplexity()
            } else {
                self.suite(group)
            }
        })
    }

    fn policy(&self, measured: impl Iterator<Item = Policy>) -> Option<Policy> {
        let measured: Vec<Policy> = measured.collect();
        self.policies.iter().find(|p| measured.contains(p)).or(measured.first()).copied()
    }

    fn facts(&self) -> Option<Figure> {
        let facts = self.results.facts.as_ref()?;
        let what = format!("% of {} questions answered from the pruned cache", facts.questions);
        self.answers(&[facts], "facts", &what)
    }

    fn suite(&self, suite: &str) -> Option<Figure> {
        let is_asked = |b: &&AnswerResults| {
            let asks = |task: &TaskName| match task.parts() {
                (of, None) => of == b.suite,
                // One that mixes kinds of questions has a row for each.
                (of, Some(one)) => of == b.suite && b.task.split('/').next() == one.split('/').next(),
            };
            self.tasks.iter().any(asks)
        };
        let of: Vec<_> =
            self.results.benchmarks.iter().filter(|b| b.suite == suite).filter(is_asked).collect();
        match of.as_slice() {
            [one] => self.answers(
                &of,
                &format!("{suite} {}", one.task),
                &format!("score in %, {} questions", one.questions),
            ),
            _ => self.answers(&of, suite, &format!("mean score of {} tasks in %", of.len())),
        }
    }

    /// The mean of `tasks`, of what all of them have.
    fn answers(&self, tasks: &[&AnswerResults], name: &str, what: &str) -> Option<Figure> {
        let first = tasks.first()?;
        let policy = self.policy(first.cells.iter().map(|c| c.policy))?;
        let mean = |of: &dyn Fn(&AnswerResults) -> Option<Interval>| {
            Interval::mean_of(&tasks.iter().map(|t| of(t)).collect::<Option<Vec<_>>>()?)
        };
        let of_policy = first.cells.iter().filter(|c| c.policy == policy);
        let cells = of_policy.filter_map(|c| {
            let score = |t: &AnswerResults| t.cell(c.method, policy, c.ratio).map(|c| c.score);
            Some((c.method, c.ratio, mean(&score)?))
        });
        Some(Figure {
            name: name.to_owned(),
            title: format!("{name}: {what}"),
            policy,
            full: mean(&|t| Some(t.full)),
            cells: cells.collect(),
            is_loss: false,
        })
    }

    fn perplexity(&self) -> Option<Figure> {
        let p = self.results.perplexity.as_ref()?;
        let policy = self.policy(p.cells.iter().map(|c| c.policy))?;
        let cells = p.cells.iter().filter(|c| c.policy == policy);
        Some(Figure {
            name: "continuation".to_owned(),
            title: "continuation: nats per token above the full cache".to_owned(),
            policy,
            full: None,
            cells: cells.map(|c| (c.method, c.ratio, c.excess)).collect(),
            is_loss: true,
        })
    }

    fn recall(&self) -> Option<Figure> {
        let cells = &self.results.labels.cells;
        let policy = self.policy(cells.iter().map(|c| c.policy))?;
        // KVzip's own is 100%.
        let of_policy = cells.iter().filter(|c| c.policy == policy && c.method != MethodName::KVZIP);
        Some(Figure {
            name: "recall of KVzip's kept pairs".to_owned(),
            title: "recall of the KV pairs that KVzip keeps, %".to_owned(),
            policy,
            full: None,
            cells: of_policy.map(|c| (c.method, c.ratio, c.recall)).collect(),
            is_loss: false,
        })
    }

    fn table(&self, figure: &Figure) -> Option<String> {
        let ratios = figure.ratios();
        let mut named: Vec<MethodName> = Vec::new();
        for (method, ..) in figure.cells.iter().filter(|c| ratios.contains(&c.1)) {
            if !named.contains(method) {
                named.push(*method);
            }
        }
        // Oracles are a reference, no rivals: first.
        named.sort_by_key(|m| !(self.is_oracle)(*m));
        let best = |ratio: f64| {
            let rivals =
                figure.cells.iter().filter(|c| c.1 == ratio && !(self.is_oracle)(c.0)).map(|c| c.2.mean);
            rivals.reduce(if figure.is_loss { f64::min } else { f64::max }).map(|v| figure.show(v))
        };
        let width = named.iter().map(|m| m.name().len()).max()?.max("KV pairs kept".len()) + 3;
        let strong = |text: String, is_strong: bool| {
            if self.bold && is_strong { format!("\u{1b}[1m{text}\u{1b}[0m") } else { text }
        };
        let mut out = String::new();
        let mut line = |name: String, is_strong: bool, cells: Vec<String>| {
            let cells = cells.concat();
            let _ = writeln!(out, "{}{}", strong(format!("{name:width$}"), is_strong), cells.trim_end());
        };
        line(
            "  KV pairs kept".to_owned(),
            false,
            ratios.iter().map(|r| format!("{:>6} ", kept(*r))).collect(),
        );
        if let Some(full) = figure.full {
            let full = ratios.iter().map(|_| format!("{:>6} ", figure.show(full.mean)));
            line("  full cache".to_owned(), false, full.collect());
        }
        for method in named {
            let cell = |&ratio: &f64| {
                let value = figure.cell(method, ratio).map(|v| figure.show(v.mean));
                let is_best = value.is_some() && !(self.is_oracle)(method) && value == best(ratio);
                let mark = if is_best && !self.bold { '*' } else { ' ' };
                strong(format!("{:>6}{mark}", value.as_deref().unwrap_or("-")), is_best)
            };
            let is_ours = method == MethodName::MAPPER;
            let name = format!("{} {}", if is_ours { '>' } else { ' ' }, method.name());
            line(name, is_ours, ratios.iter().map(cell).collect());
        }
        Some(out)
    }
}

/// `12.5%`.
fn kept(ratio: f64) -> String {
    format!("{}%", trimmed(100.0 * ratio))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const TASKS: [TaskName; 3] = [TaskName::FACTS, TaskName::PERPLEXITY, TaskName::of("ruler/vt")];

    fn at(mean: f64) -> Value {
        json!({"mean": mean, "low": mean - 0.03, "high": mean + 0.01})
    }

    fn results() -> Results {
        let mut cells = Vec::new();
        let scores =
            [("mapper", 0.96), ("kvzip", 0.97), ("kvzip-pooled", 0.99), ("linear", 0.9), ("random", 0.97)];
        let less = [
            (0.5, 0.0),
            (0.3, 0.0),
            (0.2, 0.0),
            (0.1, 0.0),
            (0.07, 0.0),
            (0.05, 0.3),
            (0.03, 0.5),
            (0.02, 0.6),
        ];
        for (method, score) in scores {
            for (ratio, less) in less {
                let drop = if method == "random" { 3.0 * less / 2.0 } else { less };
                cells.push(json!({"method": method, "policy": "pair-keydiff", "ratio": ratio, "accuracy": at(score - drop),
                    "kl": at(0.1), "flips": at(0.1), "of_kvzip": null, "of_full": null}));
            }
        }
        let excess = [("mapper", 0.2), ("snapkv", 0.1)].map(|(method, excess)| {
            json!({"method": method, "policy": "pair-keydiff", "ratio": 0.05, "nll": at(1.0), "excess": at(excess)})
        });
        let ruler = |task: &str| json!({"suite": "ruler", "task": task, "contexts": 2, "questions": 10, "full": at(0.5), "cells": cells});
        serde_json::from_value(json!({
            "schema_version": 1, "fingerprint": "", "seed": 1, "mapper": "",
            "target": {"name": "t", "layers": 2, "kv_heads": 2}, "notes": [],
            "labels": {"contexts": 2, "positions": 9, "ranks": [], "heads": null, "cells": [
                {"method": "mapper", "policy": "pair-keydiff", "ratio": 0.05, "recall": at(0.751), "mass": at(0.9), "realised": 0.05}]},
            "facts": {"contexts": 2, "questions": 96, "full": at(0.99), "cells": cells},
            "perplexity": {"contexts": 2, "continuation_tokens": 8, "full": at(1.0), "cells": excess},
            "benchmarks": [ruler("vt"), ruler("cwe")],
            "worked_example": null, "timings": []
        }))
        .unwrap()
    }

    fn text(tasks: &[TaskName], bold: bool) -> String {
        let is_oracle = |m: MethodName| m.name().starts_with("kvzip");
        let results = results();
        let brief = Brief { results: &results, tasks, policies: &[Policy::Pair], is_oracle, bold };
        let text = brief.text().unwrap();
        assert!(bold || text.lines().all(|line| line.chars().count() <= 80), "{text}");
        text
    }

    #[test]
    fn one_table_of_80_columns_and_a_line_for_each_task() {
        let plain = text(&TASKS, false);
        assert!(!plain.contains('\u{1b}'));
        let row = |name: &str| plain.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{plain}"));
        assert!(row("mapper ").starts_with("> mapper") && row("> mapper").contains("  66.0*"), "{plain}");
        // Best at 50%, and no more at 5%; oracles are never.
        assert!(row("  random").contains("97.0*") && row("  random").contains(" 52.0 "), "{plain}");
        assert!(!row("  kvzip ").contains('*'), "{plain}");
        let order = ["full cache", "  kvzip ", "> mapper", "  random"].map(|name| plain.find(name).unwrap());
        assert!(order.is_sorted(), "{plain}");
        for said in [
            "facts: % of 96 questions answered from the pruned cache, policy pair-keydiff",
            "\nfacts, 5% kept: mapper 66.0% (63.0 to 67.0), full cache 99.0%, kvzip 67.0%.\n",
            "\ncontinuation, 5% kept: mapper 0.200 (0.170 to 0.210).\n",
            "\nruler vt, 5% kept: mapper 66.0% (63.0 to 67.0), full cache 50.0%, kvzip 67.0%.\n",
            "\nrecall of KVzip's kept pairs, 5% kept: mapper 75.1% (72.1 to 76.1).\n",
        ] {
            assert!(plain.contains(said), "`{said}` is missing\n{plain}");
        }
        let bold = text(&TASKS, true);
        assert!(bold.contains("\u{1b}[1m> mapper") && !bold.contains('*'), "{bold:?}");
        let of_bold = bold.replace("\u{1b}[1m", "").replace("\u{1b}[0m", "");
        assert_eq!(of_bold.lines().count(), plain.lines().count());
    }

    #[test]
    fn the_table_is_of_what_was_asked_first() {
        let ruler = text(&[TaskName::of("ruler"), TaskName::FACTS], false);
        assert!(ruler.contains("ruler: mean score of 2 tasks in %, policy"), "{ruler}");
        // Both tasks alike: a mean is surer than each.
        assert!(ruler.contains("ruler, 5% kept: mapper 66.0% (63.9 to 66.7)"), "{ruler}");
        assert!(ruler.contains("\nfacts, 5% kept: "), "{ruler}");
        let nats = text(&[TaskName::PERPLEXITY], false);
        assert!(nats.contains("\n  snapkv         0.100*\n") && !nats.contains("0.200*"), "{nats}");
        let none = text(&[], false);
        assert!(
            none.contains("recall of the KV pairs that KVzip keeps, %") && none.contains("75.1*"),
            "{none}"
        );
        assert_eq!(none.matches("recall").count(), 2, "{none}");
    }
}
