//! Exact match and token F1 of short answers, as SQuAD measures them.
//!
//! # Source
//! P. Rajpurkar, J. Zhang, K. Lopyrev, P. Liang, "SQuAD: 100,000+ Questions for Machine Comprehension of
//! Text" (arXiv 1606.05250) and its `evaluate-v1.1.py`: `normalize_answer` (lower case, no ASCII punctuation,
//! no articles, single spaces), `exact_match_score`, `f1_score`, and the best of several wanted answers.

use serde::{Deserialize, Serialize};

use super::f1;

/// Two shares in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Squad {
    /// 1 if the normalized answer is a normalized wanted one, else 0.
    pub exact: f64,
    /// F1 of normalized words.
    pub f1: f64,
}

impl Squad {
    /// Compare an answer with those that count; the best of each figure.
    pub fn of<'a>(answer: &str, wanted: impl IntoIterator<Item = &'a str>) -> Self {
        let words = |text: &str| -> Vec<String> {
            f1::normalized(text).split_whitespace().map(str::to_owned).collect()
        };
        let answer = words(answer);
        wanted.into_iter().map(words).fold(Self { exact: 0.0, f1: 0.0 }, |best, wanted| Self {
            exact: best.exact.max(f64::from(answer == wanted)),
            f1: best.f1.max(f1::f1(&answer, &wanted)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_word_by_word_after_normalizing() {
        let of = |answer: &str, wanted: &[&str]| {
            let squad = Squad::of(answer, wanted.iter().copied());
            (squad.exact, squad.f1)
        };
        assert_eq!(of("The  Eiffel Tower.", &["eiffel tower"]), (1.0, 1.0));
        // One word of two and one of one: precision 1/2, recall 1.
        assert_eq!(of("Eiffel tower", &["the tower"]), (0.0, 2.0 / 3.0));
        // Precision 1/5, recall 1.
        let (exact, f1) = of("It is 4711, I think", &["4711"]);
        assert!(exact == 0.0 && (f1 - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(of("in 1999", &["2001", "1999", "in 1999"]), (1.0, 1.0), "the best of several");
        assert_eq!(of("", &["4711"]), (0.0, 0.0));
        assert_eq!(of("4711", &[]), (0.0, 0.0));
    }
}
