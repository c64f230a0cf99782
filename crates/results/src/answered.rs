//! Answers of one context from the full cache and from every pruned one, and their summary over all contexts.
//!
//! Planted facts and benchmarks have the same form. Files of earlier versions, which had one for each, are
//! read.

use anyhow::Result;
use pkv_recipe::AnswerMatch;
use pkv_tasks::Squad;
use serde::{Deserialize, Deserializer, Serialize};

use crate::bootstrap::Draws;
use crate::cell::{Cell, Cells};
use crate::results::{AnswerCell, AnswerResults, Interval, Made, Timing};
use crate::store::Outcome;
use crate::timings;

/// A question as it was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    pub question: String,
    /// Answers that count; a single text in facts of earlier versions.
    #[serde(deserialize_with = "one_or_several")]
    pub wanted: Vec<String>,
    /// Kind of question, if a task mixes several; else empty.
    #[serde(default)]
    pub part: String,
    /// First context token of the planted fact that answers it, and how many there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fact: Option<(u32, u32)>,
}

/// One answer to one question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Decoded text.
    pub text: String,
    /// In [0, 1]; whether it was right in facts of earlier versions.
    #[serde(alias = "correct", deserialize_with = "score_or_right")]
    pub score: f64,
    /// KL(full || pruned), summed over the tokens of the right answer or of the full cache's, nats.
    pub kl: f64,
    /// Of these tokens, those whose most likely token differs from the full cache's.
    pub flipped: u32,
    /// Number of tokens, including the stop token.
    pub tokens: u32,
    /// Where a short answer is wanted; absent in outcomes of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squad: Option<Squad>,
    /// Of the fact's KV pairs, the share that the pruned cache holds; absent where no fact was planted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<f64>,
}

/// Outcome of one context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswersOutcome {
    /// [`crate::columns::context_id`].
    pub context_id: String,
    /// 0 in facts of earlier versions.
    #[serde(default)]
    pub context_tokens: usize,
    /// Whether its middle was cut out.
    #[serde(default)]
    pub cut: bool,
    pub asked: Vec<Asked>,
    /// The full cache's answers, one per question.
    pub full: Vec<Answer>,
    /// Answers of each cell.
    pub cells: Cells<Vec<Answer>>,
    pub timings: Vec<Timing>,
}

impl Outcome for AnswersOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
        timings::add_all(&mut self.timings, &new.timings);
    }
}

impl AnswersOutcome {
    /// Exact match and F1 where they are absent: of facts, whose wanted answers are all short, texts are all
    /// it takes.
    pub fn with_squads(mut self) -> Self {
        for row in std::iter::once(&mut self.full).chain(self.cells.values_mut()) {
            for (answer, asked) in row.iter_mut().zip(&self.asked) {
                let squad = || Squad::of(&answer.text, asked.wanted.iter().map(String::as_str));
                answer.squad = Some(answer.squad.unwrap_or_else(squad));
            }
        }
        self
    }
}

fn one_or_several<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        Several(Vec<String>),
    }
    Ok(match Texts::deserialize(from)? {
        Texts::One(text) => vec![text],
        Texts::Several(texts) => texts,
    })
}

fn score_or_right<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Worth {
        Right(bool),
        Score(f64),
    }
    Ok(match Worth::deserialize(from)? {
        Worth::Right(right) => f64::from(right),
        Worth::Score(score) => score,
    })
}

/// Whose answers they are.
pub struct Answerers<'a> {
    /// Empty for planted facts.
    pub suite: &'a str,
    /// Likewise.
    pub task: &'a str,
    /// Of planted facts.
    pub answer_match: Option<AnswerMatch>,
}

