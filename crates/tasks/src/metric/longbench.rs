//! LongBench's own metrics: classes, paragraph numbers, counts, lines of code (`LongBench/metrics.py`).

use super::diff;

/// 1 over the number of classes that `answer` names, if `wanted` is one of them.
///
/// A class that is part of the wanted one's name does not count.
pub fn classification(answer: &str, wanted: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> = classes.iter().map(String::as_str).filter(|c| answer.contains(*c)).collect();
    // The reference removes from the list that it walks through, and so skips the entry after each that it
    // removes.
    let mut at = 0;
    while at < named.len() {
        let class = named[at];
        if wanted.contains(class) && class != wanted {
            // `list.remove` takes the first that is equal.
            let first = named.iter().position(|c| *c == class).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&wanted) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// Share of the numbers in `answer` that are the one after `label` in `wanted`.
pub fn retrieval(answer: &str, wanted: &str, label: &str) -> f64 {
    let number = wanted.split(label).skip(1).find_map(numbers_at_start);
    number.map_or(0.0, |n| count(answer, &n))
}

/// Share of the numbers in `answer` that are `wanted`, digit by digit.
pub fn count(answer: &str, wanted: &str) -> f64 {
    let numbers: Vec<&str> = answer.split(|c: char| !is_digit(c)).filter(|run| !run.is_empty()).collect();
    let right = numbers.iter().filter(|n| **n == wanted).count();
    if numbers.is_empty() { 0.0 } else { right as f64 / numbers.len() as f64 }
}

/// Similarity of the answer's first line that is code (no backquote, `#` or `//`) to the wanted line, in
/// whole percents.
pub fn code_similarity(answer: &str, wanted: &str) -> f64 {
    let lines = answer.trim_start_matches('\n').split('\n');
    let mut code = lines.filter(|l| !l.contains('`') && !l.contains('#') && !l.contains("//"));
    let line = code.next().unwrap_or_default();
    // fuzzywuzzy `fuzz.ratio`: equal strings are equal even if empty, an empty one is like no other.
    if line == wanted {
        return 1.0;
    }
    if line.is_empty() || wanted.is_empty() {
        return 0.0;
    }
    (100.0 * diff::ratio(line, wanted)).round_ties_even() / 100.0
}

fn numbers_at_start(text: &str) -> Option<String> {
    let digits: String = text.chars().take_while(|c| is_digit(*c)).collect();
    (!digits.is_empty()).then_some(digits)
}

/// `\d`: decimal digits of any script. Those of Chinese texts are ASCII's and the full-width ones.
fn is_digit(c: char) -> bool {
    c.is_ascii_digit() || ('０'..='９').contains(&c)
}
