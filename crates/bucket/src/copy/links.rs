//! Folders that are others by name: what a sweep shares between runs.
//!
//! In a bucket, a folder that holds the object [`NAME`] is the folder that this names, beside its parent:
//! `runs/a/labels/shared.link` with `{"link":"../shared/labels-0123456789abcdef"}` makes `runs/a/labels` be
//! `runs/shared/labels-0123456789abcdef`. In the working copy that is a symbolic link with the same text, so
//! that paths below it are found by the file system; the keys of their objects are those of the other folder.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_files::write_error;
use serde::{Deserialize, Serialize};

use super::{WorkingCopy, files_below, is_put, lock, make_folder};
use crate::store::{If, Read};

/// Name of the object that makes its folder a link.
pub(super) const NAME: &str = "shared.link";

/// Longest chain of links: a shared output is no link itself, and one that goes in a circle ends.
const MOST: usize = 4;

#[derive(Debug, Serialize, Deserialize)]
struct Link {
    link: String,
}

impl WorkingCopy {
    /// The key of the object that makes the folder `at` a link.
    pub(super) fn link_key(&self, at: &Path) -> Result<String> {
        let name = at.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("`{}` cannot be in a bucket", at.display()))?;
        let folder = self.key(pkv_files::parent(at))?;
        let folder = if folder.is_empty() { folder } else { folder + "/" };
        Ok(format!("{folder}{name}/{NAME}"))
    }

    /// Before a folder is brought to which `depth` links led: a link here is what it is there.
    pub(super) fn check_link(&self, folder: &Path, depth: usize) -> Result<()> {
        ensure!(
            depth < MOST,
            hinted(
                format!("`{}` is at the end of too many links", folder.display()),
                format!("remove the objects `{NAME}` that lead there, and run the sweep again")
            )
        );
        if folder.is_symlink() {
            self.follow(folder)?;
        }
        Ok(())
    }

    /// The links at and below a folder, whose objects have `keys`; each is here what it is there.
    pub(super) fn links_in<'a>(
        &self,
        folder: &Path,
        keys: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<PathBuf>> {
        let named = keys.filter_map(|key| key.strip_suffix(NAME)?.strip_suffix('/'));
        let mut links: Vec<PathBuf> = named.map(|key| self.path(key)).collect();
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let gone: Vec<PathBuf> = entries.filter(|path| path.is_symlink() && !links.contains(path)).collect();
        gone.iter().try_for_each(|at| self.follow(at).map(drop))?;
        let mut failed = None;
        links.retain(|at| {
            self.follow(at).unwrap_or_else(|e| {
                failed.get_or_insert(e);
                false
            })
        });
        failed.map_or(Ok(links), Err)
    }

    /// Let `at` be what its link in the bucket says; whether there is one.
    fn follow(&self, at: &Path) -> Result<bool> {
        let key = self.link_key(at)?;
        let Read::New(_, content) = self.store.read(&key, None)? else {
            // Another machine has removed it.
            if at.is_symlink() {
                fs::remove_file(at).map_err(|e| write_error(at, e))?;
            }
            return Ok(false);
        };
        let target = target(&content, &self.store.shown(&key))?;
        if fs::read_link(at).ok().as_ref() == Some(&target) {
            return Ok(true);
        }
        // Locks and empty folders of this machine are nothing to lose; anything else may be.
        if at.is_dir() && !at.is_symlink() {
            let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
            let is_more = |path: &PathBuf| !name(path).is_some_and(|name| name.ends_with(".lock"));
            if let Some(more) = files_below(at).into_iter().find(is_more) {
                bail!(hinted(
                    format!("`{}` is shared in the bucket, and `{}` is here", at.display(), more.display()),
                    "remove that folder of the cache: what is whole is in the bucket"
                ));
            }
            fs::remove_dir_all(at).map_err(|e| write_error(at, e))?;
        }
        make_folder(pkv_files::parent(at))?;
        match pkv_files::link_here(&target, at) {
            // Another process of this machine was first.
            Err(_) if fs::read_link(at).ok().as_ref() == Some(&target) => Ok(true),
            made => made.map(|()| true).map_err(|e| write_error(at, e)),
        }
    }

    /// Put a link, and have it here.
    pub(super) fn make_link(&self, at: &Path, target: &Path) -> Result<()> {
        self.check_lease()?;
        self.store.write(&self.link_key(at)?, text(target)?.as_bytes(), &If::Always)?;
        self.follow(at).map(drop)
    }

    /// Move a folder's objects, which are copied in the bucket.
    pub(super) fn move_folder(&self, from: &Path, to: &Path) -> Result<()> {
        self.check_lease()?;
        let (old, new) = (self.key(from)?, self.key(to)?);
        let mut keys: Vec<String> = self.store.list(&old)?.into_iter().map(|meta| meta.key).collect();
        keys.retain(|key| is_put(key));
        // The index last there, and first here: what it names is beside it wherever it is.
        keys.sort_by_key(|key| (key.ends_with("/index.json"), key.clone()));
        for key in &keys {
            self.store.copy(key, &format!("{new}{}", &key[old.len()..]))?;
        }
        for key in keys.iter().rev() {
            self.store.remove(key)?;
            self.forget(key);
            lock(&self.sizes).0.remove(key);
        }
        lock(&self.sizes).1.remove(&new);
        fs::remove_dir_all(from).map_err(|e| write_error(from, e))?;
        self.pull_at(to, 0)
    }
}

