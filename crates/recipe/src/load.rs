//! From a recipe file and `--set` overrides to a validated [`Recipe`].

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{ModelShape, Seed, Source, hinted};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::files::{DEEPEST, toml_files};
use crate::{
    DataSection, EvalSection, ExportSection, ExtractSection, FactsSection, LabelSection, LaunchSection,
    LossSection, MapperSection, ModelSection, PruneSection, TrainSection,
};
use crate::{Origins, Override, bounds, mistake};

/// Recipes that may be based on one another in a row.
const MOST_BASES: usize = 8;

/// One resolved run: nothing that a stage needs is optional, but for [`Recipe::read_proxy`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the pair and of the run folder, `runs/<name>`.
    pub name: String,
    /// Seed of everything that is drawn: windows, facts, the order of contexts, baselines.
    #[serde(default = "default_seed")]
    pub seed: Seed,
    /// The big model, whose cache is pruned.
    pub target: ModelSection,
    /// The small model, whose attention is read. Needed, and read at all, only where `extract.from` names the
    /// proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ModelSection")]
    pub proxy: Option<ModelSection>,
    pub data: DataSection,
    #[serde(default)]
    pub facts: FactsSection,
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
    pub prune: PruneSection,
    #[serde(default)]
    pub eval: EvalSection,
    #[serde(default)]
    pub export: ExportSection,
    #[serde(default)]
    pub launch: LaunchSection,
    /// The recipe file, for messages and for paths relative to it.
    #[serde(skip)]
    pub path: PathBuf,
}

/// Read `path` and the recipe that its `base` names, apply `overrides` (each `section.key=value`, value in
/// TOML; bare words are strings), check.
///
/// ```
/// use std::path::Path;
///
/// use pkv_recipe::{Override, load};
///
/// let path = Path::new("../../recipes/demo-nano.toml");
/// let recipe = load(path, &[Override::from("train.batch=4")])?;
/// assert_eq!((recipe.target.shape.layers, recipe.train.batch), (6, 4));
/// let error = load(path, &[Override::from("train.bach=4")]).unwrap_err();
/// assert!(format!("{error:#}").contains("bach"));
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// The file is absent or no TOML; a key is unknown or has the wrong type; a value is out of range.
pub fn load(path: &Path, overrides: &[Override]) -> Result<Recipe> {
    Ok(load_with_origins(path, overrides)?.0)
}

/// As [`load`], and where each value comes from.
///
/// # Errors
/// As of [`load`].
pub fn load_with_origins(path: &Path, overrides: &[Override]) -> Result<(Recipe, Origins)> {
    let invalid = || format!("invalid recipe `{}`", path.display());
    let mut files = Vec::new();
    let own = based(path, MOST_BASES, &mut files)?;
    let with = |overrides: &mut dyn Iterator<Item = &Override>| -> Result<Table> {
        let mut table = own.clone();
        for over in overrides {
            set(&mut table, &over.assignment).with_context(|| format!("cannot apply `{}`", over.said))?;
        }
        Ok(table)
    };
    let mut recipe: Recipe = match with(&mut overrides.iter())?.try_into() {
        Ok(recipe) => recipe,
        Err(error) => {
            let error: toml::de::Error = error;
            // The assignment without which it would be right, or wrong in another way.
            for (i, over) in overrides.iter().enumerate() {
                let others =
                    with(&mut overrides.iter().enumerate().filter(|(k, _)| *k != i).map(|(_, o)| o))?;
                if others.try_into::<Recipe>().map_or_else(|e| e.to_string() != error.to_string(), |_| true) {
                    return Err(mistake::in_assignment(error, over)).with_context(invalid);
                }
            }
            return Err(in_files(error, path, &files));
        }
    };
    recipe.path = path.to_path_buf();
    recipe.eval.settle();
    let origins = Origins { files, overrides: overrides.to_vec() };
    recipe.check().map_err(|e| origins.place(e, invalid()))?;
    Ok((recipe, origins))
}

