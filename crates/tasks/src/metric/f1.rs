//! F1 of the bags of words or characters of two texts, normalized as SQuAD does.

use std::collections::HashMap;
use std::hash::Hash;

/// F1 of lower-case words without punctuation and articles (LongBench, SCBench `qa_f1_score`).
pub fn words(answer: &str, wanted: &str) -> f64 {
    let (a, b) = (normalized(answer), normalized(wanted));
    f1(&a.split_whitespace().collect::<Vec<_>>(), &b.split_whitespace().collect::<Vec<_>>())
}

/// F1 of the characters of normalized Chinese (SCBench `qa_f1_score_zh`).
pub fn characters(answer: &str, wanted: &str) -> f64 {
    let characters = |text: &str| super::chinese::normalized(text).chars().collect::<Vec<_>>();
    f1(&characters(answer), &characters(wanted))
}

/// Harmonic mean of precision and recall of `answer`, repeated items counted as often as in both.
pub fn f1<T: Eq + Hash>(answer: &[T], wanted: &[T]) -> f64 {
    let mut counts: HashMap<&T, usize> = HashMap::new();
    wanted.iter().for_each(|w| *counts.entry(w).or_default() += 1);
    let mut same = 0;
    for item in answer {
        if let Some(n) = counts.get_mut(item).filter(|n| **n > 0) {
            *n -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (same as f64 / answer.len() as f64, same as f64 / wanted.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// `normalize_answer`: lower case, no ASCII punctuation, no articles.
pub(super) fn normalized(text: &str) -> String {
    let text = text.to_lowercase();
    let text: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // `\b(a|an|the)\b` as a whole word: letters, digits and `_` of any script are word characters.
    let mut out = String::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let end = rest.find(|c| word(c) != rest.starts_with(word)).unwrap_or(rest.len());
        let (piece, after) = rest.split_at(end);
        out.push_str(if matches!(piece, "a" | "an" | "the") { " " } else { piece });
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_and_punctuation_do_not_count() {
        assert_eq!(
            normalized("The cat, a-n other; theory").split_whitespace().collect::<Vec<_>>(),
            ["cat", "other", "theory"]
        );
        assert_eq!(words("the cat", "Cat!"), 1.0);
        assert_eq!(words("", "cat"), 0.0);
        assert!((words("cat cat dog", "cat dog bird") - 2.0 / 3.0).abs() < 1e-12);
    }
}
