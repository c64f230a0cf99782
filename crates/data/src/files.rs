//! Which files a source means, and what represents their content in fingerprints.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use glob::Pattern;
use pkv_core::{Fingerprint, hinted};
use pkv_hub::{Hub, file_identity};
use pkv_recipe::{Manifest, Source};
use serde_json::json;

/// The files of `source`: local ones as the manifest's patterns say, hub ones from the cache.
///
/// # Errors
/// A pattern matches no file, or the data set is not in the cache.
pub fn files(manifest: &Manifest, source: &Source, hub: &Hub) -> Result<Vec<PathBuf>> {
    let found = match &source.hub {
        Some(name) => hub.dataset_files(name, &source.revision, &source.hub_files).map(|d| d.files),
        None => local(&manifest.folder, &source.files),
    };
    found.with_context(|| format!("cannot find the files of source `{}`", source.name))
}

/// Inputs of a manifest's examples in addition to the manifest: the content of local files,
/// the commits of hub data sets.
///
/// # Errors
/// As for [`crate::prepare`], where files are absent.
pub fn inputs(manifest: &Manifest, hub: &Hub) -> Result<Fingerprint> {
    let mut fingerprint = Fingerprint::new();
    for source in &manifest.sources {
        let value = match &source.hub {
            Some(name) => {
                let found = hub.dataset_files(name, &source.revision, &source.hub_files)?;
                let names: Vec<_> =
                    found.files.iter().filter_map(|f| f.strip_prefix(&found.folder).ok()).collect();
                json!({ "commit": found.commit, "files": names })
            }
            None => {
                let mut identities = Vec::new();
                for file in files(manifest, source, hub)? {
                    identities.push(file_identity(&file)?);
                }
                json!({ "files": identities })
            }
        };
        fingerprint = fingerprint.with(&source.name, value);
    }
    Ok(fingerprint)
}

/// Files that match `patterns`, below `folder` or else below the working directory; each once.
fn local(folder: &Path, patterns: &[String]) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for pattern in patterns {
        let mut found = matching(folder, pattern)?;
        if found.is_empty() {
            found = matching(Path::new(""), pattern)?;
        }
        ensure!(!found.is_empty(), {
            let link = folder.join(pattern).is_symlink();
            let beside = if folder == Path::new("") {
                String::new()
            } else {
                format!("in `{}` or ", folder.display())
            };
            hinted(
                format!(
                    "no file matches `{pattern}` {beside}in the working directory{}",
                    if link { ": it is a link, and no file is where it leads" } else { "" }
                ),
                advice(pattern),
            )
        });
        found.retain(|f| !files.contains(f));
        files.extend(found);
    }
    Ok(files)
}

/// What repairs a pattern that matches nothing.
fn advice(pattern: &str) -> &'static str {
    match pattern {
        p if p.contains("://") => {
            "an address is not read: download the file, or give a data set's `hub` in a manifest"
        }
        p if p.starts_with('~') || p.contains('$') => {
            "`~` and `$NAME` stand for themselves here, the shell replaces them where they are not quoted: write the path out"
        }
        p if p.contains('{') => {
            "patterns have `*`, `**`, `?` and `[...]`, no braces: give one for each kind of name"
        }
        p if p.contains('\\') => "write paths with `/`",
        _ => {
            "check `--data`, `data.files` or the data manifest, whose first lines may say what makes its files"
        }
    }
}

fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    // A file of exactly this name, which may hold characters that patterns give a meaning.
    let named = folder.join(pattern);
    if named.is_file() {
        return Ok(vec![named]);
    }
    // The folder's own name may hold characters that patterns give a meaning.
    let whole = match folder.to_str() {
        Some("") => pattern.to_owned(),
        Some(folder) if !Path::new(pattern).is_absolute() => format!("{}/{pattern}", Pattern::escape(folder)),
        _ => pattern.to_owned(),
    };
    let paths = glob::glob(&whole).with_context(|| format!("`{pattern}` is no file pattern"))?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.with_context(|| format!("cannot list the files that match `{pattern}`"))?;
        if path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_below_the_manifest_first() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("with [brackets]");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        for name in ["b.txt", "a.txt", "c.md", "sub/d.txt", "e[1].jsonl"] {
            std::fs::write(folder.join(name), "x").unwrap();
        }
        let names = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(|p| (*p).to_owned()).collect();
            let found = local(&folder, &patterns)?;
            anyhow::Ok(
                found
                    .iter()
                    .map(|f| f.strip_prefix(&folder).unwrap().display().to_string())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(names(&["*.txt"]).unwrap(), ["a.txt", "b.txt"]);
        assert_eq!(names(&["b.txt", "*.txt", "**/d.txt"]).unwrap(), ["b.txt", "a.txt", "sub/d.txt"]);
        assert_eq!(names(&["e[1].jsonl"]).unwrap(), ["e[1].jsonl"]);
        for (pattern, repair) in [
            ("hf://a/b.jsonl", "download the file"),
            ("~/a.txt", "write the path out"),
            ("$HOME/a.txt", "write the path out"),
            ("{a,b}.txt", "one for each"),
            ("sub\\d.txt", "with `/`"),
        ] {
            let error = names(&[pattern]).unwrap_err();
            assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains(repair), "{pattern}");
        }
        let error = names(&["e.txt"]).unwrap_err().to_string();
        assert!(error.starts_with("no file matches `e.txt` in `"), "{error}");
        let error = local(Path::new(""), &["e.txt".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "no file matches `e.txt` in the working directory");
        // Below the working directory, which for a test is the crate's own folder.
        let file = local(&folder, &["Cargo.toml".to_owned()]).unwrap();
        assert_eq!(file, [PathBuf::from("Cargo.toml")]);
    }
}
