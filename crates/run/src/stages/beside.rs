//! Target features from the prefill that `label` makes: whether this is possible, and which examples lack
//! them.
//!
//! The rows are byte for byte those that `extract` would write, in its folder and under its fingerprint:
//! `extract` finds them complete, or continues after the last one. Labels never depend on them: where
//! features cannot be taken, `label` works alone.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use pkv_core::{Fingerprint, ModelShape, Source, StoreDtype};
use pkv_extract::Extractor;
use pkv_gpu::unless_exhausted;
use pkv_lm::{KvCache, LanguageModel};
use pkv_recipe::ExtractSection;
use pkv_score::{ModelFiles, Requests};
use pkv_shard::{Claimed, Ended, Example, FeatureRow, Piece, PieceWriter, Pieces, Seal};
use pkv_shard::{Stage, StageDir, StageWriter, check_row};

use super::extract::{self, OnHost};
use super::pieces;
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
        target: &ModelFiles,
        upstream: &Fingerprint,
        total: u64,
    ) -> Option<(Self, BesideWriter)> {
        let (section, folder, fingerprint) = wanted(s, target, upstream)?;
        let open = || -> Result<_> {
            let stage = StageDir::open(&folder, "extract", &fingerprint)?;
            let (whole, shard) = (stage.rows(), s.recipe.data.shard_examples);
            Ok(match stage.is_complete() {
                true => (whole, None),
                false => {
                    let writer = StageWriter::new(stage, shard, section.store, Some(total))?;
                    (writer.rows(), Some(writer))
                }
            })
        };
        let (first, writer) = or_left("the target", open())?;
        let writer = BesideWriter { first, channels: section.channels.len(), writer, taken: 0 };
        Some((Self { section, first, given_up: AtomicBool::new(false) }, writer))
    }

    /// As [`Beside::open`], for a stage that is made in pieces.
    pub fn open_pieces(
        s: &Session,
        target: &ModelFiles,
        upstream: &Fingerprint,
        total: u64,
    ) -> Option<(Self, BesidePieces)> {
        let (section, folder, fingerprint) = wanted(s, target, upstream)?;
        let pieces = pieces::open_part(s, Stage::Extract, &folder, &fingerprint, total);
        let pieces = or_left("the target", pieces)?;
        let (store, channels) = (section.store, section.channels.len());
        // Where the folder is complete, examples are read in the same way, and no features are kept.
        let first = if pieces.is_some() { 0 } else { total };
        let this = Self { section, first, given_up: AtomicBool::new(false) };
        Some((this, BesidePieces { pieces, store, channels }))
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

/// The part of `extract` that the target's features are made with, their folder, and all their choices;
/// nothing if the recipe does not take them with the labels.
fn wanted(
    s: &Session,
    target: &ModelFiles,
    upstream: &Fingerprint,
) -> Option<(ExtractSection, PathBuf, Fingerprint)> {
    let source = Source::Target;
    s.recipe.labels_give_features(target.tokenizer.prefix().len()).then(|| {
        let fingerprint = extract::fingerprint(s, source, target, upstream);
        (s.recipe.extract.of(source), s.run.features(source), fingerprint)
    })
}

/// Without `result`, features of `what` are left to `extract`, with a warning.
fn or_left<T>(what: &str, result: Result<T>) -> Option<T> {
    result.inspect_err(|e| tracing::warn!("features of {what} are left to `extract`: {e:#}")).ok()
}

/// Writes them, piece by piece.
pub struct BesidePieces {
    /// None if the folder is complete.
    pieces: Option<Pieces>,
    store: StoreDtype,
    channels: usize,
}

/// A piece of features.
pub struct BesidePiece<'a> {
    of: &'a Pieces,
    piece: Piece,
    channels: usize,
    store: StoreDtype,
    /// None once features failed to come: the piece is left to `extract`.
    writer: Option<PieceWriter<'a, FeatureRow>>,
    tokens: u64,
}

impl BesidePieces {
    /// The features of a piece, if they are missing and no other process makes them.
    pub fn claim(&self, shard: u64) -> Option<BesidePiece<'_>> {
        let of = self.pieces.as_ref()?;
        let Claimed::Free(piece) = or_left(&format!("piece {shard}"), of.claim(shard))? else { return None };
        let writer = Some(of.writer(&piece, self.store));
        let (store, channels) = (self.store, self.channels);
        Some(BesidePiece { of, piece, channels, store, writer, tokens: 0 })
    }

    /// Make the folder complete, if all have come.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn seal(&self) -> Result<()> {
        if let Some(pieces) = &self.pieces
            && let Seal::Done(Some(_)) = pieces.seal()?
        {
            tracing::info!("features of the target are complete, from the prefill of `label`");
        }
        Ok(())
    }
}

impl BesidePiece<'_> {
    /// Take the first rows that an earlier process kept, `most` of them at most; how many there were.
    ///
    /// # Errors
    /// The disk fails.
    pub fn go_on(&mut self, most: usize) -> Result<usize> {
        let Some(writer) = &mut self.writer else { return Ok(0) };
        let mut kept = if most > 0 { self.of.kept::<FeatureRow>(&self.piece) } else { Vec::new() };
        kept.truncate(most);
        let n = kept.len();
        for row in kept {
            self.tokens += u64::from(row.positions);
            writer.push(row)?;
        }
        Ok(n)
    }

    /// As [`pieces::keep_piece`].
    pub fn keep(self) {
        self.writer.into_iter().for_each(pieces::keep_piece);
    }

    /// Add the next ones; where they are absent or cannot be stored, the piece is given up.
    ///
    /// # Errors
    /// The disk fails.
    pub fn push(
        &mut self,
        id: &str,
        shape: &ModelShape,
        positions: usize,
        features: Option<OnHost>,
    ) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let row = features.map(|features| {
            let row = features.row(id.to_owned(), shape, self.channels, positions)?;
            check_row(&row, self.store).map(|()| row)
        });
        match row.and_then(|row| or_left(&format!("piece {}", self.piece.shard), row)) {
            Some(row) => {
                self.tokens += positions as u64;
                writer.push(row)?;
            }
            None => self.writer = None,
        }
        Ok(())
    }

    /// End the piece, if the labels' piece is `labels` and all features have come.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn end(self, labels: &Ended) -> Result<()> {
        let Some(writer) = self.writer.filter(|_| labels.failed.is_empty()) else { return Ok(()) };
        let ended =
            Ended { done: labels.done, file: writer.publish()?, tokens: self.tokens, ..Ended::default() };
        self.of.end(self.piece, ended).map(drop)
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
