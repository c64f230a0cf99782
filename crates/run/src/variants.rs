//! Which runs a sweep has: the recipe, then recipes of files and folders, then those of varied keys.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_recipe::{Override, Recipe, toml_files};

use crate::session::load_recipe;

/// The runs that a user names.
#[derive(Clone, Copy, Debug)]
pub struct Variants<'a> {
    /// What the others are compared with.
    pub recipe: &'a Path,
    /// Overrides of all runs.
    pub overrides: &'a [Override],
    /// Recipes of variants, or folders of them.
    pub files: &'a [PathBuf],
    /// `key=value,...`: a variant for each combination.
    pub vary: &'a [String],
    /// Only these, by the names of files or runs.
    pub only: &'a [String],
}

/// One run.
pub struct Variant {
    pub recipe: Recipe,
    /// Its overrides, as `--set` takes them.
    pub assignments: Vec<String>,
}

impl Variants<'_> {
    /// The recipe first.
    ///
    /// # Errors
    /// A recipe is invalid, two runs have one name, `--only` names none, or there is no variant.
    pub fn all(self) -> Result<Vec<Variant>> {
        let variant = |path: &Path, more: &[Override]| -> Result<Variant> {
            let overrides = [self.overrides, more].concat();
            let recipe = load_recipe(path, &overrides)?;
            Ok(Variant { recipe, assignments: overrides.into_iter().map(|o| o.assignment).collect() })
        };
        let base = variant(self.recipe, &[])?;
        let mut found: Vec<(String, Variant)> = Vec::new();
        for path in files(self.files)? {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            found.push((stem, variant(&path, &[])?));
        }
        for choices in combinations(self.vary)? {
            let name = choices.iter().fold(base.recipe.name.clone(), |name, (key, value)| {
                let last = key.rsplit('.').next().unwrap_or(key);
                format!("{name}-{last}-{}", plain(value))
            });
            let mut overrides = Vec::new();
            for (key, value) in &choices {
                let assignment = format!("{key}={value}");
                overrides.push(Override::by_flag(format!("--vary {assignment}"), assignment));
            }
            overrides.push(Override::by_flag("--vary".to_owned(), format!("name=\"{name}\"")));
            found.push((name, variant(self.recipe, &overrides)?));
        }
        ensure!(
            !found.is_empty(),
            hinted(
                "a sweep of one recipe has nothing to compare",
                "name variants, `--variants recipes/ablations`, or vary a key, `--vary train.steps=500,1000`"
            )
        );
        if !self.only.is_empty() {
            let is_called = |name: &String, (stem, variant): &(String, Variant)| {
                name == stem || *name == variant.recipe.name
            };
            if let Some(name) = self.only.iter().find(|name| !found.iter().any(|v| is_called(name, v))) {
                let known: Vec<&str> = found.iter().map(|(stem, _)| stem.as_str()).collect();
                bail!(hinted(
                    format!("`--only {name}` names no variant"),
                    format!("there are {}", known.join(", "))
                ));
            }
            found.retain(|v| self.only.iter().any(|name| is_called(name, v)));
        }
        let all: Vec<Variant> = std::iter::once(base).chain(found.into_iter().map(|(_, v)| v)).collect();
        for (i, one) in all.iter().enumerate() {
            if let Some(other) = all[..i].iter().find(|other| other.recipe.name == one.recipe.name) {
                bail!(hinted(
                    format!(
                        "two runs are called `{}`: those of `{}` and `{}`",
                        one.recipe.name,
                        other.recipe.path.display(),
                        one.recipe.path.display()
                    ),
                    "give each recipe a `name` of its own, and leave `--set name` out"
                ));
            }
        }
        Ok(all)
    }
}

/// Files as they are named, and those of folders, in the order of their names.
fn files(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in named {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let mut below = Vec::new();
        toml_files(path, 0, &mut below);
        below.retain(|path| !path.to_string_lossy().ends_with(".lock.toml"));
        below.sort();
        ensure!(
            !below.is_empty(),
            hinted(format!("there is no recipe in `{}`", path.display()), "name a folder of `.toml` files")
        );
        all.append(&mut below);
    }
    Ok(all)
}

/// Every combination of one value of each key.
fn combinations(vary: &[String]) -> Result<Vec<Vec<(String, String)>>> {
    let mut all = Vec::new();
    for text in vary {
        let (key, values) = text.split_once('=').with_context(|| {
            hinted(format!("`--vary {text}` has no `=`"), "write `--vary train.steps=500,1000`")
        })?;
        let values = split(values);
        ensure!(
            values.iter().all(|value| !value.is_empty()),
            hinted(format!("`--vary {text}` has an empty value"), "write `--vary train.steps=500,1000`")
        );
        let before = if all.is_empty() { vec![Vec::new()] } else { all };
        let with = |choices: &Vec<(String, String)>| {
            let choices = choices.clone();
            let one = move |value: &String| {
                let mut choices = choices.clone();
                choices.push((key.trim().to_owned(), value.clone()));
                choices
            };
            values.iter().map(one).collect::<Vec<_>>()
        };
        all = before.iter().flat_map(with).collect();
    }
    Ok(all)
}

/// Values between commas; those inside of brackets and quotes separate nothing.
fn split(values: &str) -> Vec<String> {
    let (mut depth, mut quote, mut all) = (0_i32, None, vec![String::new()]);
    for c in values.chars() {
        match (c, quote) {
            ('"' | '\'', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth -= 1,
            (',', None) if depth == 0 => {
                all.push(String::new());
                continue;
            }
            _ => {}
        }
        all.last_mut().expect("there is one from the start").push(c);
    }
    all.iter().map(|value| value.trim().to_owned()).collect()
}

/// A value as a part of a name.
fn plain(value: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let words = value.split(|c| !is_plain(c)).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_vary_are_combined() {
        let all = combinations(&[
            "train.steps=5, 10".to_owned(),
            "extract.from=[\"proxy\",\"target\"],[\"proxy\"]".to_owned(),
        ]);
        let all = all.unwrap();
        let names: Vec<String> =
            all.iter().map(|c| c.iter().map(|(_, v)| plain(v)).collect::<Vec<_>>().join("+")).collect();
        assert_eq!(names, ["5+proxy-target", "5+proxy", "10+proxy-target", "10+proxy"]);
        assert_eq!(split("'a,b',{x = 1, y = 2},c"), ["'a,b'", "{x = 1, y = 2}", "c"]);
        assert!(
            combinations(&["train.steps".to_owned()]).is_err()
                && combinations(&["a=1,,2".to_owned()]).is_err()
        );
        assert!(combinations(&[]).unwrap().is_empty());
    }
}
