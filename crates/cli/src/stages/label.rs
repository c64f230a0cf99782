//! `label`: KVzip scores of the target.

use anyhow::Result;
use pkv_core::{Fingerprint, Progress};
use pkv_score::Scorer;
use pkv_shard::{LabelRow, StageDir, StageWriter};
use serde_json::json;
use tch::Kind;

use super::{Outcome, prepare, to_vec};
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
    let scorer = Scorer::new(&model, &target.tokenizer, &s.recipe.label)?;
    let shape = model.shape();

    let (done, total) = (stage.rows(), examples.len());
    let mut writer =
        StageWriter::<LabelRow>::new(stage, s.recipe.data.shard_examples, s.recipe.label.store, Some(total))?;
    let mut tokens = 0;
    s.bar.start("label", total, done);
    for i in done..total {
        s.check_stop()?;
        let example = examples.get(i)?;
        let scores = scorer.score(&example.tokens)?;
        tokens += example.tokens.len();
        writer.push(LabelRow {
            id: example.id,
            layers: shape.layers as u32,
            kv_heads: shape.kv_heads as u32,
            positions: example.tokens.len() as u32,
            scores: to_vec(&scores.max_lht.to_kind(Kind::Float))?,
        })?;
        s.bar.advance(1);
    }
    s.bar.finish();
    writer.finish()?;
    Ok(Outcome::Done(json!({"examples": total, "tokens": tokens})))
}

/// The labels' choices: the examples, the recipe's `label`, the target.
pub fn fingerprint(s: &Session, target: &Found, examples: &Fingerprint) -> Fingerprint {
    Fingerprint::new()
        .with("examples", examples)
        .with("label", s.recipe.label.material())
        .with("target", target.fingerprint(s))
}
