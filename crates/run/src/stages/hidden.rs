//! The map of the target's hidden states that the channel `hidden_linear` needs: fitted before features are
//! extracted, kept in the run folder, shipped with the export.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use pkv_checkpoint::{read_tensors, write_tensors};
use pkv_core::{Fingerprint, Source, Split, hinted};
use pkv_extract::{HiddenFit, HiddenProjection};
use pkv_files::{Claim, WriteBudget};
use pkv_lm::LanguageModel;
use pkv_prune::log_odds;
use pkv_score::ModelFiles;
use pkv_shard::{Example, LabelRow, Stage, StageReader};
use tch::{Device, Tensor};

use super::{label, require};
use crate::session::Session;

/// Training contexts that the map is fitted on; it has a few thousand weights for each KV head.
const MOST_CONTEXTS: usize = 512;

/// Whether the recipe's features need it.
pub fn is_needed(s: &Session) -> bool {
    let extract = &s.recipe.extract;
    extract.from.contains(&Source::Target) && extract.is_fitted(Source::Target)
}

/// Everything that the map depends on: the labels and, through them, the examples and the target.
pub fn choices(s: &Session, target: &ModelFiles, examples: &Fingerprint) -> Fingerprint {
    Fingerprint::new().with("labels", label::fingerprint(s, target, examples)).with("contexts", MOST_CONTEXTS)
}

/// Of these choices; another hash is another file.
fn path(s: &Session, choices: &Fingerprint) -> PathBuf {
    s.run.hidden().join(format!("projection-{}.safetensors", &choices.hash()[..16]))
}

/// The map that was fitted, if the recipe needs one.
///
/// # Errors
/// It is needed and absent or damaged.
pub fn read(
    s: &Session,
    target: &ModelFiles,
    examples: &Fingerprint,
    device: Device,
) -> Result<Option<HiddenProjection>> {
    if !is_needed(s) {
        return Ok(None);
    }
    let path = path(s, &choices(s, target, examples));
    let look = || -> Result<HiddenProjection> {
        HiddenProjection::from_tensors(&read_tensors(&path, device)?, device)?
            .with_context(|| format!("`{}` holds no projection", path.display()))
    };
    look().map(Some).with_context(|| {
        hinted(
            "the projection of the target's hidden states cannot be read",
            "fit it again: `proxykv-train extract --redo extract`",
        )
    })
}

/// The map, fitted now unless it was before.
///
/// # Errors
/// The labels are not complete, there is no training example, or the target fails.
pub fn fitted(
    s: &Session,
    target: &ModelFiles,
    model: &LanguageModel,
    examples: &StageReader<Example>,
    upstream: &Fingerprint,
) -> Result<HiddenProjection> {
    let choices = choices(s, target, upstream);
    if let Ok(Some(found)) = read(s, target, upstream, model.device()) {
        return Ok(found);
    }
    let path = path(s, &choices);
    let folder = path.parent().context("the run folder has no path")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))?;
    // Processes that make features piece by piece need one map, which one of them fits.
    let lock = path.with_extension("lock");
    let _claim = Claim::wait_for(&lock)?;
    if let Ok(Some(found)) = read(s, target, upstream, model.device()) {
        let _ = std::fs::remove_file(lock);
        return Ok(found);
    }
    require(&s.run.labels(), Stage::Label, &label::fingerprint(s, target, upstream))?;
    let labels = StageReader::<LabelRow>::open(&s.run.labels())?;
    let rows = training_rows(examples)?;
    let mut fit = HiddenFit::new(model);
    s.bar.start("projection of hidden states", rows.len() as u64, 0);
    for row in rows {
        s.stop.check()?;
        let (example, label) = (examples.get(row)?, labels.get(row)?);
        label.check_example(row, &example)?;
        let size = [label.layers, label.kv_heads, label.positions].map(i64::from);
        let scores_lht = Tensor::from_slice(&label.scores).view(size).to_device(model.device());
        let chunk = s.recipe.extract.prefill_chunk_tokens;
        fit.add(model, target.tokenizer.prefix(), &example.tokens, chunk, &log_odds(&scores_lht))?;
        s.bar.advance(1);
    }
    s.bar.finish();
    let projection = fit.solve()?;
    write_tensors(&path, &projection.tensors(), &WriteBudget::from_env())?;
    let _ = std::fs::remove_file(lock);
    Ok(projection)
}

/// Evenly spread over the training split, so that every source of the documents takes part.
fn training_rows(examples: &StageReader<Example>) -> Result<Vec<u64>> {
    let mut rows = Vec::new();
    for (row, example) in examples.iter().enumerate() {
        if example?.split == Split::Train {
            rows.push(row as u64);
        }
    }
    ensure!(
        !rows.is_empty(),
        hinted(
            "there is no training example to fit the projection of hidden states on",
            "raise `data.train`, or leave `hidden_linear` out of `extract.target_channels`"
        )
    );
    let n = rows.len().min(MOST_CONTEXTS);
    Ok((0..n).map(|i| rows[i * rows.len() / n]).collect())
}
