//! Model folders: which names mean one, whether it is whole, and what represents its revision.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_core::{Hinted, hinted};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::hash::{file_identity, hex};

/// Weights in one file.
const WHOLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Files of a LoRA adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
/// The folder of further chat templates.
const TEMPLATES: &str = "additional_chat_templates";

/// The folder that `name` means: unchanged if absolute, else below the first of `bases` that has it.
pub(crate) fn find(name: &str, bases: &[&Path]) -> Option<PathBuf> {
    let mut candidates = bases.iter().map(|b| b.join(name));
    if Path::new(name).is_absolute() {
        candidates.next().or(Some(name.into()))
    } else {
        candidates.find(|p| p.is_dir())
    }
    .filter(|p| p.is_dir() && !name.is_empty())
}

/// Whether `name` cannot be a hub name (`owner/name` or `name`) and so must be a folder.
pub(crate) fn must_be_local(name: &str, bases: &[&Path]) -> bool {
    let path = name.starts_with(['/', '.', '~']) || name.ends_with('/') || name.matches('/').count() > 1;
    path || name.is_empty() || is_file(name, bases)
}

fn is_file(name: &str, bases: &[&Path]) -> bool {
    bases.iter().any(|base| base.join(name).is_file())
}

/// Why `name`, which must be a folder, is none.
pub(crate) fn no_folder(name: &str, bases: &[&Path]) -> Hinted {
    if is_file(name, bases) {
        return hinted(
            format!("the model `{name}` is a file"),
            "name the folder that holds its `config.json`, weights and `tokenizer.json`",
        );
    }
    let hint = match name {
        address if ["huggingface.co/", "hf.co/"].iter().any(|hub| address.contains(hub)) => {
            "a model of the hub is written without an address: `owner/name`"
        }
        path if path.starts_with('~') => "write the path out: the shell alone replaces `~`",
        _ => "check the path; it may be relative to the recipe or to the working directory",
    };
    hinted(format!("there is no model folder `{name}`"), hint)
}

/// Whether a file of a model repository is one that `lm` reads.
///
/// `consolidated*.safetensors` are the same weights under other names; an adapter is no model.
pub(crate) fn is_model_file(name: &str) -> bool {
    const NAMES: [&str; 9] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        INDEX,
    ];
    let template =
        name.strip_prefix(TEMPLATES).is_some_and(|file| file.starts_with('/') && file.ends_with(".jinja"));
    let weights = name.ends_with(".safetensors")
        && !name.contains('/')
        && !["consolidated", "adapter"].iter().any(|other| name.starts_with(other));
    NAMES.contains(&name) || template || weights
}

/// The files of a model among `present`, all files of its repository.
///
/// Of two sets of weights `lm` reads the single file, as transformers does; the shards are left out then.
pub(crate) fn model_files(present: &[String]) -> Vec<String> {
    let whole = present.iter().any(|name| name == WHOLE);
    let other_set = |name: &str| whole && (name == INDEX || name.ends_with(".safetensors") && name != WHOLE);
    present.iter().filter(|name| is_model_file(name) && !other_set(name)).cloned().collect()
}

/// Whether the files of a repository are those of an adapter alone.
pub(crate) fn is_adapter(present: &[String]) -> bool {
    let has = |name: &str| present.iter().any(|file| file == name);
    ADAPTER.iter().any(|name| has(name)) && !has(WHOLE) && !has(INDEX)
}

pub(crate) fn adapter_error(name: &str) -> Hinted {
    hinted(
        format!("`{name}` is no model but a LoRA adapter: it has no `{WHOLE}`"),
        "merge it into its base model first: `PeftModel.merge_and_unload()` of the Python package peft, then \
         `save_pretrained` of model and tokenizer",
    )
}

/// # Errors
/// A file without which no model can be opened is absent; all absent ones are named. Or the folder holds an
/// adapter.
pub(crate) fn check_whole(folder: &Path, hint: &str) -> Result<()> {
    let has = |name: &str| folder.join(name).is_file();
    let mut missing: BTreeSet<String> = ["config.json", "tokenizer.json"].map(String::from).into();
    if has(WHOLE) || !has(INDEX) {
        missing.insert(WHOLE.into());
    } else {
        missing.extend(shards(&folder.join(INDEX))?);
    }
    if ADAPTER.iter().any(|name| has(name)) && missing.contains(WHOLE) && !has(WHOLE) {
        return Err(adapter_error(&folder.display().to_string()).into());
    }
    missing.retain(|f| !has(f));
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = missing.iter().map(|f| format!("`{f}`")).collect();
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|name| has(name));
    let slow = ["tokenizer.model", "vocab.json"].into_iter().find(|name| has(name));
    let other = other_weights(folder).filter(|_| missing.contains(WHOLE));
    let hint = match (pickled.or(other.as_deref()), slow) {
        (Some(name), _) if missing.contains(WHOLE) => {
            format!(
                "`{name}` is not read; load the model with transformers and `save_pretrained` it as safetensors"
            )
        }
        (_, Some(name)) if missing.contains("tokenizer.json") => format!(
            "`{name}` is not read; load the tokenizer with transformers and `save_pretrained` it, which writes `tokenizer.json`"
        ),
        _ => hint.to_owned(),
    };
    Err(hinted(format!("model folder `{}` lacks {}", folder.display(), list.join(", ")), hint).into())
}

