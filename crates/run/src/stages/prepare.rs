//! `prepare`: documents to tokenized examples.

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, Split, StoreDtype};
use pkv_recipe::{FactPlace, Recipe};
use pkv_score::ModelFiles;
use pkv_shard::{Example, Stage, StageDir, StageReader, StageWriter};

use super::{Entry, Outcome};
use crate::pair;
use crate::session::Session;
use crate::sweep::SharedOutput;

pub(super) const ENTRY: Entry = Entry {
    outputs: |s| {
        let target = pair::find_target(s)?;
        let fingerprint = fingerprint(s, &target)?;
        Ok(vec![SharedOutput { stage: Stage::Prepare, folder: s.run.examples(), fingerprint }])
    },
    ..Entry::new(Stage::Prepare, "Turn documents into tokenized examples", &[], |s, _| run(s))
};

fn run(s: &Session) -> Result<Outcome> {
    // A proxy that does not fit is refused before any work.
    let (target, _) = pair::find_both(s)?;
    let stage = StageDir::open(&s.run.examples(), "prepare", &fingerprint(s, &target)?)?;
    if stage.is_complete() {
        return Ok(Outcome::Skipped(format!("{} examples match the recipe", stage.rows())));
    }
    let done = stage.rows();
    let total = (s.recipe.data.train + s.recipe.data.validation + s.recipe.data.test) as u64;
    let mut writer =
        StageWriter::<Example>::new(stage, s.recipe.data.shard_examples, StoreDtype::F32, Some(total))?;
    let mut seen = 0;
    let summary =
        pkv_data::prepare(&s.recipe, &s.manifest, &s.hub, &target.tokenizer, &*s.bar, &mut |example| {
            s.stop.check()?;
            seen += 1;
            // Examples come in the same order every time; those written before an interruption are not
            // written twice.
            if seen <= done { Ok(()) } else { writer.push(example) }
        })?;
    writer.finish()?;
    Ok(Outcome::Done(serde_json::to_value(summary)?))
}

/// The examples' choices: the recipe's `data`, the manifest, the places of its facts, the tokenizer, the
/// seed.
pub fn fingerprint(s: &Session, target: &ModelFiles) -> Result<Fingerprint> {
    let fingerprint = Fingerprint::new()
        .with("data", &s.recipe.data)
        .with("manifest", &s.manifest)
        .with("documents", s.documents()?)
        .with("vocab", target.tokenizer.vocab_hash())
        .with("seed", s.recipe.seed);
    // Windows of every split overlapped once; examples of that time are not these.
    let fingerprint =
        if s.recipe.data.stride < 1.0 { fingerprint.with("overlapping", Split::Train) } else { fingerprint };
    Ok(if s.manifest.facts.is_some() { with_places(fingerprint, &s.recipe) } else { fingerprint })
}

/// `fingerprint` with the places of facts; "anywhere" is what fingerprints without them mean.
pub fn with_places(fingerprint: Fingerprint, recipe: &Recipe) -> Fingerprint {
    match recipe.facts.place {
        FactPlace::Anywhere => fingerprint,
        place => fingerprint.with("facts.place", place),
    }
}

/// The examples of this run, which must be complete and match the recipe.
///
/// # Errors
/// `prepare` has not run, was not finished, or ran with another recipe.
pub fn examples(s: &Session, target: &ModelFiles) -> Result<(StageReader<Example>, Fingerprint)> {
    let fingerprint = fingerprint(s, target)?;
    super::require(&s.run.examples(), Stage::Prepare, &fingerprint)?;
    let reader = StageReader::open(&s.run.examples()).context("cannot read the examples")?;
    Ok((reader, fingerprint))
}
