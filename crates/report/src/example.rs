//! The worked example: a context's tokens, shaded by how many KV pairs each method keeps of them.
//!
//! The page shows one choice without scripts; the counts of all others travel in it as text, one
//! or two characters per position, and `templates/example.js` reads them.

use std::collections::BTreeMap;

use pkv_results::{FactAnswer, KeptCounts, WorkedExample};
use serde::Serialize;

use crate::chart::percent_text;
use crate::method::Methods;

/// Longer contexts are cut: a page of a million spans opens in no browser.
const MAX_TOKENS: usize = 8192;
/// The ratio shown first, or the one nearest to it.
const FIRST_RATIO: f64 = 0.05;
/// Digits of a count; `example.js` has the same.
const DIGITS: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_";
/// Shades of the page's style sheet, beside none.
const SHADES: f64 = 10.0;

/// Data of the template.
#[derive(Debug, Serialize)]
pub struct ExampleView {
    pub id: String,
    pub policy: String,
    pub pairs_per_position: u32,
    pub tokens: Vec<TokenView>,
    pub facts: Vec<FactView>,
    /// What is kept of a text when nothing is preferred, as first shown.
    pub budget: String,
    /// Of the facts' KV pairs, beside it.
    pub reading: Option<String>,
    pub methods: Vec<Button>,
    pub ratios: Vec<Button>,
    /// JSON for the script, safe inside `<script>`.
    pub data: String,
    /// A sentence if the context was cut.
    pub cut: Option<String>,
}

/// A token as first shown.
#[derive(Debug, Serialize)]
pub struct TokenView {
    pub text: String,
    /// Class of the shade, and `f` inside of a fact.
    pub class: String,
}

/// One choice of the selector.
#[derive(Debug, Serialize)]
pub struct Button {
    /// As the script's data spells it.
    pub value: String,
    pub text: String,
    /// Pressed at first.
    pub first: bool,
}

#[derive(Debug, Serialize)]
pub struct FactView {
    pub question: String,
    pub answer: String,
    /// Answer from the cache, as first shown, with whether it is right.
    pub said: String,
    /// Kept share of the fact's own KV pairs, as first shown.
    pub kept: String,
}

/// Data of the script.
#[derive(Serialize)]
struct Data<'a> {
    pairs: u32,
    digits_per_count: usize,
    facts: Vec<(usize, usize)>,
    /// By method, then by ratio.
    kept: BTreeMap<&'a str, BTreeMap<String, String>>,
    /// Likewise; one answer for each fact, empty where the context was not asked.
    said: BTreeMap<&'a str, BTreeMap<String, Vec<String>>>,
}

/// Name of the example that is the first context of the `facts` task.
const FIRST_OF_FACTS: &str = "facts-0";

/// `samples` are the answers to all facts. `None` if there is nothing to show.
pub fn view(methods: Methods, example: &WorkedExample, samples: &[FactAnswer]) -> Option<ExampleView> {
    let n = example.tokens.len().min(MAX_TOKENS);
    let pairs = example.pairs_per_position.max(1);
    // Counts of another length would shade the wrong tokens.
    let kept: Vec<&KeptCounts> =
        example.kept.iter().filter(|k| k.counts.len() == example.tokens.len()).collect();
    let first = first_choice(methods, &kept)?;
    let shown = &first.counts[..n];
    let facts: Vec<_> = example.facts.iter().filter(|f| f.len > 0 && f.start + f.len <= n).collect();
    let in_fact = |i: usize| facts.iter().any(|f| (f.start..f.start + f.len).contains(&i));
    let tokens = example.tokens[..n]
        .iter()
        .zip(shown)
        .enumerate()
        .map(|(i, (text, &count))| TokenView {
            text: text.clone(),
            class: format!("k{}{}", shade(count, pairs), if in_fact(i) { " f" } else { "" }),
        })
        .collect();
    let share = |start: usize, len: usize| {
        let kept: u64 = shown[start..start + len].iter().map(|&c| u64::from(c)).sum();
        kept as f64 / (u64::from(pairs) * len as u64) as f64
    };
    let digits_per_count = if pairs < 64 { 1 } else { 2 };
    let mut by_method: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for k in &kept {
        let text = encode(&k.counts[..n], digits_per_count);
        by_method.entry(k.method.name()).or_default().insert(k.ratio.to_string(), text);
    }
    let said = |question: &str, k: &KeptCounts| {
        let cell = Some((k.method, example.policy, k.ratio));
        let of_context = |s: &&FactAnswer| example.id == FIRST_OF_FACTS && s.place.0 == 0;
        let mut found = samples.iter().filter(of_context).filter(|s| s.question == question);
        let answer = found.find(|s| s.cell == cell)?;
        Some(format!("{} {}", if answer.is_right { "✓" } else { "✗" }, answer.answer.trim()))
    };
    let mut said_by_method: BTreeMap<&str, BTreeMap<String, Vec<String>>> = BTreeMap::new();
    for k in &kept {
        let answers = facts.iter().map(|f| said(&f.question, k).unwrap_or_default()).collect();
        said_by_method.entry(k.method.name()).or_default().insert(k.ratio.to_string(), answers);
    }
    let mean_kept = facts.iter().map(|f| share(f.start, f.len)).sum::<f64>() / facts.len().max(1) as f64;
    let data = Data {
        pairs,
        digits_per_count,
        said: said_by_method,
        facts: facts.iter().map(|f| (f.start, f.len)).collect(),
        kept: by_method,
    };
    let mut ratios: Vec<f64> = kept.iter().map(|k| k.ratio).collect();
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios.dedup();
    Some(ExampleView {
        id: example.id.clone(),
        policy: example.policy.name().to_owned(),
        pairs_per_position: pairs,
        tokens,
        facts: facts
            .iter()
            .map(|f| FactView {
                question: f.question.clone(),
                answer: f.answer.clone(),
                said: said(&f.question, first).unwrap_or_default(),
                kept: format!("{:.0}%", 100.0 * share(f.start, f.len)),
            })
            .collect(),
        budget: percent_text(first.ratio),
        reading: (!facts.is_empty()).then(|| {
            format!(
                "{}: {:.0}% of the KV pairs of the {} facts here are kept, {:.1} times what an even choice of {} would keep.",
                first.method.name(),
                100.0 * mean_kept,
                facts.len(),
                mean_kept / first.ratio,
                percent_text(first.ratio)
            )
        }),
        methods: methods.ordered(kept.iter().map(|k| k.method))
            .into_iter()
            .map(|m| Button {
                value: m.name().to_owned(),
                text: m.name().to_owned(),
                first: m == first.method,
            })
            .collect(),
        ratios: ratios
            .into_iter()
            .map(|r| Button { value: r.to_string(), text: percent_text(r), first: r == first.ratio })
            .collect(),
        // `<` would let a string end the script element.
        data: serde_json::to_string(&data).ok()?.replace('<', "\\u003c"),
        cut: (n < example.tokens.len())
            .then(|| format!("Only the first {n} of {} tokens are shown.", example.tokens.len())),
    })
}

