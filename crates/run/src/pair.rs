//! Finds the models that a recipe reads, compares them with the recipe's shapes, and loads them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, ModelShape, Source, hinted};
use pkv_lm::{LanguageModel, LmConfig, Placement};
use pkv_recipe::{ModelSection, SpecialTokens};
use pkv_shard::ModelRecord;
use pkv_text::TextTokenizer;

use crate::session::{Session, target_memory};

/// A model that was found on disk and has the recipe's shape; its weights are not read yet.
pub struct Found {
    pub role: Source,
    pub folder: PathBuf,
    pub revision: String,
    pub tokenizer: TextTokenizer,
    section: ModelSection,
}

/// Find the target, once in a session, in the cache or a local folder and check its shape and tokenizer.
///
/// # Errors
/// It is not there (the hint names `fetch`), its config.json has another shape, or its tokenizer is broken.
pub fn find_target(s: &Session) -> Result<Arc<Found>> {
    find(s, Source::Target, &s.recipe.target)
}

fn find(s: &Session, role: Source, section: &ModelSection) -> Result<Arc<Found>> {
    if let Some(known) = s.found(role).get() {
        return Ok(Arc::clone(known));
    }
    let found = Arc::new(open(s, role, section)?);
    Ok(Arc::clone(s.found(role).get_or_init(|| found)))
}

fn open(s: &Session, role: Source, section: &ModelSection) -> Result<Found> {
    let root = s.recipe.root();
    let context = || format!("cannot open the {} `{}`", role.name(), section.model);
    let resolved =
        s.hub.model(&section.model, &section.revision, &[Path::new(""), &root]).with_context(context)?;
    LmConfig::from_folder(&resolved.folder)?
        .check_shape(&section.shape, role.name())
        .with_context(context)?;
    let mut tokenizer = TextTokenizer::open(&resolved.folder).with_context(context)?;
    if s.recipe.data.special_tokens == SpecialTokens::Text {
        tokenizer.read_special_tokens_as_text();
    }
    let record = ModelRecord {
        model: section.model.clone(),
        revision: Some(resolved.revision.clone()),
        vocab_hash: tokenizer.vocab_hash(),
        template_hash: tokenizer.template_hash(),
    };
    s.record(|run| match role {
        Source::Target => run.target = Some(record.clone()),
        Source::Proxy => run.proxy = Some(record.clone()),
    })?;
    Ok(Found {
        role,
        folder: resolved.folder,
        revision: resolved.revision,
        tokenizer,
        section: section.clone(),
    })
}

/// Find the target and, if features come from it, the proxy; they must share one vocabulary, because labels
/// and features meet position by position.
///
/// # Errors
/// As [`find_target`], or the vocabularies differ.
pub fn find_both(s: &Session) -> Result<(Arc<Found>, Option<Arc<Found>>)> {
    let target = find_target(s)?;
    let Some(section) = s.recipe.read_proxy() else { return Ok((target, None)) };
    let proxy = find(s, Source::Proxy, section)?;
    target.tokenizer.same_vocab(&proxy.tokenizer).with_context(|| {
        hinted(
            format!(
                "the proxy `{}` does not share the vocabulary of the target `{}`",
                proxy.section.model, target.section.model
            ),
            "choose a proxy of the target's family: both must tokenize alike",
        )
    })?;
    Ok((target, Some(proxy)))
}

impl Found {
    /// Read the weights to the session's device; the target's to those of its layers.
    ///
    /// # Errors
    /// A file is absent, truncated or of an unsupported kind; a device has too little memory.
    pub fn load(&self, s: &Session) -> Result<LanguageModel> {
        tracing::info!("loading the {} `{}` ({})", self.role.name(), self.section.model, self.section.shape);
        let place = |shape: &ModelShape| match (self.role, &*s.target_devices) {
            (Source::Target, devices) if devices.len() > 1 => {
                let needs = target_memory(&s.recipe, s.device).needs();
                let placement = Placement::fitting(devices, shape.layers, &needs)?;
                tracing::info!("its layers: {}", placement.in_words());
                Ok(placement)
            }
            _ => Ok(Placement::whole(s.device, shape.layers)),
        };
        LanguageModel::load_over(&self.folder, s.kind(self.section.dtype), place)
            .with_context(|| format!("cannot load the {} `{}`", self.role.name(), self.section.model))
    }

    /// Its section of the recipe.
    pub fn section(&self) -> &ModelSection {
        &self.section
    }

    /// Everything about this model that its scores depend on.
    pub fn fingerprint(&self, s: &Session) -> Fingerprint {
        Fingerprint::new()
            .with("model", &self.section.model)
            .with("revision", &self.revision)
            .with("shape", self.section.shape)
            .with("dtype", format!("{:?}", s.kind(self.section.dtype)))
            .with("vocab", self.tokenizer.vocab_hash())
            .with("template", self.tokenizer.template_hash())
    }
}
