//! `label`: KVzip scores of the target.

use anyhow::Result;
use pkv_core::{Fingerprint, Progress};
use pkv_score::{Requests, Scorer};
use pkv_shard::{Example, LabelRow, StageDir, StageWriter};
use serde_json::json;

use super::lanes::{Lane, lanes};
use super::pump::pump;
use super::to_host::ToHost;
use super::{Outcome, prepare};
use crate::pair::{self, Found};
use crate::session::Session;

pub fn run(s: &Session) -> Result<Outcome> {
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

    let (done, total) = (stage.rows(), examples.len());
    let mut writer =
        StageWriter::<LabelRow>::new(stage, s.recipe.data.shard_examples, s.recipe.label.store, Some(total))?;
    let mut tokens = 0;
    let compute = |lane: Lane| {
        let requests = &requests;
        move |example: Example| {
            s.check_stop()?;
            lane.on(|model| {
                let requests = requests.clone();
                let scorer = Scorer::with_requests(model, requests, prefix, &s.recipe.label).maxima_only();
                let scores = scorer.score(&example.tokens)?;
                Ok((example.id, example.tokens.len(), ToHost::begin(&scores.max_lht)?))
            })
        }
    };
    s.bar.start("label", total, done);
    let times = pump(
        s.device,
        done..total,
        |i| examples.get(i),
        Lane::all(&model, n)?.into_iter().map(compute).collect(),
        |(id, positions, scores)| {
            writer.push(LabelRow {
                id,
                layers: shape.layers as u32,
                kv_heads: shape.kv_heads as u32,
                positions: positions as u32,
                scores: scores.wait()?,
            })?;
            tokens += positions;
            s.bar.advance(1);
            Ok(())
        },
    )?;
    s.bar.finish();
    tracing::info!("label: {times}");
    writer.finish()?;
    Ok(Outcome::Done(times.add_to(json!({"examples": total, "tokens": tokens}))))
}

/// The labels' choices: the examples, the recipe's `label`, the target.
pub fn fingerprint(s: &Session, target: &Found, examples: &Fingerprint) -> Fingerprint {
    Fingerprint::new()
        .with("examples", examples)
        .with("label", s.recipe.label.material())
        .with("target", target.fingerprint(s))
}
