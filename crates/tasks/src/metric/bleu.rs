//! Sentence BLEU with four orders, smoothed as NLTK's method 4 does: SCBench's similarity of functions.

use std::collections::HashMap;

/// `nltk.translate.bleu_score.sentence_bleu([wanted], answer, smoothing_function=method4)` of texts cut at
/// white space.
pub fn bleu(answer: &str, wanted: &str) -> f64 {
    // `re.split` of an empty text is one empty word.
    let words = |text: &str| -> Vec<String> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if words.is_empty() { vec![String::new()] } else { words }
    };
    let (answer, wanted) = (words(answer), words(wanted));
    let mut log_sum = 0.0;
    let mut smoothed = 0;
    for order in 1..=4 {
        let (shared, all) = shared(&answer, &wanted, order);
        if order == 1 && shared == 0 {
            return 0.0;
        }
        let mut precision = shared as f64 / all as f64;
        if shared == 0 && answer.len() > 1 {
            // `k` is 5; each order without a match counts half as much as the one before.
            smoothed += 1;
            precision = 1.0 / (2f64.powi(smoothed) * 5.0 / (answer.len() as f64).ln()) / all as f64;
        }
        if precision > 0.0 {
            log_sum += 0.25 * precision.ln();
        }
    }
    let (hypothesis, reference) = (answer.len() as f64, wanted.len() as f64);
    let brevity = if hypothesis > reference { 1.0 } else { (1.0 - reference / hypothesis).exp() };
    brevity * log_sum.exp()
}

/// n-grams of `answer` that `wanted` has too, each as often as in both, and all of them; at least one of
/// these.
fn shared(answer: &[String], wanted: &[String], order: usize) -> (usize, usize) {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    wanted.windows(order).for_each(|w| *counts.entry(w).or_default() += 1);
    let mut shared = 0;
    for window in answer.windows(order) {
        if let Some(n) = counts.get_mut(window).filter(|n| **n > 0) {
            *n -= 1;
            shared += 1;
        }
    }
    (shared, answer.windows(order).count().max(1))
}