fn first_choice<'a>(methods: Methods, kept: &[&'a KeptCounts]) -> Option<&'a KeptCounts> {
    let first = *methods.ordered(kept.iter().map(|k| k.method)).first()?;
    let distance = |k: &KeptCounts| (k.ratio.ln() - FIRST_RATIO.ln()).abs();
    kept.iter().filter(|k| k.method == first).copied().min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

/// 0 if nothing is kept, else 1 to 10 by the square root of the kept share: few heads keep most positions.
fn shade(count: u32, pairs: u32) -> u32 {
    let share = f64::from(count.min(pairs)) / f64::from(pairs);
    (share.sqrt() * SHADES).ceil() as u32
}

fn encode(counts: &[u32], digits: usize) -> String {
    let mut out = String::with_capacity(counts.len() * digits);
    for &count in counts {
        let count = count.min(64u32.pow(digits as u32) - 1);
        for place in (0..digits as u32).rev() {
            let digit = count / 64u32.pow(place) % 64;
            out.push(char::from(DIGITS[digit as usize]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;
    use pkv_core::Policy;
    use pkv_recipe::MethodName;
    use pkv_results::FactSpan;

    fn example() -> WorkedExample {
        WorkedExample {
            id: "doc</script>".to_owned(),
            tokens: ["a", " <b>", " c"].map(str::to_owned).to_vec(),
            facts: vec![FactSpan { start: 1, len: 2, question: "q".to_owned(), answer: "a".to_owned() }],
            policy: Policy::Pair,
            pairs_per_position: 36,
            kept: vec![
                KeptCounts { method: MethodName::KVZIP, ratio: 0.05, counts: vec![0, 36, 1] },
                KeptCounts { method: MethodName::MAPPER, ratio: 0.2, counts: vec![1, 2, 3] },
                KeptCounts { method: MethodName::MAPPER, ratio: 0.03, counts: vec![0, 9, 36] },
                KeptCounts { method: MethodName::RANDOM, ratio: 0.03, counts: vec![0, 9] },
            ],
        }
    }

    #[test]
    fn the_mapper_near_five_percent_comes_first() {
        let sample = FactAnswer {
            place: (0, 0),
            question: "q".to_owned(),
            wanted: "a".to_owned(),
            cell: Some((MethodName::MAPPER, Policy::Pair, 0.03)),
            answer: "b ".to_owned(),
            is_right: false,
            context_tokens: None,
            kind: String::new(),
            depth: None,
            kept: None,
        };
        let shown = WorkedExample { id: FIRST_OF_FACTS.to_owned(), ..example() };
        let answered = view(METHODS, &shown, std::slice::from_ref(&sample)).unwrap();
        assert_eq!(answered.facts[0].said, "✗ b");
        assert!(
            answered
                .reading
                .unwrap()
                .contains("62% of the KV pairs of the 1 facts here are kept, 20.8 times")
        );
        let view = view(METHODS, &example(), &[sample]).unwrap();
        assert_eq!(view.facts[0].said, "", "an answer about another context");
        let classes: Vec<_> = view.tokens.iter().map(|t| t.class.as_str()).collect();
        assert_eq!(classes, ["k0", "k5 f", "k10 f"]);
        assert_eq!(view.facts[0].kept, "62%");
        assert_eq!(
            view.ratios.iter().filter(|r| r.first).map(|r| r.text.as_str()).collect::<Vec<_>>(),
            ["3%"]
        );
        assert_eq!(view.methods.len(), 2, "counts of another length are not offered");
        assert!(view.data.contains("\"0.05\":\"0A1\""), "{}", view.data);
    }

    #[test]
    fn counts_take_two_digits_where_one_is_too_few() {
        assert_eq!(encode(&[0, 63, 64, 4095, 5000], 2), "000_10____");
        assert_eq!(encode(&[0, 10, 63, 64], 1), "0a__");
    }

    #[test]
    fn nothing_kept_and_nothing_to_show() {
        assert_eq!((shade(0, 36), shade(1, 36), shade(36, 36), shade(99, 36)), (0, 2, 10, 10));
        assert!(view(METHODS, &WorkedExample { kept: Vec::new(), ..example() }, &[]).is_none());
        let outside = FactSpan { start: 2, len: 9, question: String::new(), answer: String::new() };
        assert!(
            view(METHODS, &WorkedExample { facts: vec![outside], ..example() }, &[])
                .unwrap()
                .facts
                .is_empty()
        );
    }
}
