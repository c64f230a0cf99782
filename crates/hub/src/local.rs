//! Model folders: which names mean one, whether it is whole, and what stands for its revision.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_core::hinted;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::hash::{file_identity, hex};

pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The folder that `name` means: as it stands if absolute, else below the first of `bases` that has it.
pub(crate) fn find(name: &str, bases: &[&Path]) -> Option<PathBuf> {
    let mut candidates = bases.iter().map(|b| b.join(name));
    if Path::new(name).is_absolute() {
        candidates.next().or(Some(name.into()))
    } else {
        candidates.find(|p| p.is_dir())
    }
    .filter(|p| p.is_dir())
}

/// Whether `name` cannot be a hub name (`owner/name` or `name`) and so must be a folder.
pub(crate) fn must_be_local(name: &str) -> bool {
    name.starts_with(['/', '.', '~']) || name.ends_with('/') || name.matches('/').count() > 1
}

/// Whether a file at the root of a model repository is one that `lm` reads.
pub(crate) fn is_model_file(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
        "chat_template.jinja",
        INDEX,
    ];
    // `consolidated*.safetensors` are the same weights under other names.
    NAMES.contains(&name)
        || name.ends_with(".safetensors") && !name.contains('/') && !name.starts_with("consolidated")
}

/// # Errors
/// A file without which no model can be opened is absent; all absent ones are named.
pub(crate) fn check_whole(folder: &Path, hint: &str) -> Result<()> {
    let mut missing: BTreeSet<String> = ["config.json", "tokenizer.json"].map(String::from).into();
    let index = folder.join(INDEX);
    if index.is_file() {
        missing.extend(shards(&index)?);
    } else if !weights(folder)?.iter().any(|w| w.ends_with(".safetensors")) {
        missing.insert("model.safetensors".into());
    }
    missing.retain(|f| !folder.join(f).is_file());
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = missing.iter().map(|f| format!("`{f}`")).collect();
    Err(hinted(format!("model folder `{}` lacks {}", folder.display(), list.join(", ")), hint).into())
}

/// `local:` and a hash of config, tokenizer and weights; of large weights, samples.
///
/// Copies of a folder have the same revision, retrained weights another.
pub(crate) fn revision(folder: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for name in weights(folder)? {
        hash.update(format!("{name} {}\n", file_identity(&folder.join(&name))?));
    }
    Ok(format!("local:{}", hex(&hash.finalize())))
}

/// Names of the model files in `folder`, sorted.
fn weights(folder: &Path) -> Result<Vec<String>> {
    let what = || format!("cannot list model folder `{}`", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(what)? {
        let name = entry.with_context(what)?.file_name();
        names.extend(name.to_str().filter(|n| is_model_file(n)).map(String::from));
    }
    names.sort();
    Ok(names)
}

/// Shards that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let what = || format!("cannot read weight index `{}`", index.display());
    let json: Value = serde_json::from_slice(&fs::read(index).with_context(what)?).with_context(what)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .context("it has no `weight_map`")
        .with_context(what)?;
    Ok(map.values().filter_map(Value::as_str).map(String::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names_and_paths_are_told_apart() {
        for name in ["/abs", "./a", "../a", "a/b/c", "~/m", "a/"] {
            assert!(must_be_local(name), "{name}");
        }
        for name in ["gpt2", "meta-llama/Llama-3.1-8B", "models/tiny"] {
            assert!(!must_be_local(name), "{name}");
        }
    }

    #[test]
    fn only_what_lm_reads_is_downloaded() {
        for name in ["config.json", "model-00001-of-00004.safetensors", "model.safetensors", INDEX] {
            assert!(is_model_file(name), "{name}");
        }
        for name in [
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "onnx/model.safetensors",
            "README.md",
        ] {
            assert!(!is_model_file(name), "{name}");
        }
    }

    #[test]
    fn a_revision_changes_with_the_weights_and_not_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, weights: &[u8], length: u64| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("config.json"), "{}").unwrap();
            fs::write(folder.join("model.safetensors"), weights).unwrap();
            fs::OpenOptions::new()
                .write(true)
                .open(folder.join("model.safetensors"))
                .unwrap()
                .set_len(length)
                .unwrap();
            revision(&folder).unwrap()
        };
        let a = make("a", b"weights", 7);
        assert!(a.starts_with("local:") && a.len() == 70, "{a}");
        assert_eq!(make("b", b"weights", 7), a);
        assert_ne!(make("c", b"weighty", 7), a);
        // Too large to read whole: a sparse file of 1 GiB.
        let large = make("d", b"weights", 1 << 30);
        assert_eq!(make("e", b"weights", 1 << 30), large);
        assert_ne!(make("f", b"weighty", 1 << 30), large);
    }
}
