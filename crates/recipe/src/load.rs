//! From a recipe file and `--set` overrides to a validated [`Recipe`].

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Seed, Source, hinted};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    DataSection, EvalSection, ExportSection, ExtractSection, LabelSection, LossSection, MapperSection,
    ModelSection, TrainSection,
};

/// Recipes that may be based on one another in a row.
const MOST_BASES: usize = 8;

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
    /// The small model, whose attention is read; the target, if features come from it alone.
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

/// Read `path` and the recipe that its `base` names, apply `overrides` (each `section.key=value`, value in TOML; bare
/// words are strings), check.
///
/// # Errors
/// The file is absent or no TOML; a key is unknown or has the wrong type; a value is out of range.
pub fn load(path: &Path, overrides: &[String]) -> Result<Recipe> {
    let invalid = || format!("invalid recipe `{}`", path.display());
    let (text, own) = read(path)?;
    let derived = own.contains_key("base");
    let mut table = based(path, own, MOST_BASES)?;
    for assignment in overrides {
        set(&mut table, assignment).with_context(|| format!("cannot apply `--set {assignment}`"))?;
    }
    let filled = proxy_of_one_model(&mut table);
    let mut recipe: Recipe = if overrides.is_empty() && !derived && !filled {
        // From the text, so that errors show line and column.
        toml::from_str(&text).map_err(unknown_key_hint).with_context(invalid)?
    } else {
        table.try_into().map_err(unknown_key_hint).with_context(invalid)?
    };
    recipe.path = path.to_path_buf();
    recipe.check().with_context(invalid)?;
    Ok(recipe)
}

/// A recipe whose features come from the target alone needs no proxy; where none is named, the target takes its place, so
/// that every recipe has both. Returns whether it did.
fn proxy_of_one_model(table: &mut Table) -> bool {
    let from = table.get("extract").and_then(|extract| extract.get("from"));
    let alone = from.is_some_and(|from| *from == Value::from(vec![Source::Target.name()]));
    match table.get("target") {
        Some(target) if alone && !table.contains_key("proxy") => {
            let target = target.clone();
            table.insert("proxy".to_owned(), target);
            true
        }
        _ => false,
    }
}

/// The text of a recipe, and its table.
fn read(path: &Path) -> Result<(String, Table)> {
    let text = fs::read_to_string(path).with_context(|| {
        hinted(
            format!("cannot read recipe `{}`", path.display()),
            "recipes live in `recipes/`; pass one with `--recipe`",
        )
    })?;
    let table = toml::from_str(&text).with_context(|| format!("invalid recipe `{}`", path.display()))?;
    Ok((text, table))
}

/// `table`, the recipe of `path`, on top of the recipe that its `base` names, which may have a base itself.
fn based(path: &Path, mut table: Table, deeper: usize) -> Result<Table> {
    let Some(base) = table.remove("base") else { return Ok(table) };
    let named = || format!("`base` of recipe `{}`", path.display());
    let base = base.as_str().with_context(|| format!("{} is no text", named()))?;
    ensure!(
        deeper > 0,
        hinted(
            format!("{} is the {MOST_BASES}th in a row", named()),
            "recipes must not be based on each other"
        )
    );
    // Beside the recipe that names it.
    let base = path.parent().unwrap_or(Path::new("")).join(base);
    let (_, under) = read(&base).with_context(named)?;
    let mut under = based(&base, under, deeper - 1)?;
    merge(&mut under, table);
    Ok(under)
}

/// Put the keys of `over` into `under`, section by section.
fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(under)), Value::Table(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
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
