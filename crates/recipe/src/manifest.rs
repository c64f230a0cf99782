//! Data manifests: the documents a run reads, pinned by revision, with their licence.
//!
//! Opening the files and cutting them into examples is left to `data`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Split, hinted};
use serde::{Deserialize, Serialize};

use crate::mistake;

/// The documents of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Purpose of the mixture, in a sentence.
    pub description: String,
    /// Where the documents come from; at least one.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
    /// Facts planted in the documents; none if absent.
    #[serde(default)]
    pub facts: Option<Facts>,
    /// The manifest's own folder: local paths of its sources are relative to it, or to the working directory.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// One file or hub data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Name in tables and in the examples' `source` column.
    pub name: String,
    /// Local files; `*` and `**` as in `hub_files`. Exactly one of `files` and `hub` is given.
    #[serde(default)]
    pub files: Vec<String>,
    /// Hub data set, `owner/name`.
    #[serde(default)]
    pub hub: Option<String>,
    /// Branch, tag or commit of the hub data set; the lock file that `fetch` writes pins it.
    #[serde(default = "main")]
    pub revision: String,
    /// Files inside the hub data set; `*` matches within a file or folder name, `**` any number of folders.
    #[serde(default)]
    pub hub_files: Vec<String>,
    pub format: SourceFormat,
    /// Column (parquet) or key (jsonl) that holds the text.
    #[serde(default = "text")]
    pub text: String,
    /// Separator of documents in a txt file; one document per file if absent.
    #[serde(default)]
    pub separator: Option<String>,
    /// Share of the examples, relative to the other sources' weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// What the documents are for. One kind of text held out of training is a source with
    /// `splits = ["test"]`. A document whose hash puts it in a split that is not here goes to the first that
    /// is.
    #[serde(default = "all_splits", skip_serializing_if = "is_all")]
    pub splits: Vec<Split>,
    /// Licence of the text (SPDX name or a sentence).
    pub licence: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceFormat {
    Txt,
    Jsonl,
    Parquet,
    /// One JSON file, as some benchmarks come; no documents.
    Json,
}

impl SourceFormat {
    /// By the ending of a path or pattern, that of a compression aside.
    fn of_pattern(pattern: &str) -> Result<Self> {
        let example = || match Path::new(pattern).is_dir() {
            true => format!("name its files: `{}/*.txt`", pattern.trim_end_matches('/')),
            false => "say which files: `my/*.txt`, `my/*.jsonl` or `my/*.parquet`".to_owned(),
        };
        let name = pattern.rsplit('/').next().unwrap_or_default().to_lowercase();
        let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
        match plain.rsplit_once('.').map_or("", |(_, ending)| ending) {
            "jsonl" | "ndjson" => Ok(Self::Jsonl),
            "parquet" => Ok(Self::Parquet),
            "json" => bail!(hinted(
                format!("`{pattern}` names JSON files, which hold no documents line by line"),
                "write JSON lines (`.jsonl`), one object with a `text` per line"
            )),
            "csv" | "tsv" | "xls" | "xlsx" | "ods" => bail!(hinted(
                format!("`{pattern}` names tables, which hold no documents line by line"),
                "write Parquet or JSON lines: `pandas.read_csv(...).to_parquet(...)`, `.to_json(..., orient='records', lines=True)`"
            )),
            ending if ending.contains(['*', '?', '[']) || Path::new(pattern).is_dir() || name.is_empty() => {
                bail!(hinted(format!("`{pattern}` does not say what kind of files it means"), example()))
            }
            "" if name.contains(['*', '?', '[']) => {
                bail!(hinted(format!("`{pattern}` does not say what kind of files it means"), example()))
            }
            _ => Ok(Self::Txt),
        }
    }
}

/// Planted-fact augmentation: sentences such as "The owner of the silver lantern is Alice Tall." in
/// a document, so that examples hold what questions are asked about. Their places are the recipe's
/// `facts.place`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// JSON file with the word lists (`adj`, `noun`, `city`, `name`); the built-in lists if absent.
    #[serde(default)]
    pub words: Option<String>,
    /// Fewest facts per example.
    #[serde(default)]
    pub min: usize,
    /// Most facts per example; never more than one per 40 tokens.
    pub max: usize,
}

/// Read and check a manifest.
///
/// # Errors
/// The file is absent, no TOML, holds an unknown key, or names a source twice or without files.
pub fn load_manifest(path: &Path) -> Result<Manifest> {
    let text = pkv_core::read_settings(path).with_context(|| {
        hinted(
            format!("cannot read data manifest `{}`", path.display()),
            "check `data.manifest`; manifests live in `data-manifests/`",
        )
    })?;
    let invalid = || format!("invalid data manifest `{}`", path.display());
    let mut manifest: Manifest = toml::from_str(&text).map_err(|e| mistake::in_file(e, invalid()))?;
    manifest.folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
    manifest.check().map_err(|e| mistake::or_hint(e, invalid(), "change it in the manifest"))?;
    Ok(manifest)
}

