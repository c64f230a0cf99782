//! Overrides with which too few documents are enough, for the hint of an error.

use pkv_core::Split;
use pkv_recipe::{DataSection, Manifest};

use crate::scan::{Candidate, Reading, Scan};
use crate::window::windows;

/// Share of the documents that go to validation, and as many to test, where the recipe's shares leave a
/// split without any.
const SHARE: f64 = 0.2;

/// `; or take what these documents give: ...`, or what they lack; nothing about several sources, whose
/// weights count, too.
pub(crate) fn what_there_is(reading: &Reading, manifest: &Manifest, scans: &[Scan]) -> String {
    let ([source], [scan]) = (manifest.sources.as_slice(), scans) else { return String::new() };
    let documents: Vec<&Candidate> = scan.candidates.iter().flatten().collect();
    let data = reading.data;
    let wanted = [data.train, data.validation, data.test];
    if source.splits.len() < Split::ALL.len() || documents.is_empty() {
        return String::new();
    }
    if documents.len() < Split::ALL.len() {
        return "; every document belongs to one split, so there must be 3 or more: cut long files into several"
            .to_owned();
    }
    let fitting = |data: &DataSection| {
        let found = possible(reading, data, &documents);
        let enough = found.iter().zip(wanted).all(|(&found, wanted)| found > 0 || wanted == 0);
        enough.then(|| [0, 1, 2].map(|i| found[i].min(wanted[i])))
    };
    let (shares, counts) = match fitting(data) {
        Some(counts) => (String::new(), counts),
        None => {
            let Some((validation_share, test_share)) = shares(&documents) else { return String::new() };
            let other = DataSection { validation_share, test_share, ..data.clone() };
            let Some(counts) = fitting(&other) else { return String::new() };
            let shares =
                format!(" --set data.validation_share={validation_share} --set data.test_share={test_share}");
            (shares, counts)
        }
    };
    let [train, validation, test] = counts;
    format!(
        "; or take what these documents give: `--set data.train={train} --set data.validation={validation} \
         --set data.test={test}{shares}`"
    )
}

/// Windows of each split.
fn possible(reading: &Reading, data: &DataSection, documents: &[&Candidate]) -> [usize; 3] {
    let mut found = [0; 3];
    for document in documents {
        let split = document.hash.split(data);
        let window = document.hash.window(data, split, reading.seed);
        found[split as usize] += windows(document.tokens, window, split, data).len();
    }
    found
}

/// Shares of validation and test with which each has a fifth of the documents, and one at least.
fn shares(documents: &[&Candidate]) -> Option<(f64, f64)> {
    let mut places: Vec<f64> = documents.iter().map(|document| document.hash.place()).collect();
    places.sort_by(f64::total_cmp);
    let each = ((places.len() as f64 * SHARE).round() as usize).max(1);
    let test = between(places[each - 1], places[each])?;
    let both = between(places[2 * each - 1], places[2 * each])?;
    // As it is read back.
    let validation = format!("{:.6}", both - test).parse().ok()?;
    Some((validation, test))
}

/// The shortest decimal above `low` and at most `high`.
fn between(low: f64, high: f64) -> Option<f64> {
    (1..=6).find_map(|digits| {
        let unit = 10_f64.powi(-digits);
        let text = format!("{:.*}", digits as usize, ((low / unit).floor() + 1.0) * unit);
        text.parse().ok().filter(|share| low < *share && *share <= high)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_short_and_between() {
        assert_eq!(between(0.123, 0.4), Some(0.2));
        assert_eq!(between(0.123, 0.137), Some(0.13));
        assert_eq!(between(0.1, 0.1005), Some(0.1001));
        assert_eq!(between(0.5, 0.500_000_01), None);
    }
}
