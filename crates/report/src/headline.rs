//! The top of the page: what was trained and how good it is, for readers who do not know the project.

use std::fmt::Write;

use pkv_core::Policy;
use pkv_recipe::plan::{Machine, Plan, Work, human_count};
use pkv_recipe::{MethodName, ModelSection, Recipe};
use pkv_results::{AnswerCell, AnswerResults, Interval, LabelResults};
use serde::Serialize;

use crate::chart::percent_text;
use crate::figures::percent;
use crate::method::Methods;
use crate::page::Lead;
use crate::run::RunData;

/// The ratio that the headline speaks of, or the one nearest to it: where methods begin to part.
const HEADLINE_RATIO: f64 = 0.05;
/// A pruned cache that answers this share of what the full one answers counts as unharmed.
const UNHARMED: f64 = 0.95;

/// A mapper that costs more of its target's prefill belongs to a target of toy size.
pub const TOY_SHARE: f64 = 0.2;

#[derive(Serialize)]
pub struct Headline {
    pub title: String,
    pub target: String,
    /// Absent if no feature comes from it.
    pub proxy: Option<String>,
    /// Date, device, tool: what one line can hold.
    pub byline: Vec<String>,
    /// Paragraphs.
    pub lead: Vec<String>,
    pub tiles: Vec<Tile>,
}

/// One number in large type.
#[derive(Serialize)]
pub struct Tile {
    pub value: String,
    pub label: String,
    pub note: String,
}

/// `lead` is of the mapper's answers over those of each method, paired.
pub fn headline(methods: Methods, data: &RunData, lead: &Lead) -> Headline {
    let target = of_recipe(data, |r| Some(&r.target)).or(data.results.as_ref().map(|r| &r.target.name));
    let target = target.cloned().unwrap_or_else(|| "the target".to_owned());
    let proxy = proxy(data);
    let mut byline: Vec<String> = data.date.iter().cloned().collect();
    byline.push(format!("run {}", data.name));
    if let Some(device) = data.run.device.as_deref() {
        byline.push(match (device, data.run.threads) {
            ("cpu", Some(n)) => format!("{n} CPU thread{}", if n == 1 { "" } else { "s" }),
            _ => device.to_owned(),
        });
    }
    if let Some(tool) = &data.run.tool {
        byline.push(format!("proxykv-train {}", tool.version));
    }
    let mut paragraphs = vec![purpose(data, &target, proxy.as_deref())];
    paragraphs.extend(verdict(methods, data, lead));
    Headline {
        title: match &proxy {
            Some(proxy) => {
                format!("Pruning the cache of {} by the attention of {}", short(&target), short(proxy))
            }
            None => format!("Pruning the cache of {} by its own attention", short(&target)),
        },
        target,
        proxy,
        byline,
        lead: paragraphs,
        tiles: tiles(data),
    }
}

/// Name of the proxy, if features come from it: from the recipe, or else the results.
pub fn proxy(data: &RunData) -> Option<String> {
    if data.recipe.is_some() {
        return of_recipe(data, Recipe::read_proxy).cloned();
    }
    match &data.results {
        Some(results) => results.proxy.as_ref().map(|proxy| proxy.name.clone()),
        None => Some("the proxy".to_owned()),
    }
}

fn of_recipe<'a>(
    data: &'a RunData,
    section: impl Fn(&'a Recipe) -> Option<&'a ModelSection>,
) -> Option<&'a String> {
    Some(&section(data.recipe.as_ref()?)?.model)
}

/// The last part of a hub name or path; two parts where the last says only which of the two it is.
pub fn short(model: &str) -> String {
    let mut parts = model.trim_end_matches('/').rsplit('/');
    match (parts.next(), parts.next()) {
        (Some(last @ ("target" | "proxy" | "model")), Some(before)) => format!("{before} {last}"),
        (Some(last), _) => last.to_owned(),
        (None, _) => model.to_owned(),
    }
}

fn purpose(data: &RunData, target: &str, proxy: Option<&str>) -> String {
    let size = data.recipe.as_ref().map_or_else(String::new, |r| {
        format!(" ({} layers × {} KV heads)", r.target.shape.layers, r.target.shape.kv_heads)
    });
    let source = match proxy {
        Some(proxy) => format!("the attention of {}, a much smaller model of the same family", short(proxy)),
        None => "what the reading itself shows: no second model is needed".to_owned(),
    };
    format!(
        "While {} reads a text, it stores a key and a value for every token in every layer and KV head{size}: \
         a KV pair. Most of them are not needed later. KVzip finds out which: the model repeats what it read, which \
         costs several times the reading. Here a small network, the mapper, predicts KVzip's scores from {source}.",
        short(target)
    )
}