/// What the object of a link holds.
fn text(target: &Path) -> Result<String> {
    let link = target.to_str().filter(|text| is_sound(Path::new(text)));
    let link = link.with_context(|| format!("`{}` is no target of a link", target.display()))?.to_owned();
    Ok(serde_json::to_string(&Link { link })?)
}

/// The target that the object of a link names.
fn target(content: &[u8], shown: &str) -> Result<PathBuf> {
    let context = || {
        hinted(
            format!("`{shown}` is no link to a shared folder"),
            "remove it, and run the sweep again: it makes the link anew",
        )
    };
    let Link { link } = serde_json::from_slice(content).with_context(context)?;
    let target = PathBuf::from(link);
    ensure!(is_sound(&target), context());
    Ok(target)
}

/// A target is `../FOLDER/NAME`: it never leads out of the bucket.
fn is_sound(target: &Path) -> bool {
    let parts: Vec<Component> = target.components().collect();
    matches!(parts[..], [Component::ParentDir, Component::Normal(_), Component::Normal(_)])
}

/// The path that `relative` has below `root` without links.
pub(super) fn resolve(root: &Path, relative: &Path) -> PathBuf {
    let mut found = relative.to_owned();
    for _ in 0..MOST {
        let Some(next) = step(root, &found) else { break };
        found = next;
    }
    found
}

/// With the first link replaced, if there is one.
fn step(root: &Path, relative: &Path) -> Option<PathBuf> {
    let mut above = PathBuf::new();
    let mut parts = relative.components();
    while let Some(part) = parts.next() {
        let folder = above.clone();
        above.push(part);
        if let Ok(target) = fs::read_link(root.join(&above))
            && is_sound(&target)
        {
            let beside = target.strip_prefix("..").ok()?;
            // Without a parent there is nothing beside it.
            return Some(folder.parent()?.join(beside).join(parts.as_path()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn paths_below_a_link_are_those_of_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("runs/a")).unwrap();
        symlink("../shared/labels-1", root.join("runs/a/labels")).unwrap();
        symlink("../shared/loop", root.join("runs/a/loop")).unwrap();
        std::fs::create_dir_all(root.join("runs/shared")).unwrap();
        symlink("../shared/loop", root.join("runs/shared/loop")).unwrap();
        symlink("/etc", root.join("runs/a/out")).unwrap();
        for (path, found) in [
            ("runs/a/labels/pieces/0.json", "runs/shared/labels-1/pieces/0.json"),
            ("runs/a/labels", "runs/shared/labels-1"),
            ("runs/a/features/x", "runs/a/features/x"),
            ("runs/a/out/passwd", "runs/a/out/passwd"),
            ("runs/a/loop/x", "runs/shared/loop/x"),
        ] {
            assert_eq!(resolve(root, Path::new(path)), Path::new(found), "{path}");
        }
    }

    #[test]
    fn a_link_leads_to_a_folder_beside_and_nowhere_else() {
        let text = text(Path::new("../shared/labels-1")).unwrap();
        assert_eq!(target(text.as_bytes(), "k").unwrap(), Path::new("../shared/labels-1"));
        for bad in ["../../x/y", "/etc/x", "../shared", "../shared/../x", "shared/x", "../shared/x/y", ""] {
            let text = format!("{{\"link\":{bad:?}}}");
            assert!(
                target(text.as_bytes(), "s3://b/k").unwrap_err().to_string().contains("s3://b/k"),
                "{bad}"
            );
            assert!(super::text(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(target(b"{", "k").is_err() && target(b"{\"link\":3}", "k").is_err());
    }
}
