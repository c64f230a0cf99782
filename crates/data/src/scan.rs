//! The first pass over a source: which documents there are, and how many windows each would give.
//!
//! Nothing but hashes and counts stays in memory. A large source is read until there are four times
//! as many windows as examples are asked for; those are then drawn from all of them, so that
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
    pub windows: u32,
}

/// A document that examples are cut from, with indexes into its list of windows.
pub(crate) struct Chosen {
    pub ordinal: u64,
    pub hash: DocumentHash,
    pub windows: Vec<u32>,
}

/// What one source has to offer, per split.
pub(crate) struct Scan {
    pub candidates: [Vec<Candidate>; 3],
    pub summary: SourceSummary,
}

/// How documents are read and cut.
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
            } else if !full(&summary, hash.split(data)) {
                fresh.push((document, hash));
            }
        }
        let texts: Vec<_> = fresh.iter().map(|(d, _)| d.text.as_str()).collect();
        for ((document, hash), tokens) in fresh.iter().zip(encode_all(encode, &texts)?) {
            let split = hash.split(data);
            let found = windows(tokens.len(), hash.window(data, split, seed), data).len() as u32;
            if found == 0 {
                summary.short += 1;
                continue;
            }
            let counts = &mut summary.splits[split as usize];
            counts.documents += 1;
            counts.possible += u64::from(found);
            candidates[split as usize].push(Candidate {
                ordinal: document.ordinal,
                hash: *hash,
                windows: found,
            });
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

/// `count` of the candidates' windows, each set of them equally likely, in the order they stand in.
///
/// There must be as many.
pub(crate) fn choose(candidates: &[Candidate], count: usize, rng: &mut Rng) -> Vec<Chosen> {
    let mut left: u64 = candidates.iter().map(|c| u64::from(c.windows)).sum();
    let mut needed = count as u64;
    assert!(needed <= left, "more windows are asked for than there are");
    let mut chosen = Vec::new();
    for candidate in candidates {
        let mut windows = Vec::new();
        for window in 0..candidate.windows {
            // Selection sampling: Knuth, volume 2, algorithm 3.4.2 S.
            if rng.random_range(0..left) < needed {
                windows.push(window);
                needed -= 1;
            }
            left -= 1;
        }
        if !windows.is_empty() {
            chosen.push(Chosen { ordinal: candidate.ordinal, hash: candidate.hash, windows });
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_is_equally_likely() {
        let candidates: Vec<_> = [3, 1, 6]
            .into_iter()
            .enumerate()
            .map(|(i, windows)| Candidate { ordinal: i as u64, hash: DocumentHash::of(""), windows })
            .collect();
        let mut counts = [0; 10];
        for seed in 0..4000 {
            let chosen = choose(&candidates, 4, &mut Seed(seed).stream("choose", 0));
            assert_eq!(chosen.iter().map(|c| c.windows.len()).sum::<usize>(), 4);
            for c in &chosen {
                for w in &c.windows {
                    counts[[0, 3, 4][c.ordinal as usize] + *w as usize] += 1;
                }
            }
        }
        // 1600 expected, standard deviation 31.
        assert!(counts.iter().all(|c| (1600i32 - c).abs() < 125), "{counts:?}");
        let all = choose(&candidates, 10, &mut Seed(1).stream("choose", 0));
        assert_eq!(all.iter().map(|c| c.windows.len()).collect::<Vec<_>>(), [3, 1, 6]);
        assert!(choose(&candidates, 0, &mut Seed(1).stream("choose", 0)).is_empty());
    }
}