/// Weights in `folder` of a kind that is not read: GGUF, `*.pth`, a distributed checkpoint, a subfolder of a
/// training run. Not what a training run keeps beside its weights.
fn other_weights(folder: &Path) -> Option<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    let beside = |name: &String| {
        ["optimizer", "scheduler", "rng_state", "training_args"].iter().any(|begin| name.starts_with(begin))
    };
    let other = |name: &String| {
        [".gguf", ".pth", ".pt", ".bin", ".distcp", ".h5", ".msgpack", ".npz"]
            .iter()
            .any(|end| name.ends_with(end))
            || name.starts_with("checkpoint-")
    };
    names.into_iter().find(|name| other(name) && !beside(name))
}

/// `local:` and a hash of config, tokenizer and weights; of large weights, samples.
///
/// Copies of a folder have the same revision, retrained weights another.
pub(crate) fn revision(folder: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for name in present(folder)? {
        hash.update(format!("{name} {}\n", file_identity(&folder.join(&name))?));
    }
    Ok(format!("local:{}", hex(&hash.finalize())))
}

/// Names of the model files in `folder`, sorted.
fn present(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for below in ["", TEMPLATES] {
        let folder = folder.join(below);
        if !pkv_core::look_for(&folder)?.is_some_and(|found| found.is_dir()) {
            continue;
        }
        let what = || format!("cannot list model folder `{}`", folder.display());
        for entry in fs::read_dir(&folder).with_context(what)? {
            let name = entry.with_context(what)?.file_name();
            let name =
                name.to_str().map(|n| if below.is_empty() { n.to_owned() } else { format!("{below}/{n}") });
            names.extend(name.filter(|n| is_model_file(n)));
        }
    }
    names.sort();
    Ok(names)
}

/// Shards that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let what = || format!("cannot read weight index `{}`", index.display());
    let json: Value =
        serde_json::from_slice(&pkv_core::read_small(index).with_context(what)?).with_context(what)?;
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
            assert!(must_be_local(name, &[]), "{name}");
        }
        for name in ["gpt2", "meta-llama/Llama-3.1-8B", "models/tiny"] {
            assert!(!must_be_local(name, &[]), "{name}");
        }
    }

    #[test]
    fn only_what_lm_reads_is_downloaded() {
        for name in [
            "config.json",
            "added_tokens.json",
            "additional_chat_templates/rag.jinja",
            "model-00001-of-00004.safetensors",
            WHOLE,
            INDEX,
        ] {
            assert!(is_model_file(name), "{name}");
        }
        for name in [
            "additional_chat_templates/README.md",
            "adapter_model.safetensors",
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "onnx/model.safetensors",
            "README.md",
        ] {
            assert!(!is_model_file(name), "{name}");
        }
    }

    #[test]
    fn of_two_sets_of_weights_the_single_file_is_downloaded() {
        let listed = |names: &[&str]| model_files(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        let shards = ["config.json", INDEX, "model-00001-of-00002.safetensors", "original/a.safetensors"];
        assert_eq!(listed(&shards), shards[..3]);
        assert_eq!(listed(&[&shards[..], &[WHOLE]].concat()), ["config.json", WHOLE]);
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        assert!(is_adapter(&names(&["config.json", "adapter_model.safetensors"])));
        assert!(!is_adapter(&names(&[WHOLE, "adapter_config.json"])));
    }

    #[test]
    fn a_folder_that_is_no_model_is_named_for_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| fs::write(dir.path().join(name), "{}").unwrap();
        let refused = || {
            let error = check_whole(dir.path(), "fetch it").unwrap_err();
            format!("{error:#}; {}", error.downcast_ref::<Hinted>().unwrap().hint())
        };
        put("consolidated.safetensors");
        let text = refused();
        assert!(
            text.contains("lacks `config.json`, `model.safetensors`, `tokenizer.json`; fetch it"),
            "{text}"
        );
        put("config.json");
        put("optimizer.pt");
        put("small.Q4_K_M.gguf");
        assert!(refused().contains("`small.Q4_K_M.gguf` is not read"), "{}", refused());
        put("pytorch_model.bin");
        assert!(refused().contains("`pytorch_model.bin` is not read"), "{}", refused());
        put("adapter_config.json");
        put("adapter_model.safetensors");
        assert!(refused().contains("a LoRA adapter") && refused().contains("merge it"), "{}", refused());
        put(WHOLE);
        put("vocab.json");
        assert!(refused().contains("lacks `tokenizer.json`; `vocab.json` is not read"), "{}", refused());
        put("tokenizer.json");
        check_whole(dir.path(), "").unwrap();
        fs::remove_file(dir.path().join(WHOLE)).unwrap();
        fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
        assert!(refused().contains("a LoRA adapter"), "{}", refused());
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