/// All contexts of a task together, each cell over those that have it; tasks that mix parts give one result
/// for each.
pub fn summarize(
    made: &Made,
    of: &Answerers,
    outcomes: &[(usize, AnswersOutcome)],
    draws: &Draws,
) -> Vec<AnswerResults> {
    let all = || outcomes.iter().map(|(_, o)| o);
    let mut parts: Vec<&str> = Vec::new();
    for asked in all().flat_map(|o| &o.asked) {
        if !parts.contains(&asked.part.as_str()) {
            parts.push(&asked.part);
        }
    }
    let cells = Cell::union(all().flat_map(|o| o.cells.cells()));
    let share = |above: &[f64], below: &[f64]| {
        draws.of(above.len()).ratio(above, below).unwrap_or(Interval::exact(0.0))
    };
    let is_benchmark = !of.suite.is_empty();
    let one = |part: &str| {
        // Sum over a context's questions of this part.
        let sum = |o: &AnswersOutcome, row: &[Answer], of: &dyn Fn(&Answer) -> f64| -> f64 {
            o.asked.iter().zip(row).filter(|(asked, _)| asked.part == part).map(|(_, a)| of(a)).sum()
        };
        let score = |a: &Answer| a.score;
        // Every question of the part has exact match and F1, or the part has neither.
        let squad = |rows: &[(&AnswersOutcome, &Vec<Answer>)], of: fn(&Squad) -> f64| {
            let mine = |(o, row): &(&AnswersOutcome, &Vec<Answer>)| {
                let turns = o.asked.iter().zip(row.iter()).filter(|(asked, _)| asked.part == part);
                turns.map(|(_, a)| a.squad.as_ref().map(of)).sum::<Option<f64>>()
            };
            let sums = rows.iter().map(mine).collect::<Option<Vec<f64>>>()?;
            let turns: Vec<f64> = rows.iter().map(|(o, row)| sum(o, row, &|_| 1.0)).collect();
            draws.of(sums.len()).ratio(&sums, &turns)
        };
        let cell = |cell: &Cell| {
            let mine: Vec<(&AnswersOutcome, &Vec<Answer>)> =
                all().filter_map(|o| Some((o, o.cells.get(cell)?))).collect();
            let total = |of: &dyn Fn(&Answer) -> f64| -> Vec<f64> {
                mine.iter().map(|(o, row)| sum(o, row, of)).collect()
            };
            let full = |of: &dyn Fn(&Answer) -> f64| -> Vec<f64> {
                mine.iter().map(|(o, _)| sum(o, &o.full, of)).collect()
            };
            let (scores, tokens) = (total(&score), full(&|a| f64::from(a.tokens)));
            let (of_both, of_kvzip): (Vec<f64>, Vec<f64>) = mine
                .iter()
                .filter_map(|(o, row)| {
                    let kvzip = o.cells.get(&cell.of_kvzip())?;
                    Some((sum(o, row, &score), sum(o, kvzip, &score)))
                })
                .unzip();
            AnswerCell {
                method: cell.method,
                policy: cell.policy,
                ratio: cell.ratio.get(),
                contexts: (mine.len() < outcomes.len()).then_some(mine.len()),
                score: share(&scores, &full(&|_| 1.0)),
                exact_match: squad(&mine, |s| s.exact),
                f1: squad(&mine, |s| s.f1),
                kl: share(&total(&|a| a.kl), &tokens),
                flips: share(&total(&|a| f64::from(a.flipped)), &tokens),
                of_kvzip: draws.of(of_both.len()).ratio(&of_both, &of_kvzip),
                of_full: draws.of(mine.len()).ratio(&scores, &full(&score)),
            }
        };
        let full = |of: &dyn Fn(&Answer) -> f64| -> Vec<f64> { all().map(|o| sum(o, &o.full, of)).collect() };
        let n = full(&|_| 1.0);
        let of_full: Vec<_> = all().map(|o| (o, &o.full)).collect();
        let mean_tokens =
            || all().map(|o| o.context_tokens as f64).sum::<f64>() / outcomes.len().max(1) as f64;
        AnswerResults {
            made: made.clone(),
            suite: of.suite.to_owned(),
            task: if part.is_empty() || part == of.task {
                of.task.to_owned()
            } else {
                format!("{}/{part}", of.task)
            },
            contexts: outcomes.len(),
            questions: n.iter().sum::<f64>() as usize,
            answer_match: of.answer_match,
            mean_context_tokens: is_benchmark.then(mean_tokens),
            cut: is_benchmark.then(|| all().filter(|o| o.cut).count()),
            full: share(&full(&score), &n),
            full_exact_match: squad(&of_full, |s| s.exact),
            full_f1: squad(&of_full, |s| s.f1),
            cells: cells.iter().map(cell).collect(),
        }
    };
    parts.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use pkv_core::{Policy, RetentionRatio, Seed};
    use pkv_recipe::MethodName;
    use serde_json::json;

    use super::*;

    /// As an earlier version stored facts: texts are all that exact match and F1 take.
    #[test]
    fn facts_of_an_earlier_version_are_read_and_get_exact_match_and_f1() {
        let answer = |text: &str, correct: bool| json!({"text": text, "correct": correct, "kl": 0, "flipped": 0, "tokens": 2});
        let ratio = RetentionRatio::new(0.1).unwrap();
        let cell = Cell { method: MethodName::MAPPER, policy: Policy::Pair, ratio };
        let stored = json!({
            "context_id": "c",
            "asked": [{"question": "?", "wanted": "4711"}, {"question": "?", "wanted": "a silver bell"}],
            "full": [answer("4711", true), answer("a silver bell", true)],
            "cells": [[cell, [answer("The 4711.", false), answer("Bell", false)]]],
            "timings": [],
        });
        let outcome: AnswersOutcome = serde_json::from_value(stored).unwrap();
        let draws = Draws::new(20, Seed(1));
        let of = Answerers { suite: "", task: "", answer_match: Some(AnswerMatch::Exact) };
        let sum = |o| summarize(&Made::default(), &of, &[(0, o)], &draws).remove(0);
        assert_eq!(sum(outcome.clone()).full_f1, None);
        let found = sum(outcome.with_squads());
        let mean = |i: Option<Interval>| i.unwrap().mean;
        assert_eq!((found.full.mean, mean(found.full_exact_match), mean(found.full_f1)), (1.0, 1.0, 1.0));
        let cell = &found.cells[0];
        assert_eq!((cell.score.mean, mean(cell.exact_match)), (0.0, 0.5));
        // 1, and a word of one against one of two.
        assert!((mean(cell.f1) - (1.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
    }
}