fn verdict(methods: Methods, data: &RunData, lead: &Lead) -> Option<String> {
    let facts = data.results.as_ref()?.facts.as_ref()?;
    let (policy, ratio) = choice(facts)?;
    let mapper = facts.cell(MethodName::MAPPER, policy, ratio)?;
    // What was asked of other contexts is not compared.
    let of = |m| facts.cell(m, policy, ratio).filter(|c| c.contexts == mapper.contexts);
    let questions = match mapper.contexts {
        Some(contexts) => format!("the questions about facts in {contexts} of the texts"),
        None => format!("{} questions about facts in the text", facts.questions),
    };
    let mut beside = vec![format!("{} with the full cache", percent(facts.full.mean))];
    let names = [
        (MethodName::KVZIP, "with KVzip's own choice"),
        (MethodName::LINEAR, "with a linear map of the same features"),
        (MethodName::HEAD_PRIOR, "when only the heads are chosen well and positions at random (head-prior)"),
        (MethodName::SNAPKV, "with SnapKV"),
        (MethodName::RANDOM, "at random"),
    ];
    beside
        .extend(names.iter().filter_map(|(m, text)| Some(format!("{} {text}", percent(of(*m)?.score.mean)))));
    let mut text = format!(
        "With {} of the KV pairs kept, the mapper's choice answers {} of {questions}. Beside it: {}.",
        percent_text(ratio),
        percent(mapper.score.mean),
        join(&beside)
    );
    if let Some(floor) = of(MethodName::HEAD_PRIOR) {
        // Over the same contexts, where every answer was stored: as the section of the answers says it.
        let lead = lead(policy).into_iter().find(|(m, r, _)| (*m, *r) == (MethodName::HEAD_PRIOR, ratio));
        text.push_str(match compare(mapper.score, floor.score, lead.map(|(.., v)| v)) {
            Clear::Above => " It is better than head-prior, which any method should beat.",
            Clear::Level => " It is not clearly better than head-prior, which any method should beat.",
            Clear::Below => " It is worse than head-prior, which any method should beat.",
        });
    }
    let measured = methods.ordered(facts.cells.iter().map(|c| c.method)).into_iter();
    let rivals = measured.filter(|&m| m != MethodName::MAPPER && !methods.is_oracle(m)).filter_map(of);
    let best = rivals.max_by(|a, b| a.score.mean.total_cmp(&b.score.mean));
    if let Some(best) = best.filter(|b| b.score.mean > mapper.score.mean) {
        let name = best.method.name();
        let _ = write!(text, " Better here: {name}, with {}.", percent(best.score.mean));
    }
    Some(text)
}

#[derive(Debug, PartialEq)]
enum Clear {
    Above,
    Level,
    Below,
}

/// By the interval of their difference, or where there is none by whether their own intervals overlap.
fn compare(mapper: Interval, floor: Interval, difference: Option<Interval>) -> Clear {
    let (low, high) =
        difference.map_or((mapper.low - floor.high, mapper.high - floor.low), |d| (d.low, d.high));
    match (low > 0.0, high < 0.0) {
        (true, _) => Clear::Above,
        (_, true) => Clear::Below,
        _ => Clear::Level,
    }
}

/// Policy and ratio that the headline speaks of: where the mapper answered on most contexts.
pub fn choice(facts: &AnswerResults) -> Option<(Policy, f64)> {
    let contexts = |c: &AnswerCell| c.contexts.unwrap_or(facts.contexts);
    let mapper = || facts.cells.iter().filter(|c| c.method == MethodName::MAPPER);
    let most = mapper().map(contexts).max()?;
    let policy = mapper().find(|c| contexts(c) == most)?.policy;
    let ratios = mapper().filter(|c| c.policy == policy && contexts(c) == most).map(|c| c.ratio);
    Some((policy, nearest(ratios)?))
}

pub fn nearest(ratios: impl Iterator<Item = f64>) -> Option<f64> {
    let distance = |r: f64| (r.ln() - HEADLINE_RATIO.ln()).abs();
    ratios.min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
}

