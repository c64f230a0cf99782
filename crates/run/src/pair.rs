//! Finds the models that a recipe reads, compares them with the recipe's shapes, and loads them.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, ModelShape, Source, hinted};
use pkv_lm::{LanguageModel, Placement};
use pkv_recipe::{ModelSection, SpecialTokens};
use pkv_score::ModelFiles;
use pkv_shard::ModelRecord;

use crate::session::{Session, target_memory};

/// The target as [`ModelFiles::of_recipe`] finds it, once in a session.
///
/// # Errors
/// As of [`ModelFiles::of_recipe`].
pub fn find_target(s: &Session) -> Result<Arc<ModelFiles>> {
    find(s, Source::Target, &s.recipe.target)
}

fn find(s: &Session, role: Source, section: &ModelSection) -> Result<Arc<ModelFiles>> {
    if let Some(known) = s.found(role).get() {
        return Ok(Arc::clone(known));
    }
    let mut found = ModelFiles::of_recipe(&s.hub, &s.recipe, role, section)
        .with_context(|| format!("cannot open the {} `{}`", role.name(), section.model))?;
    if s.recipe.data.special_tokens == SpecialTokens::Text {
        found.tokenizer.read_special_tokens_as_text();
    }
    let record = ModelRecord {
        model: found.name.clone(),
        revision: Some(found.revision.clone()),
        vocab_hash: found.tokenizer.vocab_hash(),
        template_hash: found.tokenizer.template_hash(),
    };
    s.record(|run| match role {
        Source::Target => run.target = Some(record.clone()),
        Source::Proxy => run.proxy = Some(record.clone()),
    })?;
    Ok(Arc::clone(s.found(role).get_or_init(|| Arc::new(found))))
}

/// Find the target and, if features come from it, the proxy; they must share one vocabulary, because labels
/// and features meet position by position.
///
/// # Errors
/// As [`find_target`], or the vocabularies differ.
pub fn find_both(s: &Session) -> Result<(Arc<ModelFiles>, Option<Arc<ModelFiles>>)> {
    let Some(section) = s.recipe.read_proxy() else { return Ok((find_target(s)?, None)) };
    // Reading a large tokenizer takes a second.
    let (target, proxy) = thread::scope(|scope| {
        let proxy = scope.spawn(|| find(s, Source::Proxy, section));
        (find_target(s), proxy.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let (target, proxy) = (target?, proxy?);
    target.tokenizer.same_vocab(&proxy.tokenizer).with_context(|| {
        hinted(
            format!(
                "the proxy `{}` does not share the vocabulary of the target `{}`",
                proxy.name, target.name
            ),
            "choose a proxy of the target's family: both must tokenize alike",
        )
    })?;
    Ok((target, Some(proxy)))
}

/// Read the weights of `found` to the session's device; the target's to those of its layers.
///
/// # Errors
/// A file is absent, truncated or of an unsupported kind; a device has too little memory.
pub fn load(s: &Session, found: &ModelFiles) -> Result<LanguageModel> {
    found.load(s.kind(found.role), |shape: &ModelShape| match (found.role, &*s.target_devices) {
        (Source::Target, devices) if devices.len() > 1 => {
            Placement::fitting(devices, shape.layers, &target_memory(&s.recipe, s.device).needs())
        }
        _ => Ok(Placement::whole(s.device, shape.layers)),
    })
}

/// Everything about a model that its scores depend on.
pub fn fingerprint(s: &Session, found: &ModelFiles) -> Fingerprint {
    Fingerprint::new()
        .with("model", &found.name)
        .with("revision", &found.revision)
        .with("shape", found.config.shape)
        .with("dtype", format!("{:?}", s.kind(found.role)))
        .with("vocab", found.tokenizer.vocab_hash())
        .with("template", found.tokenizer.template_hash())
}
