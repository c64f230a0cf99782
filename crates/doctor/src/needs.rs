//! Checks of a recipe's models and data.

use pkv_core::Source;
use pkv_hub::{Hub, Lock};
use pkv_recipe::{ModelSection, Recipe};
use pkv_run::session::manifest;
use pkv_score::ModelFiles;
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
    let target = model(Source::Target, &recipe.target, recipe, &hub);
    let proxy = recipe.read_proxy().map(|proxy| model(Source::Proxy, proxy, recipe, &hub));
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

/// One of the recipe's models.
fn model(
    role: Source,
    section: &ModelSection,
    recipe: &Recipe,
    hub: &Hub,
) -> Result<(Check, TextTokenizer), Check> {
    match ModelFiles::of_recipe(hub, recipe, role, section) {
        Ok(found) => {
            let detail = format!("`{}`, {}, in `{}`", found.name, section.shape, found.folder.display());
            Ok((Check::ok(role.name(), detail), found.tokenizer))
        }
        Err(e) => Err(Check::error(role.name(), &e)),
    }
}

/// Labels and features meet position by position, so both models must tokenize alike.
fn vocabulary(target: &TextTokenizer, proxy: &TextTokenizer) -> Check {
    match target.same_vocab(proxy) {
        Ok(()) => {
            Check::ok("vocabulary", format!("shared by target and proxy, {} tokens", target.vocab_size()))
        }
        Err(e) => Check::error("vocabulary", &e),
    }
}
