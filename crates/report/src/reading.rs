//! What the numbers of a section say, in a sentence or two above its charts.

use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::{AnswerResults, HeadRecall, Interval, LabelResults, PerplexityResults};

use crate::chart::percent_text;
use crate::figures::percent;
use crate::headline::{join, nearest};
use crate::method::Methods;
use crate::metrics::Metrics;
use crate::tables::excludes_zero;

/// A head that keeps less counts as one that keeps nothing.
const NOTHING: f64 = 0.005;
/// Methods that keep the newest tokens whatever their scores.
const NEWEST_FIRST: [MethodName; 2] = [MethodName::of("streaming-llm"), MethodName::SNAPKV];

/// The mapper's answers, and its paired differences from each method.
pub fn answers(
    facts: &AnswerResults,
    policy: Policy,
    lead: &[(MethodName, f64, Interval)],
) -> Option<String> {
    let mapper = || facts.cells.iter().filter(|c| (c.method, c.policy) == (MethodName::MAPPER, policy));
    let ratio = nearest(mapper().map(|c| c.ratio))?;
    let cell = mapper().find(|c| c.ratio == ratio)?;
    let mut text = format!(
        "With {} of the KV pairs kept, the mapper answers {} of the questions, the full cache {}.",
        percent_text(ratio),
        percent(cell.score.mean),
        percent(facts.full.mean)
    );
    let of = |wanted: fn(&Interval) -> bool| -> Vec<String> {
        let fitting = lead.iter().filter(|(_, r, v)| *r == ratio && wanted(v));
        fitting.map(|(m, ..)| m.name().to_owned()).collect()
    };
    let groups = [
        ("clearly better than", of(|v| v.low > 0.0)),
        ("clearly worse than", of(|v| v.high < 0.0)),
        ("level with", of(|v| !excludes_zero(*v))),
    ];
    let said: Vec<String> = groups
        .into_iter()
        .filter(|(_, methods)| !methods.is_empty())
        .map(|(words, methods)| format!("{words} {}", join(&methods)))
        .collect();
    if !said.is_empty() {
        text += &format!(" Over the same contexts it is {}.", said.join("; "));
    }
    Some(text)
}

/// Which methods lose least of the continuation's likelihood, and why that is not the answers' order.
pub fn likelihood(results: &PerplexityResults, policy: Policy) -> Option<String> {
    let of_policy = || results.cells.iter().filter(|c| c.policy == policy);
    let mapper = || of_policy().filter(|c| c.method == MethodName::MAPPER);
    let ratio = nearest(mapper().map(|c| c.ratio))?;
    let cell = mapper().find(|c| c.ratio == ratio)?;
    let at_ratio = || of_policy().filter(|c| c.ratio == ratio && c.contexts == cell.contexts);
    let least = at_ratio().min_by(|a, b| a.excess.mean.total_cmp(&b.excess.mean))?;
    let mut text = format!(
        "With {} kept, the mapper's cache makes each token of the continuation {:.3} nats less likely",
        percent_text(ratio),
        cell.excess.mean
    );
    text += &match least.method {
        MethodName::MAPPER => ", the least of all methods.".to_owned(),
        other => format!("; {} loses least, {:.3}.", other.name(), least.excess.mean),
    };
    let chance = at_ratio().find(|c| c.method == MethodName::RANDOM);
    if chance.is_some_and(|c| c.excess.high < cell.excess.low) {
        text += " Pairs kept at random lose less than the mapper's.";
    }
    if NEWEST_FIRST.contains(&least.method) {
        text += " A continuation depends mostly on the newest tokens, which that method always keeps; KVzip and the mapper rank all \
                 tokens by what repeating the context needs, and may drop them. The recipe's key eval.keep_recent keeps them for every method.";
    }
    Some(text)
}

/// The mapper's recall beside the floor that knowing the heads alone sets.
pub fn recall(methods: Methods, labels: &LabelResults, policy: Policy) -> Option<String> {
    let of = |m| labels.cells.iter().filter(move |c| (c.method, c.policy) == (m, policy));
    let ratio = nearest(of(MethodName::MAPPER).map(|c| c.ratio))?;
    let at = |m| of(m).find(|c| c.ratio == ratio).map(|c| c.recall);
    let mapper = at(MethodName::MAPPER)?;
    let mut text = format!(
        "With {} kept, the mapper finds {} of the KV pairs that KVzip keeps",
        percent_text(ratio),
        percent(mapper.mean)
    );
    if let Some(floor) = at(MethodName::HEAD_PRIOR) {
        text += &format!("; right heads with random positions find {}", percent(floor.mean));
    }
    let rivals = methods.ordered(labels.cells.iter().map(|c| c.method)).into_iter();
    let rivals = rivals.filter(|&m| m != MethodName::MAPPER && !methods.is_oracle(m));
    let best = rivals.filter_map(|m| Some((m, at(m)?.mean))).max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((rival, share)) = best {
        text += &format!(", and {}, the best of the others, {}", rival.name(), percent(share));
    }
    Some(text + ".")
}

