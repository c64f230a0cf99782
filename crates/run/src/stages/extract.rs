//! `extract`: features of each source. Those of the target may already exist, from the prefill of `label`.

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, ModelShape, Source};
use pkv_extract::{ContextFeatures, Extractor, HiddenProjection};
use pkv_lm::LanguageModel;
use pkv_recipe::{ExtractSection, MissingFeatures};
use pkv_score::{ModelFiles, Requests};
use pkv_shard::{Example, FeatureRow, Pieces, Stage, StageDir, StageReader, StageWriter};
use serde_json::{Value, json};

use super::lanes::{Lane, lanes};
use super::pieces::{self, Opened, fill};
use super::pump::pump;
use super::to_host::ToHost;
use super::{Entry, Outcome, hidden, keep, prepare, require};
use crate::pair;
use crate::session::Session;
use crate::sweep::SharedOutput;

pub(super) const ENTRY: Entry = Entry {
    outputs,
    in_pieces: true,
    instead: "; with `extract.missing = \"generate\"` in the recipe, features are made where they are missing",
    ..Entry::new(
        Stage::Extract,
        "Extract features of the proxy or the target",
        // Labels where a channel is fitted to them.
        &[Stage::Prepare, Stage::Label],
        |s, _| run(s),
    )
};

/// Features that are not kept are none.
fn outputs(s: &Session) -> Result<Vec<SharedOutput>> {
    let (target, proxy) = pair::find_both(s)?;
    let examples = prepare::fingerprint(s, &target)?;
    let one = |&source: &Source| {
        let fingerprint = fingerprint(s, source, of_pair(source, &target, proxy.as_deref())?, &examples);
        Ok(SharedOutput { stage: Stage::Extract, folder: s.run.features(source), fingerprint })
    };
    s.recipe.extract.from.iter().filter(|_| !s.recipe.extract.is_transient()).map(one).collect()
}

fn run(s: &Session) -> Result<Outcome> {
    if s.recipe.extract.is_transient() {
        let why = "`extract.missing` is `generate` and `extract.after_use` is `delete`: features are made when they are read";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    let (target, proxy) = pair::find_both(s)?;
    let (examples, upstream) = prepare::examples(s, &target)?;
    let (mut done, mut missing) = (serde_json::Map::new(), None);
    for &source in &s.recipe.extract.from {
        let model = of_pair(source, &target, proxy.as_deref())?;
        match one(s, source, model, &examples, &upstream)? {
            Outcome::Done(summary) => drop(done.insert(source.name().to_owned(), summary)),
            Outcome::Piece(of_source) => missing = of_source.or(missing),
            Outcome::Skipped(_) => {}
        }
    }
    if missing.is_some() {
        return Ok(Outcome::Piece(missing));
    }
    if done.is_empty() {
        return Ok(Outcome::Skipped(format!("features of {} examples match the recipe", examples.len())));
    }
    // One source is summed up as it was when there was no other.
    let alone = s.recipe.extract.from.len() == 1;
    Ok(Outcome::Done(match done.values().next() {
        Some(summary) if alone => summary.clone(),
        _ => Value::Object(done),
    }))
}

/// The model of a source of features.
///
/// # Errors
/// It is the proxy, and the recipe reads none.
pub(super) fn of_pair<'a>(
    source: Source,
    target: &'a ModelFiles,
    proxy: Option<&'a ModelFiles>,
) -> Result<&'a ModelFiles> {
    match source {
        Source::Target => Ok(target),
        Source::Proxy => proxy.context("features are asked of a proxy, and the recipe reads none"),
    }
}

/// Features of one source, unless they are there.
fn one(
    s: &Session,
    source: Source,
    found: &ModelFiles,
    examples: &StageReader<Example>,
    upstream: &Fingerprint,
) -> Result<Outcome> {
    let fingerprint = fingerprint(s, source, found, upstream);
    let load = || Reader::load(s, source, found, examples, upstream);
    match pieces::open(s, Stage::Extract, &s.run.features(source), &fingerprint, examples.len())? {
        Opened::Complete => Ok(Outcome::Skipped("complete".to_owned())),
        Opened::Whole(stage) => whole(&load()?, stage),
        Opened::Pieces(pieces) => in_pieces(s, &pieces, source, examples.len(), load),
    }
}