/// The keys of a profile of `launch`, the file `path`, as overrides of `[launch]`.
///
/// # Errors
/// The file is absent or no TOML.
pub fn profile(path: &Path) -> Result<Vec<Override>> {
    fn leaves(key: &str, value: &Value, said: &str, out: &mut Vec<Override>) {
        match value {
            Value::Table(table) => {
                table.iter().for_each(|(name, v)| leaves(&format!("{key}.{name}"), v, said, out));
            }
            value => out.push(Override::by_flag(said, format!("{key}={value}"))),
        }
    }
    let text = pkv_core::read_settings(path).with_context(|| {
        hinted(
            format!("cannot read profile `{}`", path.display()),
            "a profile has the keys of a recipe's `[launch]`, without that line",
        )
    })?;
    let table: Table = toml::from_str(&text)
        .map_err(|e| mistake::in_file(e, format!("invalid profile `{}`", path.display())))?;
    let mut out = Vec::new();
    leaves("launch", &Value::Table(table), &format!("--profile {}", path.display()), &mut out);
    Ok(out)
}

/// The error of a recipe that `files` make together, the recipe's own first.
fn in_files(error: toml::de::Error, path: &Path, files: &[(PathBuf, String)]) -> anyhow::Error {
    let invalid = format!("invalid recipe `{}`", path.display());
    if let [(_, text)] = files {
        // From the text, so that the error shows line and column.
        let shown = toml::from_str::<Recipe>(text).err();
        return mistake::in_recipe(shown.unwrap_or(error), invalid);
    }
    let place = mistake::line_of(&error, files);
    let place = place.map(|(file, line)| format!("{invalid}: line {line} of `{}`", file.display()));
    mistake::in_recipe(error, place.unwrap_or(invalid))
}

/// The recipe that is most like `path`, which cannot be read: a name without its folder, or a misspelled one.
fn alike(path: &Path) -> Option<PathBuf> {
    let wanted = path.file_stem()?.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for (folder, deeper) in [("recipes", DEEPEST), (".", 0)] {
        toml_files(Path::new(folder), deeper, &mut found);
    }
    let likeness = |file: &PathBuf| {
        file.file_stem().map_or(0.0, |stem| strsim::jaro_winkler(&stem.to_string_lossy(), &wanted))
    };
    // The first of equals, which is the one above.
    let likest = found.into_iter().rev().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(&likest) > mistake::ALIKE)
        .then(|| likest.strip_prefix(".").map(Path::to_owned).unwrap_or(likest))
}

/// The text of a recipe, and its table.
fn read(path: &Path) -> Result<(String, Table)> {
    let text = pkv_core::read_settings(path).with_context(|| {
        let meant = alike(path).map(|file| format!("did you mean `{}`? ", file.display()));
        hinted(
            format!("cannot read recipe `{}`", path.display()),
            format!(
                "{}`proxykv-train recipes ls` lists the recipes below `recipes/`",
                meant.unwrap_or_default()
            ),
        )
    })?;
    let table = toml::from_str(&text)
        .map_err(|e| mistake::in_recipe(e, format!("invalid recipe `{}`", path.display())))?;
    Ok((text, table))
}

