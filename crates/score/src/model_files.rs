//! A model of the pair on disk, with its tokenizer: found, and later loaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_core::{ModelShape, Source};
use pkv_hub::Hub;
use pkv_lm::{LanguageModel, LmConfig, Placement};
use pkv_recipe::{ModelSection, Recipe};
use pkv_text::TextTokenizer;
use tch::Kind;

/// A model that was found on disk; its weights are not read yet.
pub struct ModelFiles {
    pub role: Source,
    /// Hub name or folder.
    pub name: String,
    /// Commit, or hash of a folder.
    pub revision: String,
    pub folder: PathBuf,
    pub config: LmConfig,
    pub tokenizer: TextTokenizer,
}

impl ModelFiles {
    /// Find the model `name` in a folder below one of `bases`, or in the hub's cache.
    ///
    /// # Errors
    /// It is not there (the hint names `fetch`), or its config.json or its tokenizer is broken.
    pub fn find(hub: &Hub, role: Source, name: &str, revision: &str, bases: &[&Path]) -> Result<Self> {
        let found = hub.model(name, revision, bases)?;
        Ok(Self {
            role,
            name: name.to_owned(),
            revision: found.revision,
            config: LmConfig::from_folder(&found.folder)?,
            tokenizer: TextTokenizer::open(&found.folder)?,
            folder: found.folder,
        })
    }

    /// Find one of the recipe's models, and check its shape.
    ///
    /// # Errors
    /// As [`ModelFiles::find`], or its config.json has another shape.
    pub fn of_recipe(hub: &Hub, recipe: &Recipe, role: Source, section: &ModelSection) -> Result<Self> {
        let bases = [Path::new(""), &recipe.root()];
        let found = Self::find(hub, role, &section.model, &section.revision, &bases)?;
        found.config.check_shape(&section.shape, role.name())?;
        Ok(found)
    }

    /// Read the weights, those of each layer to the device that `place` gives it.
    ///
    /// # Errors
    /// A file is absent, truncated or of an unsupported kind; a device has too little memory.
    pub fn load(
        &self,
        kind: Kind,
        place: impl FnOnce(&ModelShape) -> Result<Placement>,
    ) -> Result<LanguageModel> {
        let (role, name) = (self.role.name(), &self.name);
        tracing::info!("loading the {role} `{name}` ({})", self.config.shape);
        let model = LanguageModel::load_over(&self.folder, kind, place)
            .with_context(|| format!("cannot load the {role} `{name}`"))?;
        if model.placement().is_split() {
            tracing::info!("its layers: {}", model.placement().in_words());
        }
        Ok(model)
    }
}
