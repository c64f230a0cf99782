//! `prepare`: the mixture's examples, one after another.

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Progress, Split, hinted};
use pkv_hub::Hub;
use pkv_recipe::{Manifest, Recipe, Source};
use pkv_shard::Example;
use pkv_text::TextTokenizer;
use rand::Rng as _;

use crate::documents::Documents;
use crate::facts::{self, WordLists};
use crate::few::what_there_is;
use crate::files::files;
use crate::identity::DocumentHash;
use crate::planting::Planter;
use crate::scan::{Chosen, Reading, Scan, choose, scan};
use crate::summary::PrepareSummary;
use crate::tokens::encode_all;
use crate::window::windows;

/// Tokens of an example per planted fact: with more, the text would be little else.
const TOKENS_PER_FACT: usize = 40;

/// Make the examples of all splits and hand them to `sink`: training first, then validation, then
/// test; within a split by source, then by document.
///
/// Documents are read twice or more and never held: a first pass counts, later ones cut. Tokens are
/// cut, not text, so an example may begin or end within a word. The recipe's `facts.place` says where facts
/// are put.
///
/// # Errors
/// A file is absent or not what the manifest says; there are fewer windows than examples asked for;
/// or `sink` fails.
pub fn prepare(
    recipe: &Recipe,
    manifest: &Manifest,
    hub: &Hub,
    tokenizer: &TextTokenizer,
    progress: &dyn Progress,
    sink: &mut dyn FnMut(Example) -> Result<()>,
) -> Result<PrepareSummary> {
    let encode = |text: &str| tokenizer.encode(text);
    let decode = |tokens: &[u32]| tokenizer.decode(tokens);
    let planter = Planter { place: recipe.facts.place, encode: &encode, decode: &decode };
    let reading = Reading { data: &recipe.data, seed: recipe.seed, encode: &encode, progress };
    Preparation::new(manifest, hub, reading, planter)?.run(sink)
}

/// Everything that making examples needs.
struct Preparation<'a> {
    manifest: &'a Manifest,
    /// Files of every source.
    files: Vec<Vec<PathBuf>>,
    words: Option<WordLists>,
    reading: Reading<'a>,
    planter: Planter<'a>,
}

impl<'a> Preparation<'a> {
    fn new(manifest: &'a Manifest, hub: &Hub, reading: Reading<'a>, planter: Planter<'a>) -> Result<Self> {
        let files = manifest.sources.iter().map(|s| files(manifest, s, hub)).collect::<Result<_>>()?;
        let words = manifest.facts.as_ref().map(|_| word_lists(manifest)).transpose()?;
        Ok(Self { manifest, files, words, reading, planter })
    }

    fn run(&self, sink: &mut dyn FnMut(Example) -> Result<()>) -> Result<PrepareSummary> {
        let Reading { data, seed, progress, .. } = self.reading;
        let counts = [data.train, data.validation, data.test];
        progress.start("preparing examples", counts.iter().sum::<usize>() as u64, 0);
        let shares = Split::ALL.map(|split| {
            let weight = |s: &Source| if s.splits.contains(&split) { s.weight } else { 0.0 };
            apportion(counts[split as usize], &self.manifest.sources.iter().map(weight).collect::<Vec<_>>())
        });

        let mut seen = HashSet::new();
        let mut scans = Vec::new();
        for (i, source) in self.manifest.sources.iter().enumerate() {
            let wanted = [shares[0][i], shares[1][i], shares[2][i]];
            let files = self.files[i].clone();
            scans.push(scan(source, files, wanted, &mut seen, self.reading)?);
        }
        drop(seen);
        self.check_enough(&scans, &shares)?;

        let mut summary = PrepareSummary::default();
        for split in Split::ALL {
            let mut number = 0;
            for (i, scan) in scans.iter_mut().enumerate() {
                let mut rng = seed.stream(&format!("data.choose.{}", split.name()), i as u64);
                let chosen = choose(&scan.candidates[split as usize], shares[split as usize][i], &mut rng);
                self.cut(&self.manifest.sources[i], &self.files[i], split, chosen, &mut |mut example| {
                    example.id = format!("{}-{number:06}", split.name());
                    number += 1;
                    let counts = &mut scan.summary.splits[split as usize];
                    counts.examples += 1;
                    counts.tokens += example.tokens.len() as u64;
                    summary.facts += example.facts.len() as u64;
                    summary.tokens += example.tokens.len() as u64;
                    summary.examples += 1;
                    sink(example)?;
                    progress.advance(1);
                    Ok(())
                })?;
            }
        }
        summary.sources = scans.into_iter().map(|s| s.summary).collect();
        progress.finish();
        Ok(summary)
    }

