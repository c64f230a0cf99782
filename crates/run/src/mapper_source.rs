//! The mapper that is evaluated or exported: the run's best checkpoint, or an export.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_checkpoint::{
    BUDGETS_FILE, CheckpointStore, EXPORT_FILES, Export, LOSS_PREFIX, NamedTensors, restore_mapper,
};
use pkv_core::{Fingerprint, Progress, Stop, hinted};
use pkv_extract::HiddenProjection;
use pkv_hub::Hub;
use pkv_mapper::{Mapper, MapperDims};
use pkv_prune::HeadBudgets;
use pkv_recipe::TargetPool;
use pkv_shard::RunLayout;

use crate::session::Session;
use crate::stages::hidden;
use crate::stages::train::Upstream;

/// A mapper and where it came from.
pub struct Trained {
    pub mapper: Mapper,
    /// What its loss had learned, if a checkpoint or an older export says: a part of what stored evaluations
    /// are known by.
    pub loss: NamedTensors,
    /// In words, for tables.
    pub source: String,
    /// Everything its weights depend on.
    pub fingerprint: Fingerprint,
    pub step: u64,
    pub validation: Option<f64>,
    pub pool: TargetPool,
    /// Map of the target's hidden states, if a channel reads them.
    pub hidden: Option<HiddenProjection>,
    /// Head budgets of an export that has them.
    pub budgets: Option<HeadBudgets>,
}

/// The folder of the export that was named: itself, that of a run folder, or a hub repository's, downloaded
/// where the cache lacks it. What is none of these is [`Export::read`]'s to refuse.
///
/// # Errors
/// The run folder holds no export; the hub has no such repository or does not answer.
pub fn export_folder(named: &Path, progress: &dyn Progress, stop: &Stop) -> Result<PathBuf> {
    if named.exists() {
        return Ok(export_of_run(named)?.unwrap_or_else(|| named.to_path_buf()));
    }
    let name = named.to_string_lossy();
    // Below a folder that is there it is a misspelled path.
    let is_repository = name.matches('/').count() == 1
        && !name.starts_with(['/', '.', '~'])
        && !name.ends_with('/')
        && !named.parent().is_some_and(Path::is_dir);
    if !is_repository {
        return Ok(named.to_path_buf());
    }
    let [card, config, model, parity] = EXPORT_FILES;
    let optional = [card, BUDGETS_FILE];
    Hub::from_env()
        .fetch_files(&name, "main", &[config, model, parity], &optional, progress, stop)
        .with_context(|| {
            format!("cannot find the mapper `{name}`: it is no folder, and no repository that can be had")
        })
}

/// The export of the run folder `named`; `None` if it is no run folder.
///
/// # Errors
/// It holds no export.
pub fn export_of_run(named: &Path) -> Result<Option<PathBuf>> {
    let run = RunLayout::new(named);
    let export = run.export();
    let is_there = export.join("config.json").is_file();
    ensure!(
        is_there || !run.run_json().is_file(),
        hinted(
            format!("run `{}` holds no export", named.display()),
            "make it first: `proxykv-train export --recipe RECIPE`, or `run` for all stages"
        )
    );
    Ok(is_there.then_some(export))
}

/// The best checkpoint of this run, which must have been trained to its end with this recipe.
///
/// # Errors
/// There is none, or it was trained with other choices.
pub fn from_checkpoint(s: &Session, upstream: &Upstream) -> Result<Trained> {
    let store = CheckpointStore::read_only(&s.run.checkpoints())?;
    let train = "run `proxykv-train train` first; `--redo train` makes the mapper anew";
    let state = store.best(s.device)?.with_context(|| hinted("there is no checkpoint to read", train))?;
    let last = store.list()?.pop().with_context(|| hinted("there is no checkpoint to read", train))?;
    let differences = last.differences(&upstream.fingerprint);
    let made_with = last.fingerprint;
    ensure!(
        differences.is_empty(),
        hinted(
            format!("the mapper was trained with other choices: `{}` differs", differences[0].0),
            "run `proxykv-train train --redo train`, or undo the change of the recipe"
        )
    );
    let asked = &s.recipe.train;
    ensure!(
        pkv_train::Schedule::restore(asked, &last.extra)?.is_done(last.step),
        hinted(format!("training has come to step {} of {}", last.step, asked.steps_in_words()), train)
    );
    let mut tensors: NamedTensors = state.weights();
    tensors.extend(state.buffers.iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
    let mapper = restore_mapper(&s.recipe.mapper, MapperDims::of(&s.recipe), &tensors, s.device)?;
    Ok(Trained {
        mapper,
        loss: of_loss(&tensors),
        source: format!("checkpoint of step {}", state.step),
        fingerprint: made_with,
        step: state.step,
        validation: state.validation,
        pool: s.recipe.train.target_pool,
        hidden: hidden::read(s, &upstream.target, &upstream.examples, s.device)?,
        budgets: None,
    })
}

/// An export, which must fit the recipe's pair and features.
///
/// # Errors
/// It is damaged, or made for another pair, tokenizer or feature set.
pub fn from_export(s: &Session, upstream: &Upstream, folder: &Path) -> Result<Trained> {
    let export = Export::read(folder)?;
    let c = export.config();
    let refuse = |what: &str, found: String, expected: String| {
        hinted(
            format!(
                "export `{}` does not fit this recipe: {what} is {found}, expected {expected}",
                folder.display()
            ),
            "use the recipe that it was made with, or export a mapper of this one",
        )
    };
    let proxys =
        c.read_proxy().zip(upstream.proxy.as_deref()).map(|(theirs, found)| ("proxy", theirs, found));
    for (role, theirs, found) in std::iter::once(("target", &c.target, &*upstream.target)).chain(proxys) {
        let differs = theirs.difference(&found.config.shape, &found.tokenizer.vocab_hash());
        if let Some((what, theirs, ours)) = differs {
            return Err(refuse(&format!("the {role}'s {what}"), theirs, ours).into());
        }
    }
    let (theirs, ours) = (
        Fingerprint::new().with("extract", &c.extract),
        Fingerprint::new().with("extract", &s.recipe.extract),
    );
    if let Some((key, a, b)) =
        theirs.difference(&ours).into_iter().find(|(key, ..)| !IMMATERIAL.contains(&key.as_str()))
    {
        return Err(refuse(&format!("`{key}`"), a.to_string(), b.to_string()).into());
    }
    Ok(Trained {
        mapper: export.mapper(s.device)?,
        loss: of_loss(export.tensors()),
        source: format!("export `{}`", folder.display()),
        fingerprint: c.fingerprint.clone(),
        step: c.step,
        validation: c.validation,
        pool: c.train.target_pool,
        hidden: HiddenProjection::from_tensors(export.tensors(), s.device)?,
        budgets: export.budgets().cloned(),
    })
}

fn of_loss(tensors: &NamedTensors) -> NamedTensors {
    let of_loss = tensors.iter().filter(|(name, _)| name.starts_with(LOSS_PREFIX));
    of_loss.map(|(name, x)| (name.clone(), x.shallow_clone())).collect()
}

/// Choices of `extract` that change no number.
const IMMATERIAL: [&str; 3] = ["extract.block_tokens", "extract.prefill_chunk_tokens", "extract.store"];