/// How evenly KVzip spreads its budget, which is how much there is to gain in ranking across heads.
pub fn heads(heads: &HeadRecall) -> Option<String> {
    let kept: Vec<f64> = heads.kvzip_kept.iter().flatten().copied().collect();
    let most = kept.iter().copied().reduce(f64::max)?;
    let empty = kept.iter().filter(|&&k| k < NOTHING).count();
    let of_most = most / kept.iter().sum::<f64>();
    let mut text = format!(
        "KVzip keeps next to nothing in {empty} of {} heads, and {} of the head that it keeps most of.",
        kept.len(),
        percent(most)
    );
    if of_most > 0.5 {
        text += &format!(
            " That head alone has {} of the budget: to rank heads is most of the work here, and easy.",
            percent(of_most)
        );
    }
    Some(text)
}

/// Whether training went on for long enough.
pub fn training(metrics: &Metrics) -> Option<String> {
    let best = metrics.validation.iter().rev().find(|p| p.best)?;
    let last = metrics.validation.last()?;
    let begun = metrics.validation.first()?;
    if begun.step == last.step {
        return None;
    }
    Some(if best.step == last.step {
        "Validation was best at the last step: longer training may help.".to_owned()
    } else {
        format!(
            "Validation was best at step {} of {}: the steps after it did not help.",
            best.step, last.step
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::ValidationPoint;
    use pkv_results::PerplexityCell;

    fn at(mean: f64) -> Interval {
        Interval { mean, low: mean - 0.02, high: mean + 0.02 }
    }

    fn continuation(cells: &[(MethodName, f64)]) -> PerplexityResults {
        let cell = |&(method, excess): &(MethodName, f64)| PerplexityCell {
            method,
            policy: Policy::Pair,
            ratio: 0.05,
            contexts: None,
            nll: at(1.5 + excess),
            excess: at(excess),
        };
        PerplexityResults {
            made: Default::default(),
            contexts: 9,
            continuation_tokens: 64,
            full: at(1.5),
            cells: cells.iter().map(cell).collect(),
        }
    }

    #[test]
    fn a_likelihood_that_recency_decides_is_explained() {
        let (mapper, random, snapkv) = (MethodName::MAPPER, MethodName::RANDOM, MethodName::SNAPKV);
        let worse = continuation(&[(mapper, 0.96), (random, 0.86), (snapkv, 0.372)]);
        let text = likelihood(&worse, Policy::Pair).unwrap();
        for part in ["0.960 nats", "snapkv loses least, 0.372", "at random lose less", "newest tokens"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let best = likelihood(&continuation(&[(mapper, 0.2), (random, 0.86)]), Policy::Pair).unwrap();
        assert!(best.ends_with("0.200 nats less likely, the least of all methods."), "{best}");
        assert!(likelihood(&worse, Policy::Token).is_none());
    }

    #[test]
    fn a_budget_in_one_head_is_called_easy() {
        let of =
            |kvzip_kept| HeadRecall { policy: Policy::Pair, ratio: 0.05, kvzip_kept, methods: Vec::new() };
        let spike = heads(&of(vec![vec![0.6, 0.0], vec![0.001, 0.0]])).unwrap();
        assert!(spike.contains("in 3 of 4 heads, and 60.0%") && spike.contains("and easy"), "{spike}");
        let even = heads(&of(vec![vec![0.05, 0.06], vec![0.04, 0.05]])).unwrap();
        assert!(even.contains("in 0 of 4") && !even.contains("easy"), "{even}");
    }

    #[test]
    fn training_says_whether_more_steps_would_help() {
        let point = |step, best| ValidationPoint { step, best, ..ValidationPoint::default() };
        let of = |points: [ValidationPoint; 2]| {
            training(&Metrics { train: Vec::new(), validation: points.to_vec() })
        };
        assert!(of([point(50, true), point(100, true)]).unwrap().contains("may help"));
        assert!(of([point(50, true), point(100, false)]).unwrap().contains("step 50 of 100"));
        assert!(training(&Metrics::default()).is_none());
    }
}