/// A source's model, loaded, and what it reads.
struct Reader<'a> {
    s: &'a Session,
    source: Source,
    examples: &'a StageReader<Example>,
    section: ExtractSection,
    model: LanguageModel,
    hidden: Option<HiddenProjection>,
    requests: Requests,
    prefix: &'a [u32],
    shape: ModelShape,
    lanes: usize,
}

/// An example's id, number of positions and features.
type Extracted = (String, usize, OnHost);

impl<'a> Reader<'a> {
    fn load(
        s: &'a Session,
        source: Source,
        found: &'a ModelFiles,
        examples: &'a StageReader<Example>,
        upstream: &Fingerprint,
    ) -> Result<Self> {
        let section = s.recipe.extract.of(source);
        let model = pair::load(s, found)?;
        let hidden = match section.channels.iter().any(|c| c.is_fitted()) {
            true => Some(hidden::fitted(s, found, &model, examples, upstream)?),
            false => None,
        };
        let requests = Requests::new(&found.tokenizer, &s.recipe.label)?;
        let (shape, prefix) = (model.shape(), found.tokenizer.prefix());
        let lanes = lanes(model.placement(), &shape, s.recipe.data.longest_window());
        Ok(Self { s, source, examples, section, model, hidden, requests, prefix, shape, lanes })
    }

    /// A function for each lane.
    fn on_lanes(&self) -> Result<Vec<impl FnMut(Example) -> Result<Extracted> + Send>> {
        let Self { s, requests, section, prefix, hidden, .. } = self;
        let on = |lane: Lane| {
            // A lane is a thread, and tensors are not shared between threads.
            let hidden = hidden.as_ref().map(|hidden| hidden.to_device(s.device));
            move |example: Example| {
                s.stop.check()?;
                lane.on(|model| {
                    let extractor =
                        Extractor::with_requests(model, requests, prefix, section, &s.recipe.label)
                            .with_hidden(hidden.as_ref())?;
                    let features = extractor.features(&example.tokens)?;
                    Ok((example.id, example.tokens.len(), OnHost::begin(&features)?))
                })
            }
        };
        Ok(Lane::all(&self.model, self.lanes)?.into_iter().map(on).collect())
    }

    /// What makes a row of what was extracted: on the writer's thread, which has no model.
    fn to_row(&self) -> impl Fn(Extracted) -> Result<FeatureRow> + Send + use<> {
        let (shape, channels) = (self.shape, self.section.channels.len());
        move |(id, positions, features)| features.row(id, &shape, channels, positions)
    }
}

/// All rows, in order.
fn whole(reader: &Reader, stage: StageDir) -> Result<Outcome> {
    let Reader { s, source, examples, section, .. } = reader;
    let total = examples.len();
    let mut writer =
        StageWriter::<FeatureRow>::new(stage, s.recipe.data.shard_examples, section.store, Some(total))?;
    let done = writer.rows();
    let (mut tokens, to_row) = (0, reader.to_row());
    s.bar.start(&format!("extract: {}", source.name()), total, done);
    let times = pump(
        s.device,
        done..total,
        |i| examples.get(i),
        reader.on_lanes()?,
        |extracted| {
            let row = to_row(extracted)?;
            tokens += row.positions;
            writer.push(row)?;
            s.bar.advance(1);
            Ok(())
        },
    );
    let times = match times {
        Ok(times) => times,
        Err(e) => {
            keep(writer);
            return Err(e);
        }
    };
    s.bar.finish();
    tracing::debug!("extract from the {}: {times}", source.name());
    writer.finish()?;
    pieces::account(Stage::Extract, total, total - done, done)?;
    Ok(Outcome::Done(times.add_to(json!({"examples": total, "tokens": tokens}))))
}

