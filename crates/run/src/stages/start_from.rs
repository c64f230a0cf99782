//! `train.start_from`: the export whose weights training starts from. What must be the same in both recipes
//! is compared here, by name; the weights are `train`'s to load.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_checkpoint::{Export, ExportDims};
use pkv_core::{Fingerprint, ModelShape, hinted};
use pkv_mapper::MapperDims;
use pkv_recipe::{ExtractSection, Recipe};
use pkv_shard::RunLayout;

use crate::session::Session;

/// The export that the recipe names, if it names one and it fits.
///
/// # Errors
/// It is absent or damaged, is the run's own, or is of other sizes, sources, channels or of another network.
pub fn read(s: &Session) -> Result<Option<Export>> {
    let Some(named) = &s.recipe.train.start_from else { return Ok(None) };
    let context = || format!("cannot start from `train.start_from` = `{named}`");
    let folder = folder(Path::new(named), s.run.root());
    let is_own = |own: &Path| match (fs::canonicalize(&folder), fs::canonicalize(own)) {
        (Ok(folder), Ok(own)) => folder.starts_with(own),
        _ => false,
    };
    ensure!(
        !is_own(s.run.root()),
        hinted(
            format!("`train.start_from` = `{named}` is the export of this run, which the training replaces"),
            "set another `name` in the recipe, or name another run's export"
        )
    );
    let export = Export::read(&folder).with_context(context)?;
    check(&export, &s.recipe).with_context(context)?;
    Ok(Some(export))
}

/// An export as it was named, that of a run folder, or that of a run of this name beside `run`.
fn folder(named: &Path, run: &Path) -> PathBuf {
    let beside = run.parent().map(|runs| runs.join(named)).unwrap_or_default();
    let by_name = !named.exists() && named.components().count() == 1 && beside.is_dir();
    let named = if by_name { beside } else { named.to_path_buf() };
    let below = RunLayout::new(&named).export();
    if !named.join("config.json").is_file() && below.is_dir() { below } else { named }
}

/// Refuse weights that would mean something else here.
fn check(export: &Export, recipe: &Recipe) -> Result<()> {
    let c = export.config();
    let refuse = |what: &str, found: String, expected: String| {
        hinted(
            format!(
                "the mapper of export `{}` does not fit this recipe: {what} is {found}, expected {expected}",
                export.folder().display()
            ),
            "start from an export with the same layers, KV heads, sources, channels and `[mapper]`, change the recipe, or \
             leave `train.start_from` out",
        )
    };
    let same = |what: &str, found: String, expected: String| -> Result<()> {
        ensure!(found == expected, refuse(what, found, expected));
        Ok(())
    };
    let sources = |e: &ExtractSection| names(&e.from);
    same("`extract.from`", sources(&c.extract), sources(&recipe.extract))?;
    for &source in &recipe.extract.from {
        let what = source.name();
        same(
            &format!("the channels of the {what}"),
            names(c.extract.channels_of(source)),
            names(recipe.extract.channels_of(source)),
        )?;
        let theirs = source.shape(&c.target.shape, c.read_proxy().map(|proxy| &proxy.shape));
        let ours = source.shape(recipe.shapes().0, recipe.shapes().1);
        let heads = |shape: Option<&ModelShape>| shape.map_or_else(String::new, heads);
        same(&format!("the {what}'s layers x KV heads"), heads(theirs), heads(ours))?;
    }
    same("`extract.globals`", names(&c.extract.globals), names(&recipe.extract.globals))?;
    same("the target's layers x KV heads", heads(&c.target.shape), heads(&recipe.target.shape))?;
    let network = |m: &pkv_recipe::MapperSection| Fingerprint::new().with("mapper", m);
    let differences = network(&c.mapper).difference(&network(&recipe.mapper));
    // How the skip was found says nothing about what it is.
    if let Some((key, found, expected)) = differences.into_iter().find(|d| d.0 != "mapper.ridge") {
        return Err(refuse(&format!("`{key}`"), found.to_string(), expected.to_string()).into());
    }
    let (theirs, ours): (ExportDims, ExportDims) = (c.dims, MapperDims::of(recipe).into());
    same("its sizes", format!("{theirs:?}"), format!("{ours:?}"))
}

fn heads(shape: &ModelShape) -> String {
    format!("{} x {}", shape.layers, shape.kv_heads)
}

fn names<T: serde::Serialize>(list: &[T]) -> String {
    serde_json::to_string(list).unwrap_or_default()
}
