//! Where each value of a recipe comes from: a line of the recipe or of its base, the command line, or a
//! default.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Error;

use crate::mistake;

/// A key that the command line sets, and how it was said there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// `section.key=value`, value in TOML; bare words are texts.
    pub assignment: String,
    /// `--set train.steps=500`, `--limit 3`.
    pub said: String,
}

impl Override {
    /// Set by an option that is a shorthand for a key.
    pub fn by_flag(said: impl Into<String>, assignment: impl Into<String>) -> Self {
        Self { assignment: assignment.into(), said: said.into() }
    }

    pub(crate) fn key(&self) -> &str {
        self.assignment.split_once('=').map_or("", |(key, _)| key.trim())
    }
}

impl From<String> for Override {
    fn from(assignment: String) -> Self {
        Self { said: format!("--set {assignment}"), assignment }
    }
}

impl From<&str> for Override {
    fn from(assignment: &str) -> Self {
        assignment.to_owned().into()
    }
}

/// Where a value was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    Line(PathBuf, usize),
    CommandLine(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Line(path, line) => write!(f, "{}, line {line}", path.display()),
            Self::CommandLine(said) => f.write_str(said),
        }
    }
}

/// The files and options that made a recipe.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    /// The recipe's own text, then that of its base, and so on.
    pub(crate) files: Vec<(PathBuf, String)>,
    pub(crate) overrides: Vec<Override>,
}

impl Origins {
    /// The files that the recipe is based on, the nearest first.
    pub fn bases(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().skip(1).map(|(path, _)| path.as_path())
    }

    /// Of a dotted key; an entry of a list (`eval.ratios[1]`) has that of the list.
    pub fn of(&self, key: &str) -> Origin {
        let key = key.split('[').next().unwrap_or(key);
        let within = |a: &str, b: &str| a == b || b.strip_prefix(a).is_some_and(|rest| rest.starts_with('.'));
        let set = self.overrides.iter().rev().find(|o| within(o.key(), key) || within(key, o.key()));
        if let Some(set) = set {
            return Origin::CommandLine(set.said.clone());
        }
        let keys: Vec<&str> = key.split('.').collect();
        let line = self.files.iter().find_map(|(path, text)| Some((path, mistake::line_in(text, &keys)?)));
        match line {
            Some((path, line)) => Origin::Line(path.clone(), line),
            None => Origin::Default,
        }
    }

    /// `error`, which is about a value and names its key, with the place where that was set, under `invalid`.
    pub fn place(&self, error: Error, invalid: String) -> Error {
        let said = error.root_cause().to_string();
        let all = format!("{error:#} {said}");
        let is_key = |name: &&str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_.[]".contains(c);
            !name.is_empty() && name.chars().all(plain) && self.of(name) != Origin::Default
        };
        match all.split('`').skip(1).step_by(2).find(is_key).map(|key| self.of(key)) {
            Some(Origin::CommandLine(said)) => {
                // A flag that counts; a key may be a share.
                let counts = !said.starts_with("--set") && said.ends_with(" 0");
                let more = if counts { ": 1 or more" } else { "" };
                let hint = format!("change the value of `{said}`{more}");
                mistake::or_hint(error, format!("cannot apply `{said}`"), &hint).context(invalid)
            }
            Some(Origin::Line(path, line)) => {
                let invalid = format!("{invalid}: line {line} of `{}`", path.display());
                mistake::or_hint(error, invalid, "change the value there, or with `--set key=value`")
            }
            _ => {
                mistake::or_hint(error, invalid, "change the value in the recipe, or with `--set key=value`")
            }
        }
    }
}
