//! `label`: KVzip scores of the target; where the recipe takes features of the target, those of the same
//! prefill as well.

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, ModelShape};
use pkv_lm::LanguageModel;
use pkv_score::{ModelFiles, Requests, Scorer};
use pkv_shard::{Example, LabelRow, Pieces, Stage, StageDir, StageReader, StageWriter};
use serde_json::json;

use super::beside::{Beside, BesideWriter};
use super::extract::OnHost;
use super::lanes::{Lane, lanes};
use super::pieces::{self, Opened, fill};
use super::pump::pump;
use super::to_host::ToHost;
use super::{Entry, Outcome, keep, prepare};
use crate::pair;
use crate::session::Session;
use crate::sweep::SharedOutput;

pub(super) const ENTRY: Entry = Entry {
    outputs: |s| {
        let target = pair::find_target(s)?;
        let fingerprint = fingerprint(s, &target, &prepare::fingerprint(s, &target)?);
        Ok(vec![SharedOutput { stage: Stage::Label, folder: s.run.labels(), fingerprint }])
    },
    in_pieces: true,
    ..Entry::new(Stage::Label, "Compute labels: KVzip scores of the target", &[Stage::Prepare], |s, _| run(s))
};

fn run(s: &Session) -> Result<Outcome> {
    let (target, _) = pair::find_both(s)?;
    let (examples, upstream) = prepare::examples(s, &target)?;
    let fingerprint = fingerprint(s, &target, &upstream);
    let work = Work { s, target: &target, examples: &examples, upstream: &upstream };
    match pieces::open(s, Stage::Label, &s.run.labels(), &fingerprint, examples.len())? {
        Opened::Complete => {
            Ok(Outcome::Skipped(format!("labels of {} examples match the recipe", examples.len())))
        }
        Opened::Whole(stage) => whole(&work, stage),
        Opened::Pieces(pieces) => in_pieces(&work, &pieces),
    }
}

/// What labels are made of.
struct Work<'a> {
    s: &'a Session,
    target: &'a ModelFiles,
    examples: &'a StageReader<Example>,
    upstream: &'a Fingerprint,
}

/// The target, loaded.
struct Labeller {
    model: LanguageModel,
    requests: Requests,
    shape: ModelShape,
    lanes: usize,
}

/// What a lane needs besides its model.
#[derive(Clone, Copy)]
struct Reading<'a> {
    s: &'a Session,
    requests: &'a Requests,
    prefix: &'a [u32],
    beside: Option<&'a Beside>,
    /// Rows that have labels.
    done: u64,
}

/// An example that was read, its numbers on their way to the host.
struct Read {
    row: u64,
    id: String,
    positions: usize,
    /// Absent where there are labels.
    scores: Option<ToHost>,
    /// Absent where there are features, or none are taken.
    features: Option<OnHost>,
}

impl Labeller {
    fn load(s: &Session, target: &ModelFiles) -> Result<Self> {
        let model = pair::load(s, target)?;
        let requests = Requests::new(&target.tokenizer, &s.recipe.label)?;
        let shape = model.shape();
        let lanes = lanes(model.placement(), &shape, s.recipe.data.longest_window());
        Ok(Self { model, requests, shape, lanes })
    }
}

fn label_row(id: String, shape: &ModelShape, positions: usize, scores: ToHost) -> Result<LabelRow> {
    Ok(LabelRow {
        id,
        layers: shape.layers as u32,
        kv_heads: shape.kv_heads as u32,
        positions: positions as u32,
        scores: scores.wait()?,
    })
}

impl<'a> Reading<'a> {
    fn on(self, lane: Lane) -> impl FnMut((u64, Example)) -> Result<Read> + Send + 'a {
        let Self { s, requests, prefix, beside, done } = self;
        move |(row, example)| {
            s.stop.check()?;
            lane.on(|model| {
                let read = |beside: &Beside| beside.prefill(s, model, requests, prefix, (row, &example));
                let (cache, features) = beside.map(read).transpose()?.flatten().unzip();
                let scores = if row >= done {
                    let scorer = Scorer::with_requests(model, requests.clone(), prefix, &s.recipe.label);
                    let scorer = scorer.maxima_only();
                    let scores = match &cache {
                        Some(cache) => scorer.score_cached(&example.tokens, cache)?,
                        None => scorer.score(&example.tokens)?,
                    };
                    Some(ToHost::begin(&scores.max_lht)?)
                } else {
                    None
                };
                let positions = example.tokens.len();
                Ok(Read { row, id: example.id, positions, scores, features: features.flatten() })
            })
        }
    }
}