/// The recipe of `path` on top of the recipe that its `base` names, which may have a base itself; all their
/// texts are added to `files`.
fn based(path: &Path, deeper: usize, files: &mut Vec<(PathBuf, String)>) -> Result<Table> {
    let (text, mut table) = read(path)?;
    files.push((path.to_path_buf(), text));
    let Some(base) = table.remove("base") else { return Ok(table) };
    let named = || format!("`base` of recipe `{}`", path.display());
    let base = base.as_str().with_context(|| {
        hinted(format!("{} is no text", named()), "name a recipe beside it: `base = \"other.toml\"`")
    })?;
    ensure!(
        deeper > 0,
        hinted(
            format!("{} is the {MOST_BASES}th in a row", named()),
            "recipes must not be based on each other"
        )
    );
    // Beside the recipe that names it.
    let base = path.parent().unwrap_or(Path::new("")).join(base);
    let mut under = based(&base, deeper - 1, files).with_context(named)?;
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
    /// The project that the recipe belongs to: the folder above the recipe's own.
    pub fn root(&self) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join("..")
    }

    /// The proxy, if features come from it. With those of the target alone none is found, fetched, opened,
    /// planned or named, whether the recipe has a `[proxy]` or not: all that ask for a proxy ask here.
    pub fn read_proxy(&self) -> Option<&ModelSection> {
        self.proxy.as_ref().filter(|_| self.extract.from.contains(&Source::Proxy))
    }

    /// The section of a source of features; a recipe that `load` returned has one for each that
    /// `extract.from` names.
    pub fn model_of(&self, source: Source) -> Option<&ModelSection> {
        match source {
            Source::Target => Some(&self.target),
            Source::Proxy => self.read_proxy(),
        }
    }

    /// Shapes of the target and of the proxy that is read, as layouts of features take them.
    pub fn shapes(&self) -> (&ModelShape, Option<&ModelShape>) {
        (&self.target.shape, self.read_proxy().map(|proxy| &proxy.shape))
    }

    /// Whether `label` takes the target's features from its own prefill, after a prefix of `prefix` tokens.
    ///
    /// A channel that is fitted to the labels needs a second pass when they are complete. Where prefill
    /// chunks of the two stages differ, one prefill would round features or labels otherwise than the stage
    /// alone does.
    pub fn labels_give_features(&self, prefix: usize) -> bool {
        let chunks = [self.label.prefill_chunk_tokens, self.extract.prefill_chunk_tokens];
        let longest = self.data.longest_window() + prefix;
        self.extract.from.contains(&Source::Target)
            && !self.extract.is_transient()
            && !self.extract.is_fitted(Source::Target)
            && (chunks[0] == chunks[1] || chunks.iter().all(|&tokens| tokens >= longest))
    }

    /// What [`load`] checks. A recipe that was stored, as in `run.json`, may have been damaged since.
    ///
    /// # Errors
    /// A value is out of bounds, or does not go with another.
    pub fn check(&self) -> Result<()> {
        ensure!(
            !self.name.is_empty()
                && self.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)),
            hinted(
                format!("`name` is `{}`", self.name),
                "use letters, digits, `-`, `_` and `.`: it names the run folder"
            )
        );
        let proxy = self.proxy.as_ref().map(|proxy| ("proxy", proxy));
        for (section, m) in [("target", &self.target)].into_iter().chain(proxy) {
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
        bounds::check("", self)?;
        self.data.check()?;
        self.label.check()?;
        self.extract.check()?;
        ensure!(
            self.proxy.is_some() || !self.extract.from.contains(&Source::Proxy),
            hinted(
                "`extract.from` takes features from the proxy, and the recipe has no section `[proxy]`",
                "add `[proxy]` with its `model` and `[proxy.shape]`, or set `extract.from = [\"target\"]`, which needs none"
            )
        );
        self.mapper.check()?;
        self.loss.check()?;
        self.train.check()?;
        self.prune.check()?;
        self.launch.check()?;
        ensure!(
            self.train.auto().is_none() || self.data.validation > 0,
            hinted(
                "`train.steps` is `auto`, and `data.validation` is 0: nothing would end the training",
                "ask for validation examples, or set `train.steps` to a number"
            )
        );
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
    const FORM: &str = "write `--set section.key=value`, such as `--set train.steps=500`";
    let Some((key, value)) = assignment.split_once('=') else {
        bail!(hinted("there is no `=` in it", FORM));
    };
    let mut at = table;
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).with_context(|| hinted("the key is empty", FORM))?;
    for part in parts {
        let entry = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        at = entry.as_table_mut().with_context(|| hinted(format!("`{part}` is no section"), FORM))?;
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

fn default_seed() -> Seed {
    Seed(1)
}
