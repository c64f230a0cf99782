//! Similarity of two strings as Python's `difflib.SequenceMatcher` has it.

use std::collections::HashMap;

/// `difflib.SequenceMatcher(None, a, b).ratio()`: 2 x matching characters / all characters.
///
/// Matching blocks are found greedily, longest first. As there (`autojunk`), characters that make up more
/// than a hundredth of a `b` of 200 characters or more do not begin a block.
pub fn ratio(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    b.iter().enumerate().for_each(|(j, c)| places.entry(*c).or_default().push(j));
    if b.len() >= 200 {
        places.retain(|_, at| at.len() <= b.len() / 100 + 1);
    }
    let mut open = vec![(0, a.len(), 0, b.len())];
    let mut matching = 0;
    while let Some((a_from, a_to, b_from, b_to)) = open.pop() {
        let (i, j, n) = longest(&a, &b, &places, (a_from, a_to, b_from, b_to));
        if n > 0 {
            matching += n;
            open.push((a_from, i, b_from, j));
            open.push((i + n, a_to, j + n, b_to));
        }
    }
    2.0 * matching as f64 / (a.len() + b.len()) as f64
}

/// `find_longest_match`: the earliest longest block, then grown over characters that may not begin one.
fn longest(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_from, a_to, b_from, b_to): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let (mut best_i, mut best_j, mut best) = (a_from, b_from, 0);
    let mut ending: HashMap<usize, usize> = HashMap::new();
    for (i, c) in a.iter().enumerate().take(a_to).skip(a_from) {
        let mut next = HashMap::new();
        for &j in places.get(c).map_or(&[][..], Vec::as_slice) {
            if j < b_from {
                continue;
            }
            if j >= b_to {
                break;
            }
            let n = 1 + if j > 0 { ending.get(&(j - 1)).copied().unwrap_or(0) } else { 0 };
            next.insert(j, n);
            if n > best {
                (best_i, best_j, best) = (i + 1 - n, j + 1 - n, n);
            }
        }
        ending = next;
    }
    while best_i > a_from && best_j > b_from && a[best_i - 1] == b[best_j - 1] {
        (best_i, best_j, best) = (best_i - 1, best_j - 1, best + 1);
    }
    while best_i + best < a_to && best_j + best < b_to && a[best_i + best] == b[best_j + best] {
        best += 1;
    }
    (best_i, best_j, best)
}