impl Manifest {
    /// The manifest of a recipe whose `data.files` names the documents: a source for each kind of file.
    ///
    /// # Errors
    /// A pattern does not tell what its files are, or they are of a kind that holds no documents.
    pub fn of_files(patterns: &[String]) -> Result<Self> {
        let mut sources: Vec<Source> = Vec::new();
        for pattern in patterns {
            let format = SourceFormat::of_pattern(pattern)?;
            if let Some(source) = sources.iter_mut().find(|s| s.format == format) {
                source.files.push(pattern.clone());
                continue;
            }
            sources.push(Source {
                name: format!("{format:?}").to_lowercase(),
                files: vec![pattern.clone()],
                hub: None,
                revision: main(),
                hub_files: Vec::new(),
                format,
                text: text(),
                separator: None,
                weight: 1.0,
                splits: all_splits(),
                licence: "not stated".to_owned(),
            });
        }
        let facts = Some(Facts { words: None, min: 0, max: 8 });
        let description = "Documents that the recipe names itself".to_owned();
        Ok(Self { description, sources, facts, folder: PathBuf::new() })
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.sources.is_empty(), "it has no `[[source]]`");
        for (i, s) in self.sources.iter().enumerate() {
            ensure!(self.sources[..i].iter().all(|t| t.name != s.name), "two sources are named `{}`", s.name);
            ensure!(
                s.files.is_empty() == s.hub.is_some(),
                "source `{}` must have either `files` (local) or `hub`",
                s.name
            );
            ensure!(
                s.hub.is_none() || !s.hub_files.is_empty(),
                "source `{}` names the hub data set but no `hub_files`",
                s.name
            );
            ensure!(
                s.separator.is_none() || s.format == SourceFormat::Txt,
                "source `{}` has a `separator`, which only txt files have",
                s.name
            );
            ensure!(
                s.separator.as_deref() != Some(""),
                hinted(
                    format!("source `{}` has an empty `separator`", s.name),
                    "leave it out: each file is then one document"
                )
            );
            ensure!(
                !s.splits.is_empty(),
                hinted(
                    format!("source `{}` serves no split", s.name),
                    "name some of \"train\", \"validation\" and \"test\" in `splits`, or leave it out for all three"
                )
            );
            ensure!(s.weight > 0.0 && s.weight.is_finite(), "source `{}` has weight {}", s.name, s.weight);
        }
        for split in Split::ALL {
            ensure!(
                self.sources.iter().any(|s| s.splits.contains(&split)),
                hinted(
                    format!("no source serves the split \"{}\"", split.name()),
                    "add it to the `splits` of a source, or leave `splits` out"
                )
            );
        }
        if let Some(f) = &self.facts {
            ensure!(f.min <= f.max, "`facts.min` = {} is more than `facts.max` = {}", f.min, f.max);
        }
        Ok(())
    }
}

fn main() -> String {
    "main".to_owned()
}
fn text() -> String {
    "text".to_owned()
}
fn one() -> f64 {
    1.0
}
fn all_splits() -> Vec<Split> {
    Split::ALL.to_vec()
}
fn is_all(splits: &[Split]) -> bool {
    Split::ALL.iter().all(|s| splits.contains(s))
}

impl Source {
    /// Split of a document whose hash puts it in `split`.
    pub fn split(&self, split: Split) -> Split {
        if self.splits.contains(&split) { split } else { *self.splits.iter().min().unwrap_or(&split) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_without_a_manifest_are_grouped_by_their_kind() {
        let patterns = ["my/*.txt", "a.jsonl.gz", "notes.md", "b/**/*.parquet", "LICENSE", "c.ndjson"]
            .map(str::to_owned);
        let manifest = Manifest::of_files(&patterns).unwrap();
        manifest.check().unwrap();
        let found: Vec<_> = manifest.sources.iter().map(|s| (s.name.as_str(), s.files.len())).collect();
        assert_eq!(found, [("txt", 3), ("jsonl", 2), ("parquet", 1)]);
        for wrong in ["my/*", "my/", "a.json", "a.csv", "*.tsv.gz", "src", "*.?", ""] {
            let error = Manifest::of_files(&[wrong.to_owned()]).unwrap_err();
            assert!(error.is::<pkv_core::Hinted>(), "{wrong}: {error}");
        }
    }
}
