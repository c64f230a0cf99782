//! `train`: the mapper, from labels and features.

use std::sync::Arc;

use anyhow::{Result, ensure};
use pkv_checkpoint::Export;
use pkv_core::{FailureKind, Fingerprint, hinted};
use pkv_score::ModelFiles;
use pkv_shard::Stage;
use serde_json::json;

use super::generated::Loaded;
use super::{Entry, Outcome, extract, generated, label, prepare, require, start_from};
use crate::pair;
use crate::session::Session;

/// The stages that training reads, with the choices they were made with.
pub struct Upstream {
    pub target: Arc<ModelFiles>,
    /// Absent if no feature comes from it.
    pub proxy: Option<Arc<ModelFiles>>,
    /// Of the examples alone.
    pub examples: Fingerprint,
    /// The mapper that training starts from, if it is another's.
    pub start_from: Option<Export>,
    pub fingerprint: Fingerprint,
}

pub(super) const ENTRY: Entry = Entry {
    held: Some(|s, _| s.run.train()),
    ..Entry::new(
        Stage::Train,
        "Train the mapper on labels and features",
        &[Stage::Prepare, Stage::Label, Stage::Extract],
        |s, _| run(s),
    )
};

fn run(s: &Session) -> Result<Outcome> {
    ensure!(
        s.feature_workers.is_none() || s.recipe.extract.is_transient(),
        hinted(
            "`--feature-workers` make features that are not stored, and this recipe stores them",
            "add `--set extract.missing=generate --set extract.after_use=delete`, or leave `--feature-workers` out"
        )
        .of(FailureKind::Usage)
    );
    let upstream = upstream(s)?;
    let r = &s.recipe;
    let mut inputs = pkv_train::TrainInputs {
        run: s.run.root(),
        examples: &s.run.examples(),
        labels: &s.run.labels(),
        features: s.run.feature_folders(&r.extract),
        mapper: &r.mapper,
        loss: &r.loss,
        train: &r.train,
        seed: r.seed,
        start_from: upstream.start_from.as_ref().map(|export| export.tensors().as_slice()),
        fingerprint: &upstream.fingerprint,
    };
    if let Some(step) = pkv_train::is_complete(&inputs)? {
        generated::delete_used(s, &upstream)?;
        return Ok(Outcome::Skipped(format!("the mapper was trained for {step} steps as the recipe says")));
    }
    inputs.features = generated::features(s, &upstream, Loaded::default())?;
    let summary = pkv_train::train(&inputs, s.device, &*s.bar, &s.stop)?;
    s.stop.check()?;
    // Read back: nothing is removed before the weights are on the disk.
    if pkv_train::is_complete(&inputs)?.is_some() {
        generated::delete_used(s, &upstream)?;
    }
    Ok(Outcome::Done(json!(summary)))
}

/// Check that examples, labels and features are there and match the recipe.
///
/// # Errors
/// One of them is absent, unfinished or stale; the hint names the command that makes it.
pub fn upstream(s: &Session) -> Result<Upstream> {
    let (target, proxy) = pair::find_both(s)?;
    let (_, examples) = prepare::examples(s, &target)?;
    let labels = label::fingerprint(s, &target, &examples);
    require(&s.run.labels(), Stage::Label, &labels)?;
    let r = &s.recipe;
    let features = extract::require_all(s, &target, proxy.as_deref(), &examples)?;
    let fingerprint = Fingerprint::new()
        .with("labels", &labels)
        .with("features", &features)
        .with("mapper", &r.mapper)
        .with("loss", &r.loss)
        .with("train", r.train.choices())
        .with("seed", r.seed);
    let start_from = start_from::read(s)?;
    let fingerprint = match &start_from {
        Some(export) => fingerprint.with("start_from", export.weights_hash()),
        None => fingerprint,
    };
    Ok(Upstream { target, proxy, examples, start_from, fingerprint })
}
