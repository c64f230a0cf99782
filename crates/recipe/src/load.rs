//! From a recipe file and `--set` overrides to a validated [`Recipe`].

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Seed, hinted};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    DataSection, EvalSection, ExportSection, ExtractSection, LabelSection, LossSection, MapperSection,
    ModelSection, TrainSection,
};

/// One resolved run: nothing is optional that a stage needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the pair and of the run folder, `runs/<name>`.
    pub name: String,
    #[serde(default = "default_seed")]
    pub seed: Seed,
    /// The big model, whose cache is pruned.
    pub target: ModelSection,
    /// The small model, whose attention is read.
    pub proxy: ModelSection,
    pub data: DataSection,
    #[serde(default)]
    pub label: LabelSection,
    #[serde(default)]
    pub extract: ExtractSection,
    #[serde(default)]
    pub mapper: MapperSection,
    #[serde(default)]
    pub loss: LossSection,
    #[serde(default)]
    pub train: TrainSection,
    #[serde(default)]
    pub eval: EvalSection,
    #[serde(default)]
    pub export: ExportSection,
    /// The recipe file, for messages and for paths relative to it.
    #[serde(skip)]
    pub path: PathBuf,
}

/// Read `path`, apply `overrides` (each `section.key=value`, value in TOML; bare words are strings), check.
///
/// # Errors
/// The file is absent or no TOML; a key is unknown or has the wrong type; a value is out of range.
pub fn load(path: &Path, overrides: &[String]) -> Result<Recipe> {
    let text = fs::read_to_string(path).with_context(|| {
        hinted(
            format!("cannot read recipe `{}`", path.display()),
            "recipes live in `recipes/`; pass one with `--recipe`",
        )
    })?;
    let invalid = || format!("invalid recipe `{}`", path.display());
    let mut table: Table = toml::from_str(&text).with_context(invalid)?;
    for assignment in overrides {
        set(&mut table, assignment).with_context(|| format!("cannot apply `--set {assignment}`"))?;
    }
    let mut recipe: Recipe = if overrides.is_empty() {
        // From the text, so that errors show line and column.
        toml::from_str(&text).map_err(unknown_key_hint).with_context(invalid)?
    } else {
        table.try_into().map_err(unknown_key_hint).with_context(invalid)?
    };
    recipe.path = path.to_path_buf();
    recipe.check().with_context(invalid)?;
    Ok(recipe)
}

impl Recipe {
    fn check(&self) -> Result<()> {
        ensure!(
            !self.name.is_empty()
                && self.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)),
            hinted(
                format!("`name` is `{}`", self.name),
                "use letters, digits, `-`, `_` and `.`: it names the run folder"
            )
        );
        for (section, m) in [("target", &self.target), ("proxy", &self.proxy)] {
            let s = &m.shape;
            let all = [s.layers, s.kv_heads, s.query_heads, s.head_dim, s.hidden, s.intermediate, s.vocab];
            ensure!(all.iter().all(|&n| n > 0), "`{section}.shape` holds a 0");
            ensure!(
                s.query_heads.is_multiple_of(s.kv_heads),
                "`{section}.shape.query_heads` = {} is no multiple of `kv_heads` = {}",
                s.query_heads,
                s.kv_heads
            );
        }
        self.data.check()?;
        self.label.check()?;
        self.extract.check()?;
        self.mapper.check()?;
        self.loss.check()?;
        self.train.check()?;
        self.eval.check()
    }

    /// The resolved recipe as TOML, every default written out.
    ///
    /// # Panics
    /// Never for a recipe that `load` returned.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe can be written as TOML")
    }
}

/// Set the dotted key of `key=value` in `table`, creating sections on the way.
fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let Some((key, value)) = assignment.split_once('=') else {
        bail!(hinted(
            "there is no `=` in it",
            "write `--set section.key=value`, such as `--set train.steps=500`"
        ));
    };
    let mut at = table;
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).context("the key is empty")?;
    for part in parts {
        let entry = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        at = entry.as_table_mut().with_context(|| format!("`{part}` is no section"))?;
    }
    at.insert(last.to_owned(), parse_value(value.trim()));
    Ok(())
}

/// A TOML value; what is none is a string, so that paths and names need no quotes.
fn parse_value(text: &str) -> Value {
    toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn unknown_key_hint(error: toml::de::Error) -> anyhow::Error {
    let text = error.to_string();
    if text.contains("unknown field") {
        anyhow::Error::from(error).context(hinted(
            "it has a key that no stage reads",
            "remove or rename the key; `expected` above lists the keys of that section",
        ))
    } else {
        error.into()
    }
}

fn default_seed() -> Seed {
    Seed(1)
}