/// The pieces of this process's task.
fn in_pieces<'a>(
    s: &Session,
    pieces: &Pieces,
    source: Source,
    total: u64,
    load: impl Fn() -> Result<Reader<'a>>,
) -> Result<Outcome> {
    let mut reader = None;
    let what = format!("extract: {}", source.name());
    let reached = pieces::each(s, &what, pieces, |piece, tally| {
        let reader = match &reader {
            Some(reader) => reader,
            None => &*reader.insert(load()?),
        };
        let (examples, store) = (reader.examples, reader.section.store);
        let read = |row| {
            let example = examples.get(row)?;
            Ok((example.id.clone(), example))
        };
        let kept = pieces.kept::<FeatureRow>(piece);
        let (lanes, to_row) = (reader.on_lanes()?, reader.to_row());
        fill(s, (&what, pieces, store), (piece, kept, tally), read, lanes, to_row, |row| row.positions)
    })?;
    Ok(Outcome::of_pieces(reached, total))
}

/// Features of one context on their way to the host.
pub(super) struct OnHost {
    heads: ToHost,
    globals: ToHost,
}

impl OnHost {
    /// # Errors
    /// The GPU has failed, or the host has no memory left.
    pub(super) fn begin(features: &ContextFeatures) -> Result<Self> {
        Ok(Self { heads: ToHost::begin(&features.heads_pct)?, globals: ToHost::begin(&features.globals_ct)? })
    }

    /// As they are stored, once they are there.
    ///
    /// # Errors
    /// The work that they come from failed on the GPU.
    pub(super) fn row(
        self,
        id: String,
        shape: &ModelShape,
        channels: usize,
        positions: usize,
    ) -> Result<FeatureRow> {
        Ok(FeatureRow {
            id,
            layers: shape.layers as u32,
            kv_heads: shape.kv_heads as u32,
            channels: channels as u32,
            positions: positions as u32,
            heads: self.heads.wait()?,
            globals: self.globals.wait()?,
        })
    }
}

/// The choices of a source's features: the examples, its part of the recipe's `extract`, the model; `label`
/// if a channel depends on how the context would be repeated; the labels if a channel is fitted to them.
pub(super) fn fingerprint(
    s: &Session,
    source: Source,
    found: &ModelFiles,
    examples: &Fingerprint,
) -> Fingerprint {
    let fingerprint = Fingerprint::new()
        .with("examples", examples)
        .with("extract", s.recipe.extract.of(source))
        .with(source.name(), pair::fingerprint(s, found));
    let fingerprint = match s.recipe.extract.reads_label_section(source) {
        true => fingerprint.with("label", s.recipe.label.material()),
        false => fingerprint,
    };
    match s.recipe.extract.is_fitted(source) {
        true => fingerprint.with("hidden", hidden::choices(s, found, examples)),
        false => fingerprint,
    }
}

/// Whether a stage that reads features must make them first: the recipe wants them made and kept, and a
/// source's are not complete.
pub fn is_due(s: &Session) -> bool {
    let extract = &s.recipe.extract;
    let complete = |&source: &Source| StageDir::read(&s.run.features(source)).is_ok_and(|d| d.is_complete());
    extract.missing == MissingFeatures::Generate
        && !extract.is_transient()
        && !extract.from.iter().all(complete)
}

/// The choices of all features, which must match the recipe, and be there unless they are made when they are
/// read.
///
/// # Errors
/// Those of a source are absent, unfinished or stale; the hint names the command that makes them.
pub fn require_all(
    s: &Session,
    target: &ModelFiles,
    proxy: Option<&ModelFiles>,
    examples: &Fingerprint,
) -> Result<Fingerprint> {
    let of = |&source: &Source| {
        let fingerprint = fingerprint(s, source, of_pair(source, target, proxy)?, examples);
        if !s.recipe.extract.is_transient() {
            require(&s.run.features(source), Stage::Extract, &fingerprint)?;
        }
        Ok(fingerprint)
    };
    let mut all = s.recipe.extract.from.iter().map(of).collect::<Result<Vec<_>>>()?;
    Ok(match s.recipe.extract.from[..] {
        // As it was when there was no other source.
        [Source::Proxy] => all.remove(0),
        _ => s
            .recipe
            .extract
            .from
            .iter()
            .zip(&all)
            .fold(Fingerprint::new().with("from", &s.recipe.extract.from), |f, (source, one)| {
                f.with(source.name(), one)
            }),
    })
}