/// All rows, in order.
fn whole(work: &Work, stage: StageDir) -> Result<Outcome> {
    let Work { s, target, examples, upstream } = work;
    let labeller = Labeller::load(s, target)?;
    let total = examples.len();
    let (beside, mut features_writer) = Beside::open(s, target, upstream, total).unzip();
    let mut writer =
        StageWriter::<LabelRow>::new(stage, s.recipe.data.shard_examples, s.recipe.label.store, Some(total))?;
    let done = writer.rows();
    let mut tokens = 0;
    let (requests, prefix, shape) = (&labeller.requests, target.tokenizer.prefix(), &labeller.shape);
    let reading = Reading { s, requests, prefix, beside: beside.as_ref(), done };
    // After an interruption one of the two may lack a shard that the other has.
    let lacking = features_writer.as_ref().and_then(BesideWriter::lacking);
    let first = lacking.unwrap_or(done).min(done);
    s.bar.start(if lacking.is_some() { "label, extract: target" } else { "label" }, total, first);
    let times = pump(
        s.device,
        first..total,
        |row| Ok((row, examples.get(row)?)),
        Lane::all(&labeller.model, labeller.lanes)?.into_iter().map(|lane| reading.on(lane)).collect(),
        |Read { row, id, positions, scores, features }| {
            if let Some(writer) = &mut features_writer {
                writer.push((row, &id), shape, positions, features)?;
            }
            if let Some(scores) = scores {
                writer.push(label_row(id, shape, positions, scores)?)?;
                tokens += positions;
            }
            s.bar.advance(1);
            Ok(())
        },
    );
    let times = match times {
        Ok(times) => times,
        Err(e) => {
            keep(writer);
            features_writer.into_iter().for_each(BesideWriter::keep);
            return Err(e);
        }
    };
    s.bar.finish();
    tracing::debug!("label: {times}");
    let features = features_writer.map(BesideWriter::finish).transpose()?;
    writer.finish()?;
    pieces::account(Stage::Label, total, total - done, done)?;
    let mut summary = json!({"examples": total, "tokens": tokens});
    if let Some(features) = features {
        summary["target_features"] = json!(features);
    }
    Ok(Outcome::Done(times.add_to(summary)))
}

/// The pieces of this process's task. Features of a piece come before its labels: what lacks labels may have
/// features, and what has labels leaves missing features to `extract`.
fn in_pieces(work: &Work, pieces: &Pieces) -> Result<Outcome> {
    let Work { s, target, examples, upstream } = work;
    let (total, prefix) = (examples.len(), target.tokenizer.prefix());
    let (beside, features) = Beside::open_pieces(s, target, upstream, total).unzip();
    let mut labeller = None;
    let what = if beside.is_some() { "label, extract: target" } else { "label" };
    let reached = pieces::each(s, what, pieces, |piece, tally| {
        let labeller = match &labeller {
            Some(labeller) => labeller,
            None => &*labeller.insert(Labeller::load(s, target)?),
        };
        let (requests, shape) = (&labeller.requests, &labeller.shape);
        let reading = Reading { s, requests, prefix, beside: beside.as_ref(), done: 0 };
        let mut features = features.as_ref().and_then(|features| features.claim(piece.shard));
        let mut kept = pieces.kept::<LabelRow>(piece);
        if let Some(features) = &mut features {
            // One of the two may have kept a row more.
            kept.truncate(features.go_on(kept.len())?);
        }
        let ended = fill(
            s,
            ("label", pieces, s.recipe.label.store),
            (piece, kept, tally),
            |row| {
                let example = examples.get(row)?;
                Ok((example.id.clone(), (row, example)))
            },
            Lane::all(&labeller.model, labeller.lanes)?.into_iter().map(|lane| reading.on(lane)).collect(),
            |Read { id, positions, scores, features: taken, .. }| {
                if let Some(features) = &mut features {
                    features.push(&id, shape, positions, taken)?;
                }
                label_row(id, shape, positions, scores.context("an example without labels was not scored")?)
            },
            |row| row.positions,
        );
        if let Some(features) = features {
            match &ended {
                Ok(ended) => features.end(ended)?,
                Err(_) => features.keep(),
            }
        }
        ended
    })?;
    if let Some(features) = features {
        features.seal()?;
    }
    Ok(Outcome::of_pieces(reached, total))
}

/// The labels' choices: the examples, the recipe's `label`, the target.
pub fn fingerprint(s: &Session, target: &ModelFiles, examples: &Fingerprint) -> Fingerprint {
    Fingerprint::new()
        .with("examples", examples)
        .with("label", s.recipe.label.material())
        .with("target", pair::fingerprint(s, target))
}
