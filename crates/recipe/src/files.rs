//! Recipe files in folders.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders below `recipes/` are looked through this deep.
pub const DEEPEST: usize = 3;

/// Add the TOML files of `folder`, and of folders in it down to `deeper` levels, in the order of their names.
pub fn toml_files(folder: &Path, deeper: usize, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        if path.extension().is_some_and(|e| e == "toml") {
            found.push(path);
        } else if deeper > 0 && path.is_dir() {
            toml_files(&path, deeper - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_below_the_folder_are_found() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("more/deep")).unwrap();
        for name in ["a.toml", "more/b.toml", "more/deep/c.toml", "d.md"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let mut found = Vec::new();
        toml_files(folder.path(), 2, &mut found);
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
