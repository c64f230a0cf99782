//! Target features from the prefill that `label` makes: whether this is possible, and which examples lack
//! them.
//!
//! The rows are byte for byte those that `extract` would write, in its folder and under its fingerprint:
//! `extract` finds them complete, or continues after the last one. Labels never depend on them: where
//! features cannot be taken, `label` works alone.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use pkv_core::{Fingerprint, ModelShape, Source};
use pkv_extract::Extractor;
use pkv_gpu::unless_exhausted;
use pkv_lm::{KvCache, LanguageModel};
use pkv_recipe::ExtractSection;
use pkv_score::Requests;
use pkv_shard::{Example, FeatureRow, StageDir, StageWriter};

use super::extract::{self, OnHost};
use crate::pair::Found;
use crate::session::Session;

/// The features that a run of `label` takes as well.
pub struct Beside {
    section: ExtractSection,
    /// The first example that the folder lacks.
    first: u64,
    /// Memory ran out for taps; what is left belongs to `extract`.
    given_up: AtomicBool,
}

impl Beside {
    /// Open the folder of the target's features; nothing if the recipe does not take them with the labels, or
    /// the folder is of other choices or in use.
    pub fn open(
        s: &Session,
        target: &Found,
        upstream: &Fingerprint,
        total: u64,
    ) -> Option<(Self, BesideWriter)> {
        if !s.recipe.labels_give_features(target.tokenizer.prefix().len()) {
            return None;
        }
        let section = s.recipe.extract.of(Source::Target);
        let fingerprint = extract::fingerprint(s, Source::Target, target, upstream);
        let open = || -> Result<_> {
            let stage = StageDir::open(&s.run.features(Source::Target), "extract", &fingerprint)?;
            let (whole, shard) = (stage.rows(), s.recipe.data.shard_examples);
            Ok(match stage.is_complete() {
                true => (whole, None),
                false => {
                    let writer = StageWriter::new(stage, shard, section.store, Some(total))?;
                    (writer.rows(), Some(writer))
                }
            })
        };
        let (first, writer) = open()
            .inspect_err(|e| tracing::warn!("features of the target are left to `extract`: {e:#}"))
            .ok()?;
        let writer = BesideWriter { first, channels: section.channels.len(), writer, taken: 0 };
        Some((Self { section, first, given_up: AtomicBool::new(false) }, writer))
    }

    /// Prefill an example as `extract` does: the cache, which is the one that scoring reads, and the features
    /// unless the folder has those of `row`. Nothing if memory has no room for it.
    ///
    /// An example whose features are there is read in the same way, so that its labels do not depend on where
    /// a run was interrupted: on a GPU, attention uses another kernel when a tap is present.
    ///
    /// # Errors
    /// The model fails on it.
    pub fn prefill(
        &self,
        s: &Session,
        model: &LanguageModel,
        requests: &Requests,
        prefix: &[u32],
        (row, example): (u64, &Example),
    ) -> Result<Option<(KvCache, Option<OnHost>)>> {
        if self.given_up.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let read = unless_exhausted(|| {
            let extractor = Extractor::with_requests(model, requests, prefix, &self.section, &s.recipe.label);
            let (cache, features) = extractor.read(&example.tokens)?;
            let missing = row >= self.first;
            Ok((cache, missing.then(|| OnHost::begin(&features)).transpose()?))
        })?;
        if read.is_none() && !self.given_up.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "memory ran out while features of the target were taken from the prefill of {} tokens: the other examples' are left to `extract`",
                example.tokens.len()
            );
        }
        Ok(read)
    }
}

/// Writes them, in the order of the examples.
pub struct BesideWriter {
    first: u64,
    channels: usize,
    /// None once the folder is complete, or features failed to come.
    writer: Option<StageWriter<FeatureRow>>,
    taken: u64,
}

impl BesideWriter {
    /// The first example that lacks features which are to be taken.
    pub fn lacking(&self) -> Option<u64> {
        self.writer.as_ref().map(|_| self.first)
    }

    /// Add those of example `row`, if they are new. Rows have no gaps: at the first that is absent the writer
    /// goes, the folder keeps its whole shards, and `extract` continues there.
    ///
    /// # Errors
    /// They cannot be stored, or the disk fails.
    pub fn push(
        &mut self,
        (row, id): (u64, &str),
        shape: &ModelShape,
        positions: usize,
        features: Option<OnHost>,
    ) -> Result<()> {
        match (&mut self.writer, features) {
            (Some(writer), Some(features)) => {
                writer.push(features.row(id.to_owned(), shape, self.channels, positions)?)?;
                self.taken += 1;
            }
            (_, None) if row >= self.first => self.writer = None,
            _ => {}
        }
        Ok(())
    }

    /// As [`super::keep`].
    pub fn keep(self) {
        self.writer.into_iter().for_each(super::keep);
    }

    /// Mark the folder complete if all have come; how many came in this run.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn finish(self) -> Result<u64> {
        if let Some(writer) = self.writer {
            writer.finish()?;
            tracing::info!("features of the target are complete, from the prefill of `label`");
        }
        Ok(self.taken)
    }
}
