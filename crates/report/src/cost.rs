//! Cost of a method beside what it buys: time to score a context, answers, recall, likelihood.

use pkv_recipe::MethodName;
use pkv_results::{Needs, Results};

use crate::chart::percent_text;
use crate::figures::percent;
use crate::headline::choice;
use crate::method::Methods;
use crate::stages::short_time;
use crate::tables::{Cell, Row, Table, points};

/// The table, and a sentence on the mapper's share.
pub struct Cost {
    pub table: Table,
    pub reading: Option<String>,
}

/// Mean seconds of one kind of work, if it was timed.
fn secs(results: &Results, what: &str) -> Option<f64> {
    let found = results.timings.iter().find(|t| t.what == what && t.times > 0)?;
    Some(found.secs / found.times as f64)
}

const COLUMNS: [&str; 5] = ["ms per context", "% of prefill", "% answered", "% recall", "nats lost"];

/// Seconds for the scores of one context: the method's own work, and the work of its inputs. The target's
/// prefill is left out, since every method needs it.
fn scoring(methods: Methods, results: &Results, of: MethodName) -> Option<f64> {
    let own = secs(results, &format!("scores: {}", of.name()))?;
    let needs = methods.find(of).map_or(Needs::NOTHING, |m| m.needs);
    let labels = if needs.labels { secs(results, "target: KVzip scores")? } else { 0.0 };
    let features = if needs.features { secs(results, "features")? } else { 0.0 };
    Some(own + labels + features)
}

/// `None` without times.
pub fn cost(methods: Methods, results: &Results) -> Option<Cost> {
    let prefill = secs(results, "target: prefill").or(secs(results, "target: prefill with features"));
    let (facts, likelihood) = (results.facts.as_ref(), results.perplexity.as_ref());
    let (policy, ratio) = facts.and_then(choice)?;
    let measured = methods.oracles_first(results.labels.cells.iter().map(|c| c.method));
    let plain = |value: String| Some(Cell { value, interval: String::new(), best: false });
    let row = |m: MethodName| {
        let time = scoring(methods, results, m)?;
        let answered = facts.and_then(|f| f.cell(m, policy, ratio)).map(|c| points(c.score.mean));
        let recall = results.labels.cell(m, policy, ratio).map(|c| points(c.recall.mean));
        let excess = likelihood.and_then(|l| l.cell(m, policy, ratio));
        Some(Row {
            name: m.name().to_owned(),
            class: methods.class(m),
            reference: methods.is_oracle(m),
            cells: vec![
                plain(format!("{:.2}", 1e3 * time)),
                prefill.and_then(|p| plain(points(time / p))),
                answered.and_then(plain),
                recall.and_then(plain),
                excess.and_then(|c| plain(format!("{:.3}", c.excess.mean))),
            ],
        })
    };
    let mut rows: Vec<Row> = measured.into_iter().filter_map(row).collect();
    // Recall may be measured under another policy than the answers: a column without a number is left out.
    let is_known = COLUMNS.iter().enumerate().map(|(c, _)| rows.iter().any(|row| row.cells[c].is_some()));
    let known: Vec<bool> = is_known.collect();
    for row in &mut rows {
        let mut known = known.iter();
        row.cells.retain(|_| known.next() == Some(&true));
    }
    if rows.is_empty() {
        return None;
    }
    let reading = || {
        let (mapper, kvzip) =
            (scoring(methods, results, MethodName::MAPPER)?, scoring(methods, results, MethodName::KVZIP)?);
        let beside = prefill
            .map_or_else(String::new, |p| format!(", {} of the target's prefill", percent(mapper / p)));
        Some(format!(
            "To score one context takes the mapper {}{beside}; KVzip's own scores take {}, {:.1} times as long.",
            short_time(mapper),
            short_time(kvzip),
            kvzip / mapper
        ))
    };
    Some(Cost {
        reading: reading(),
        table: Table {
            caption: format!("Cost beside quality at {} kept", percent_text(ratio)),
            note: format!(
                "Policy {}. Time: mean over the contexts that were evaluated, with the method's inputs (features, KVzip's \
                 repetition), without the target's prefill, which all need; features that the prefill gives on its way are in \
                 the prefill. Of the cache's bytes every method keeps the same share.",
                policy.name()
            ),
            columns: COLUMNS
                .iter()
                .zip(known)
                .filter(|(_, known)| *known)
                .map(|(c, _)| (*c).to_owned())
                .collect(),
            rows,
            ..Table::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;
    use pkv_results::Timing;

    #[test]
    fn a_method_pays_for_its_inputs() {
        let timing = |what: &str, secs| Timing { what: what.to_owned(), secs, times: 10 };
        let results: Results = serde_json::from_value(serde_json::json!({
            "schema_version": 1, "fingerprint": "", "seed": 1, "mapper": "", "notes": [],
            "target": {"name": "t", "layers": 1, "kv_heads": 1},
            "proxy": {"name": "p", "layers": 1, "kv_heads": 1},
            "labels": {"contexts": 0, "positions": 0, "cells": [], "ranks": [], "heads": null},
            "facts": null, "perplexity": null, "worked_example": null, "timings": [],
        }))
        .unwrap();
        let results = Results {
            timings: vec![
                timing("target: KVzip scores", 2.0),
                timing("features", 0.5),
                timing("scores: kvzip", 0.0),
                timing("scores: mapper", 0.1),
                timing("scores: random", 0.01),
            ],
            ..results
        };
        let of = |m| (1e3 * scoring(METHODS, &results, m).unwrap()).round();
        assert_eq!([MethodName::KVZIP, MethodName::MAPPER, MethodName::RANDOM].map(of), [200.0, 60.0, 1.0]);
        assert!(scoring(METHODS, &results, MethodName::SNAPKV).is_none(), "it was not timed");
        assert!(cost(METHODS, &results).is_none(), "no answers, no quality");
    }
}
