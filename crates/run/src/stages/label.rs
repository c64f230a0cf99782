//! `label`: KVzip scores of the target; where the recipe takes features of the target, those of the same
//! prefill as well.

use anyhow::Result;
use pkv_core::Fingerprint;
use pkv_score::{Requests, Scorer};
use pkv_shard::{Example, LabelRow, Stage, StageDir, StageWriter};
use serde_json::json;

use super::beside::{Beside, BesideWriter};
use super::lanes::{Lane, lanes};
use super::pump::pump;
use super::to_host::ToHost;
use super::{Entry, Outcome, keep, prepare};
use crate::pair::{self, Found};
use crate::session::Session;
use crate::sweep::SharedOutput;

pub(super) const ENTRY: Entry = Entry {
    outputs: |s| {
        let target = pair::find_target(s)?;
        let fingerprint = fingerprint(s, &target, &prepare::fingerprint(s, &target)?);
        Ok(vec![SharedOutput { stage: Stage::Label, folder: s.run.labels(), fingerprint }])
    },
    ..Entry::new(Stage::Label, "Compute labels: KVzip scores of the target", &[Stage::Prepare], |s, _| run(s))
};

fn run(s: &Session) -> Result<Outcome> {
    let (target, _) = pair::find_both(s)?;
    let (examples, upstream) = prepare::examples(s, &target)?;
    let stage = StageDir::open(&s.run.labels(), "label", &fingerprint(s, &target, &upstream))?;
    if stage.is_complete() {
        return Ok(Outcome::Skipped(format!("labels of {} examples match the recipe", stage.rows())));
    }
    let model = target.load(s)?;
    let requests = Requests::new(&target.tokenizer, &s.recipe.label)?;
    let (shape, prefix) = (model.shape(), target.tokenizer.prefix());
    let n = lanes(s.device, &shape, s.recipe.data.longest_window());

    let total = examples.len();
    let (beside, mut features_writer) = Beside::open(s, &target, &upstream, total).unzip();
    let mut writer =
        StageWriter::<LabelRow>::new(stage, s.recipe.data.shard_examples, s.recipe.label.store, Some(total))?;
    let done = writer.rows();
    let mut tokens = 0;
    let compute = |lane: Lane| {
        let (requests, beside) = (&requests, beside.as_ref());
        move |(row, example): (u64, Example)| {
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
                Ok((row, example.id, example.tokens.len(), scores, features.flatten()))
            })
        }
    };
    // After an interruption one of the two may lack a shard that the other has.
    let lacking = features_writer.as_ref().and_then(BesideWriter::lacking);
    let first = lacking.unwrap_or(done).min(done);
    s.bar.start(if lacking.is_some() { "label, extract: target" } else { "label" }, total, first);
    let times = pump(
        s.device,
        first..total,
        |row| Ok((row, examples.get(row)?)),
        Lane::all(&model, n)?.into_iter().map(compute).collect(),
        |(row, id, positions, scores, features)| {
            if let Some(writer) = &mut features_writer {
                writer.push((row, &id), &shape, positions, features)?;
            }
            if let Some(scores) = scores {
                writer.push(LabelRow {
                    id,
                    layers: shape.layers as u32,
                    kv_heads: shape.kv_heads as u32,
                    positions: positions as u32,
                    scores: scores.wait()?,
                })?;
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
    let mut summary = json!({"examples": total, "tokens": tokens});
    if let Some(features) = features {
        summary["target_features"] = json!(features);
    }
    Ok(Outcome::Done(times.add_to(summary)))
}

/// The labels' choices: the examples, the recipe's `label`, the target.
pub fn fingerprint(s: &Session, target: &Found, examples: &Fingerprint) -> Fingerprint {
    Fingerprint::new()
        .with("examples", examples)
        .with("label", s.recipe.label.material())
        .with("target", target.fingerprint(s))
}
