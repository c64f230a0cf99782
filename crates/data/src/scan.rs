//! The first pass over a source: which documents there are, and how many windows each would give.
//!
//! Nothing but hashes and counts stays in memory. A large source is read until there are four times
//! as many windows as examples are asked for; examples are then drawn from all of them, so that
//! examples come from many documents and not from the first few.

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::Result;
use pkv_core::{Progress, Rng, Seed, Split};
use pkv_recipe::{DataSection, Source};
use rand::Rng as _;

use crate::documents::Documents;
use crate::identity::DocumentHash;
use crate::summary::SourceSummary;
use crate::tokens::{Encode, encode_all};
use crate::window::windows;

/// Windows looked at per example asked for.
const POOL: u64 = 4;

/// A document that examples may be cut from.
pub(crate) struct Candidate {
    pub ordinal: u64,
    pub hash: DocumentHash,
    pub tokens: usize,
    /// Tokens of each of its windows.
    pub windows: Vec<u32>,
}

/// A document that examples are cut from, with indexes into its list of windows.
pub(crate) struct Chosen {
    pub ordinal: u64,
    pub hash: DocumentHash,
    pub windows: Vec<u32>,
}

/// Documents and windows of one source, per split.
pub(crate) struct Scan {
    pub candidates: [Vec<Candidate>; 3],
    pub summary: SourceSummary,
}

/// Settings for reading and cutting documents.
#[derive(Clone, Copy)]
pub(crate) struct Reading<'a> {
    pub data: &'a DataSection,
    pub seed: Seed,
    pub encode: &'a Encode<'a>,
    pub progress: &'a dyn Progress,
}

/// Read `source` as far as `wanted` examples per split need it. `seen` holds the documents of this and
/// earlier sources.
pub(crate) fn scan(
    source: &Source,
    files: Vec<PathBuf>,
    wanted: [usize; 3],
    seen: &mut HashSet<DocumentHash>,
    Reading { data, seed, encode, progress }: Reading,
) -> Result<Scan> {
    let mut summary = SourceSummary::new(&source.name, files.len());
    let mut candidates = [Vec::new(), Vec::new(), Vec::new()];
    let mut documents = Documents::new(source, files);
    let full = |summary: &SourceSummary, split: Split| {
        summary.splits[split as usize].possible >= POOL * wanted[split as usize] as u64
    };
    while !Split::ALL.iter().all(|s| full(&summary, *s)) {
        let batch = documents.batch()?;
        if batch.is_empty() {
            summary.exhausted = true;
            break;
        }
        summary.documents += batch.len() as u64;
        let mut fresh = Vec::new();
        for document in &batch {
            let hash = DocumentHash::of(&document.text);
            if !seen.insert(hash) {
                summary.duplicates += 1;
            } else if !full(&summary, source.split(hash.split(data))) {
                fresh.push((document, hash));
            }
        }
        let texts: Vec<_> = fresh.iter().map(|(d, _)| d.text.as_str()).collect();
        for ((document, hash), tokens) in fresh.iter().zip(encode_all(encode, &texts)?) {
            let split = source.split(hash.split(data));
            let found = windows(tokens.len(), hash.window(data, split, seed), split, data);
            if found.is_empty() {
                summary.short += 1;
                continue;
            }
            let counts = &mut summary.splits[split as usize];
            counts.documents += 1;
            counts.possible += found.len() as u64;
            let windows = found.into_iter().map(|(_, range)| range.len() as u32).collect();
            let (ordinal, tokens) = (document.ordinal, tokens.len());
            candidates[split as usize].push(Candidate { ordinal, hash: *hash, tokens, windows });
        }
        progress.note(&format!("{}: {} documents read", source.name, summary.documents));
    }
    summary.empty = documents.empty;
    for (count, what) in [
        (summary.empty, "without text"),
        (summary.duplicates, "that stood somewhere before"),
        (summary.short, "shorter than `data.min_tokens`"),
    ] {
        if count > 0 {
            tracing::warn!("source `{}`: skipped {count} documents {what}", source.name);
        }
    }
    Ok(Scan { candidates, summary })
}

/// `count` of the candidates' windows, in the order they stand in, drawn with chances in proportion to
/// their length.
///
/// A document cut into short windows has many of them. Were all equally likely, most examples would be
/// short; so, the lengths of the recipe's list come about equally often.
///
/// There must be as many.
///
/// # Source
/// Weighted sampling without replacement: Efraimidis and Spirakis 2006, algorithm A.
pub(crate) fn choose(candidates: &[Candidate], count: usize, rng: &mut Rng) -> Vec<Chosen> {
    let mut keys = Vec::new();
    for (document, candidate) in candidates.iter().enumerate() {
        for (window, &tokens) in candidate.windows.iter().enumerate() {
            let u = 1.0 - rng.random::<f64>();
            keys.push((u.ln() / f64::from(tokens), document, window as u32));
        }
    }
    assert!(count <= keys.len(), "more windows are asked for than there are");
    keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    keys.truncate(count);
    keys.sort_unstable_by_key(|&(_, document, window)| (document, window));
    keys.chunk_by(|a, b| a.1 == b.1)
        .map(|same| {
            let Candidate { ordinal, hash, .. } = candidates[same[0].1];
            Chosen { ordinal, hash, windows: same.iter().map(|k| k.2).collect() }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(windows: &[&[u32]]) -> Vec<Candidate> {
        let hash = DocumentHash::of("");
        let one =
            |(i, w): (usize, &&[u32])| Candidate { ordinal: i as u64, hash, tokens: 0, windows: w.to_vec() };
        windows.iter().enumerate().map(one).collect()
    }

    #[test]
    fn chances_are_in_proportion_to_the_length() {
        let candidates = candidates(&[&[100, 100, 100], &[400], &[300]]);
        let mut counts = [0; 3];
        for seed in 0..4000 {
            let chosen = choose(&candidates, 1, &mut Seed(seed).stream("choose", 0));
            assert_eq!((chosen.len(), chosen[0].windows.len()), (1, 1));
            counts[chosen[0].ordinal as usize] += 1;
        }
        // 1200, 1600 and 1200 expected, standard deviation at most 31.
        let off = counts.iter().zip([1200, 1600, 1200]).map(|(c, e): (&i32, i32)| (c - e).abs()).max();
        assert!(off < Some(125), "{counts:?}");
    }

    #[test]
    fn windows_come_once_and_in_order() {
        let candidates = candidates(&[&[5, 5, 2], &[9], &[1, 1, 1, 1, 1, 7]]);
        for count in 0..=10 {
            for seed in 0..20 {
                let chosen = choose(&candidates, count, &mut Seed(seed).stream("choose", 0));
                let flat: Vec<_> =
                    chosen.iter().flat_map(|c| c.windows.iter().map(|w| (c.ordinal, *w))).collect();
                assert_eq!(flat.len(), count);
                assert!(flat.is_sorted_by(|a, b| a < b), "{flat:?}");
                assert!(flat.iter().all(|(d, w)| (*w as usize) < candidates[*d as usize].windows.len()));
            }
        }
    }
}
