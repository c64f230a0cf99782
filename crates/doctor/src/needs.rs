//! Checks of a recipe's models and data.

use std::path::{Path, PathBuf};

use pkv_hub::{Hub, Lock};
use pkv_lm::LmConfig;
use pkv_recipe::{ModelSection, Recipe};
use pkv_run::session::manifest;
use pkv_text::TextTokenizer;

use super::Check;

/// Models and data of the recipe: there, of the stated shape, of one vocabulary.
pub fn needs(recipe: &Recipe, hub: Hub) -> Vec<Check> {
    let manifest = manifest(recipe);
    let path = manifest.as_ref().ok().and_then(|(_, path)| path.clone());
    let lock = Lock::beside(&recipe.path).and_then(|lock| match &path {
        Some(path) => lock.merge(Lock::beside(path)?),
        None => Ok(lock),
    });
    let hub = match lock {
        Ok(lock) => hub.with_lock(lock),
        Err(e) => return vec![Check::error("lock", &e)],
    };
    let target = model("target", &recipe.target, recipe, &hub);
    let proxy = recipe.read_proxy().map(|proxy| model("proxy", proxy, recipe, &hub));
    let vocabulary = match (&target, &proxy) {
        (Ok((_, a)), Some(Ok((_, b)))) => Some(vocabulary(a, b)),
        _ => None,
    };
    let found = std::iter::once(target).chain(proxy);
    let mut out: Vec<Check> = found.map(|found| found.map_or_else(|c| c, |(c, _)| c)).collect();
    out.extend(vocabulary);
    out.push(match manifest.and_then(|(m, _)| Ok((pkv_data::inputs(&m, &hub)?, m))) {
        Ok((_, m)) => {
            let of = path.map_or_else(|| "data.files".to_owned(), |path| path.display().to_string());
            let found = match m.sources.len() {
                1 => format!("the source of `{of}` is there"),
                n => format!("{n} sources of `{of}` are there"),
            };
            Check::ok("data", found)
        }
        Err(e) => Check::error("data", &e),
    });
    out
}

/// One of the recipe's models, and its folder.
fn model(role: &str, section: &ModelSection, recipe: &Recipe, hub: &Hub) -> Result<(Check, PathBuf), Check> {
    let look = || -> anyhow::Result<PathBuf> {
        let found = hub.model(&section.model, &section.revision, &[Path::new(""), &recipe.root()])?;
        LmConfig::from_folder(&found.folder)?.check_shape(&section.shape, role)?;
        Ok(found.folder)
    };
    match look() {
        Ok(folder) => {
            let detail = format!("`{}`, {}, in `{}`", section.model, section.shape, folder.display());
            Ok((Check::ok(role, detail), folder))
        }
        Err(e) => Err(Check::error(role, &e)),
    }
}

/// Labels and features meet position by position, so both models must tokenize alike.
fn vocabulary(target: &Path, proxy: &Path) -> Check {
    let compare = || -> anyhow::Result<usize> {
        let target = TextTokenizer::open(target)?;
        target.same_vocab(&TextTokenizer::open(proxy)?)?;
        Ok(target.vocab_size())
    };
    match compare() {
        Ok(n) => Check::ok("vocabulary", format!("shared by target and proxy, {n} tokens")),
        Err(e) => Check::error("vocabulary", &e),
    }
}