fn tiles(data: &RunData) -> Vec<Tile> {
    let mut tiles = Vec::new();
    if let Some(results) = &data.results {
        if let Some(facts) = &results.facts {
            tiles.extend(answer_tiles(facts));
        }
        tiles.extend(recall_tile(&results.labels));
    }
    if let Some(recipe) = &data.recipe {
        let mapper = Plan::new(recipe, Machine::h200(), &Work::default()).mapper;
        // Beside a target of toy size any mapper looks expensive; `origin::limits` tells that instead.
        if mapper.share_of_prefill < TOY_SHARE {
            tiles.push(Tile {
                value: format!("{}%", significant(100.0 * mapper.share_of_prefill)),
                label: "of the target's prefill: the mapper's compute".to_owned(),
                note: format!("by count of operations; {} parameters", human_count(mapper.parameters)),
            });
        }
    }
    tiles
}

fn answer_tiles(facts: &AnswerResults) -> Vec<Tile> {
    let Some((policy, ratio)) = choice(facts) else { return Vec::new() };
    let Some(cell) = facts.cell(MethodName::MAPPER, policy, ratio) else { return Vec::new() };
    let mut tiles = vec![Tile {
        value: percent(cell.score.mean),
        label: format!("of questions answered with {} of the KV pairs", percent_text(ratio)),
        note: format!("{} with all of them; {}", percent(facts.full.mean), range(cell.score)),
    }];
    if let Some(of_kvzip) = facts.recovered(cell) {
        tiles.push(Tile {
            value: percent(of_kvzip.mean),
            label: format!("of KVzip's answers recovered at {} kept", percent_text(ratio)),
            note: range(of_kvzip),
        });
    }
    let unharmed = facts
        .cells
        .iter()
        .filter(|c| c.method == MethodName::MAPPER && c.policy == policy && c.contexts == cell.contexts)
        .filter(|c| c.score.mean >= UNHARMED * facts.full.mean)
        .map(|c| c.ratio)
        .reduce(f64::min);
    if let Some(smallest) = unharmed {
        tiles.push(Tile {
            value: format!("1/{}", significant(1.0 / smallest)),
            label: "of the cache is enough for 95% of the full cache's answers".to_owned(),
            note: "the smallest share measured that does".to_owned(),
        });
    }
    tiles
}

fn recall_tile(labels: &LabelResults) -> Option<Tile> {
    let policy = labels.cells.first()?.policy;
    let of = |m| labels.cells.iter().filter(move |c| c.policy == policy && c.method == m);
    let ratio = nearest(of(MethodName::MAPPER).map(|c| c.ratio))?;
    let recall = of(MethodName::MAPPER).find(|c| c.ratio == ratio)?.recall;
    let floor = of(MethodName::HEAD_PRIOR).find(|c| c.ratio == ratio);
    Some(Tile {
        value: percent(recall.mean),
        label: format!("of the KV pairs that KVzip keeps are found, at {} kept", percent_text(ratio)),
        note: floor.map_or_else(|| range(recall), |f| format!("head-prior {}", percent(f.recall.mean))),
    })
}

fn range(v: Interval) -> String {
    if v.high > v.low {
        format!("95% interval {} to {}", percent(v.low), percent(v.high))
    } else {
        String::new()
    }
}

/// Two significant digits, no exponent.
fn significant(v: f64) -> String {
    let digits = if v <= 0.0 { 0 } else { (1.0 - v.log10().floor()).clamp(0.0, 6.0) as usize };
    let text = format!("{v:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// `a, b and c`.
pub fn join(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paired_difference_decides_where_intervals_overlap() {
        let of = |mean, low, high| Interval { mean, low, high };
        let (mapper, floor) = (of(0.958, 0.917, 0.99), of(0.865, 0.792, 0.938));
        assert_eq!(compare(mapper, floor, None), Clear::Level);
        assert_eq!(compare(mapper, floor, Some(of(0.093, 0.03, 0.16))), Clear::Above);
        assert_eq!(compare(mapper, floor, Some(of(0.093, -0.01, 0.2))), Clear::Level);
        assert_eq!(compare(floor, of(0.99, 0.97, 1.0), None), Clear::Below);
    }

    #[test]
    fn numbers_in_sentences() {
        assert_eq!(significant(33.333), "33");
        assert_eq!(significant(0.1123), "0.11");
        assert_eq!(significant(20.0), "20");
        assert_eq!(significant(2.0), "2");
        assert_eq!(significant(0.0), "0");
        assert_eq!(join(&["a", "b", "c"].map(str::to_owned)), "a, b and c");
        assert_eq!(short("meta-llama/Llama-3.1-8B/"), "Llama-3.1-8B");
        assert_eq!(short("recipes/nano-llama/target"), "nano-llama target");
        assert_eq!(short("target"), "target");
        assert_eq!(nearest([0.2, 0.04, 0.01].into_iter()), Some(0.04));
    }
}
