//! Where test data lies, and folders as values.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use safetensors::{Dtype, SafeTensors};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository has a root")
}

/// The folder of a model of the nano pair: `target` or `proxy`.
pub fn nano(which: &str) -> PathBuf {
    root().join("recipes/nano-llama").join(which)
}

/// Goldens of language models, with the random-weight checkpoints that some of them are of.
pub fn lm_goldens() -> PathBuf {
    root().join("crates/lm/tests/goldens")
}

/// The random-weight checkpoints among the goldens, by name; each covers branches of `config.json`.
///
/// # Panics
/// There are fewer than those of the first four families.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
        let entries = fs::read_dir(lm_goldens()).expect("goldens can be listed").flatten();
        let folders = entries.filter(|entry| entry.path().is_dir());
        let names = folders.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("arch-")).collect();
        names.sort();
        assert!(names.len() >= 5, "found {names:?}");
        names
    });
    NAMES.iter().map(String::as_str)
}

/// Token ids of a language model's golden file, by name: `None` if it has none of that name.
///
/// # Panics
/// The file is absent, or the tensor holds no 64-bit integers.
pub fn golden_ids(model: &str, name: &str) -> Option<Vec<u32>> {
    let path = lm_goldens().join(format!("{model}.safetensors"));
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("cannot read `{}`: {e}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).expect("goldens are whole");
    let ids = tensors.tensor(name).ok()?;
    assert_eq!(ids.dtype(), Dtype::I64, "`{name}` of `{}`", path.display());
    Some(ids.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32).collect())
}

/// Every file of a folder, by name.
///
/// # Panics
/// The folder holds anything but readable files.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let name = |path: &Path| path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("cannot list `{}`: {e}", folder.display()));
    let paths = entries.map(|entry| entry.expect("the folder can be listed").path());
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("cannot read `{}`: {e}", path.display()));
        (name(&path), bytes)
    };
    paths.map(read).collect()
}

/// Every file at any depth below `folder`, by its path from there.
///
/// # Panics
/// A file or folder cannot be read.
pub fn files_below(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("the folder is there").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            all.extend(
                files_below(&path).into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes)),
            );
        } else {
            all.insert(name, fs::read(path).expect("files can be read"));
        }
    }
    all
}

/// Copy all of `from`, its folders included.
///
/// # Panics
/// A file cannot be copied.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folders can be made");
    for entry in fs::read_dir(from).expect("the folder is there").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &to);
        } else {
            fs::copy(path, to).expect("files can be copied");
        }
    }
}