    /// Read a source again and cut the chosen windows out of it; examples have no id yet.
    fn cut(
        &self,
        source: &Source,
        files: &[PathBuf],
        split: Split,
        chosen: Vec<Chosen>,
        sink: &mut dyn FnMut(Example) -> Result<()>,
    ) -> Result<()> {
        let Reading { data, seed, encode, .. } = self.reading;
        let mut documents = Documents::new(source, files.to_vec());
        let mut chosen = chosen.into_iter().peekable();
        while chosen.peek().is_some() {
            let batch = documents.batch()?;
            ensure!(!batch.is_empty(), changed(source));
            let mut picked = Vec::new();
            for document in &batch {
                if let Some(c) = chosen.next_if(|c| c.ordinal == document.ordinal) {
                    ensure!(DocumentHash::of(&document.text) == c.hash, changed(source));
                    picked.push((document, c));
                }
            }
            let texts: Vec<_> = picked.iter().map(|(d, _)| d.text.as_str()).collect();
            for ((_, c), tokens) in picked.iter().zip(encode_all(encode, &texts)?) {
                let all = windows(tokens.len(), c.hash.window(data, split, seed), split, data);
                for &index in &c.windows {
                    let (window, range) = all[index as usize].clone();
                    let start = range.start as u64;
                    let (tokens, facts) = self.plant(c.hash, window, &tokens[range])?;
                    let (id, document, source) = (String::new(), c.hash.id(), source.name.clone());
                    sink(Example { id, document, source, split, window, start, tokens, facts })?;
                }
            }
        }
        Ok(())
    }

    /// A window's tokens with facts planted in them. The length stays: facts take the place of the
    /// window's last tokens.
    fn plant(
        &self,
        hash: DocumentHash,
        window: u32,
        tokens: &[u32],
    ) -> Result<(Vec<u32>, Vec<pkv_shard::PlantedFact>)> {
        let (Some(section), Some(words)) = (&self.manifest.facts, &self.words) else {
            return Ok((tokens.to_vec(), Vec::new()));
        };
        let mut rng = self.reading.seed.stream(&format!("data.facts.{}", hash.id()), u64::from(window));
        let count = rng.random_range(section.min..=section.max).min(tokens.len() / TOKENS_PER_FACT);
        let mut planted = Vec::new();
        let mut body = tokens.len();
        for fact in facts::generate(&mut rng, words, count)? {
            let room = self.planter.room(&fact)?;
            // A tokenizer that knows no English may need very many tokens.
            if room + tokens.len() / 2 > body {
                break;
            }
            body -= room;
            planted.push(fact);
        }
        self.planter.plant(&mut rng, tokens, tokens.len(), planted)
    }

    /// # Errors
    /// Some source has fewer windows than examples are wanted of it; all such are named.
    fn check_enough(&self, scans: &[Scan], shares: &[Vec<usize>; 3]) -> Result<()> {
        let mut short = Vec::new();
        let mut keys: Vec<&str> = Vec::new();
        for (i, scan) in scans.iter().enumerate() {
            for counts in &scan.summary.splits {
                let wanted = shares[counts.split as usize][i];
                if counts.possible < wanted as u64 {
                    short.push(format!(
                        "source `{}` gives {} of {wanted} {} examples ({} document{})",
                        scan.summary.name,
                        counts.possible,
                        counts.split.name(),
                        counts.documents,
                        if counts.documents == 1 { "" } else { "s" }
                    ));
                    keys.push(counts.split.name());
                }
            }
        }
        if short.is_empty() {
            return Ok(());
        }
        keys.sort_unstable();
        keys.dedup();
        let lower: Vec<_> = keys.iter().map(|k| format!("`data.{k}`")).collect();
        let shares: Vec<_> =
            keys.iter().filter(|k| **k != "train").map(|k| format!("raise `data.{k}_share`, ")).collect();
        let stride = if keys.contains(&"train") { ", `data.stride`" } else { "" };
        let skipped = |count: fn(&Scan) -> u64| scans.iter().map(count).sum::<u64>();
        let notes = format!(
            "skipped documents: {} shorter than `data.min_tokens` = {}, {} duplicates, {} empty",
            skipped(|s| s.summary.short),
            self.reading.data.min_tokens,
            skipped(|s| s.summary.duplicates),
            skipped(|s| s.summary.empty)
        );
        let data = self.reading.data;
        bail!(hinted(
            format!("too few documents: {}; {notes}", short.join("; ")),
            format!(
                "add documents to `{}`, lower {}, {}or cut more windows (lower `data.window_tokens`{stride} or \
                 `data.min_tokens`){}",
                if data.files.is_empty() { data.manifest.as_str() } else { "data.files" },
                lower.join(" and "),
                shares.concat(),
                what_there_is(&self.reading, self.manifest, scans)
            )
        ))
    }
}

fn changed(source: &Source) -> pkv_core::Hinted {
    hinted(
        format!("the files of source `{}` changed while they were read", source.name),
        "run the command again once nothing writes to them",
    )
}

/// The manifest's word lists for planted facts, or the built-in ones.
///
/// # Errors
/// The file that the manifest names is absent or holds no such lists.
pub fn word_lists(manifest: &Manifest) -> Result<WordLists> {
    let Some(words) = manifest.facts.as_ref().and_then(|f| f.words.as_ref()) else {
        return Ok(WordLists::built_in());
    };
    let beside = manifest.folder.join(words);
    WordLists::read(if beside.exists() { &beside } else { words.as_ref() }).context("cannot plant facts")
}

/// `total` split in proportion to `weights`: largest remainders first, then earlier ones.
fn apportion(total: usize, weights: &[f64]) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| total as f64 * w / sum).collect();
    let mut parts: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let missing = total.saturating_sub(parts.iter().sum());
    for &i in order.iter().take(missing) {
        parts[i] += 1;
    }
    parts
}

#[cfg(test)]
mod tests;
