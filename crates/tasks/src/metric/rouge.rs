//! ROUGE-L as two Python packages compute it; they disagree, and benchmarks use either.

use std::collections::{HashMap, HashSet};

use super::lcs::positions;

/// F-measure of ROUGE-L, package rouge 1.0.1 (`rouge_l_summary_level`, what LongBench reports).
///
/// Texts are cut at full stops and spaces. Words count once each, however often they stand in a text, and
/// subsequences of all sentence pairs are united. 0 where either text has no sentence, as LongBench's
/// `except` has it.
///
/// Differs: where sentences are so long that the package's recursion fails (about 1,000 words in both
/// together), LongBench counts 0; here they count.
pub fn rouge_l(answer: &str, wanted: &str) -> f64 {
    fn sentences(text: &str) -> Vec<Vec<&str>> {
        let pieces = text.split('.').filter(|s| !s.is_empty());
        // `"".split(" ")` is one empty word.
        let words = pieces.map(|s| s.split_whitespace().collect::<Vec<_>>());
        words.map(|w| if w.is_empty() { vec![""] } else { w }).collect()
    }
    let (a, w) = (sentences(answer), sentences(wanted));
    if a.is_empty() || w.is_empty() {
        return 0.0;
    }
    let mut union: HashSet<&str> = HashSet::new();
    for wanted in &w {
        for answer in &a {
            union.extend(positions(wanted, answer, false).into_iter().map(|i| wanted[i]));
        }
    }
    let distinct = |sentences: &[Vec<&str>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let (precision, recall) = (union.len() as f64 / distinct(&a), union.len() as f64 / distinct(&w));
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// F-measure of ROUGE-Lsum, package rouge-score 0.1.2 without stemming (what SCBench reports).
///
/// Texts are cut at line breaks; words are runs of ASCII letters and digits, lower case. No word counts more
/// often than it occurs in either text.
pub fn rouge_lsum(answer: &str, wanted: &str) -> f64 {
    fn sentences(text: &str) -> Vec<Vec<String>> {
        let words = |s: &str| {
            let s = s.to_lowercase();
            let runs = s.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
            runs.filter(|w| !w.is_empty()).map(str::to_owned).collect()
        };
        text.split('\n').filter(|s| !s.is_empty()).map(words).collect()
    }
    fn counts(sentences: &[Vec<String>]) -> HashMap<&str, usize> {
        let mut counts = HashMap::new();
        sentences.iter().flatten().for_each(|w| *counts.entry(w.as_str()).or_default() += 1);
        counts
    }
    let (a, w) = (sentences(answer), sentences(wanted));
    let words = |sentences: &[Vec<String>]| sentences.iter().map(Vec::len).sum::<usize>();
    let (n, m) = (words(&a), words(&w));
    if n == 0 || m == 0 {
        return 0.0;
    }
    let (mut left_a, mut left_w) = (counts(&a), counts(&w));
    let mut hits = 0;
    for wanted in &w {
        let mut union: Vec<usize> = a.iter().flat_map(|answer| positions(wanted, answer, true)).collect();
        union.sort_unstable();
        union.dedup();
        for i in union {
            let word = wanted[i].as_str();
            let (in_a, in_w) =
                (left_a.get(word).copied().unwrap_or(0), left_w.get(word).copied().unwrap_or(0));
            if in_a > 0 && in_w > 0 {
                hits += 1;
                left_a.insert(word, in_a - 1);
                left_w.insert(word, in_w - 1);
            }
        }
    }
    if hits == 0 {
        return 0.0;
    }
    let (precision, recall) = (f64::from(hits) / n as f64, f64::from(hits) / m as f64);
    2.0 * precision * recall / (precision + recall)
}
