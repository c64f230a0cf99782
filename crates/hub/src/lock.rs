//! Lock files: the commit and the files' hashes that a recipe or a manifest was fetched with.
//!
//! `fetch` writes them, everything later honours them: a newer commit of a branch changes nothing until the
//! lock is deleted and `fetch` runs again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_files::{WriteBudget, write_file};
use serde::Deserialize;

const VERSION: u32 = 1;

/// Content of a lock file: hub repositories by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    #[serde(default)]
    version: u32,
    #[serde(default)]
    pub models: BTreeMap<String, Pin>,
    #[serde(default)]
    pub datasets: BTreeMap<String, Pin>,
}

/// One repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Branch, tag or commit that the recipe or manifest asks for.
    pub asked: String,
    pub commit: String,
    /// Files by their path in the repository.
    pub files: BTreeMap<String, PinnedFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedFile {
    pub bytes: u64,
    pub sha256: String,
}

/// Path of the lock of a recipe or manifest: `x.toml` has `x.lock.toml` beside it.
///
/// ```
/// use std::path::Path;
///
/// assert_eq!(pkv_hub::lock_path(Path::new("recipes/x.toml")), Path::new("recipes/x.lock.toml"));
/// ```
pub fn lock_path(of: &Path) -> PathBuf {
    of.with_extension("lock.toml")
}

impl Lock {
    /// The lock beside the recipe or manifest `of`; an empty one if there is none.
    ///
    /// # Errors
    /// The file is there and no lock of this version.
    pub fn beside(of: &Path) -> Result<Self> {
        let path = lock_path(of);
        let text = match pkv_core::read_small_text(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            text => text.with_context(|| format!("cannot read lock file `{}`", path.display()))?,
        };
        let invalid = || {
            hinted(
                format!("invalid lock file `{}`", path.display()),
                "delete it and run `proxykv-train fetch` again, which writes a new one",
            )
        };
        let lock: Self = toml::from_str(&text).with_context(invalid)?;
        if lock.version != VERSION {
            return Err(anyhow::anyhow!("it has version {}, expected {VERSION}", lock.version))
                .with_context(invalid);
        }
        Ok(lock)
    }

    /// Write the lock beside `of`, whole or not at all. A file that says the same stays, so
    /// that a folder which may only be read is no obstacle.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write_beside(&self, of: &Path) -> Result<()> {
        let path = lock_path(of);
        if pkv_core::read_small_text(&path).is_ok_and(|text| text == self.to_toml()) {
            return Ok(());
        }
        write_file(&path, self.to_toml().as_bytes(), &WriteBudget::from_env())
            .map(drop)
            .with_context(|| format!("cannot write lock file `{}`", path.display()))
    }

    /// Both locks' pins.
    ///
    /// # Errors
    /// They pin one repository to different commits.
    pub fn merge(mut self, other: Self) -> Result<Self> {
        for (mine, theirs) in [(&mut self.models, other.models), (&mut self.datasets, other.datasets)] {
            for (name, pin) in theirs {
                if let Some(old) = mine.get(&name) {
                    ensure!(
                        old.commit == pin.commit,
                        hinted(
                            format!("`{name}` is locked at {} and at {}", old.commit, pin.commit),
                            "delete one of the two lock files and run `proxykv-train fetch`"
                        )
                    );
                }
                mine.insert(name, pin);
            }
        }
        Ok(self)
    }

    fn to_toml(&self) -> String {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let mut out = String::from(
            "# Commits and hashes that `proxykv-train fetch` found. Delete this file to follow the branches again.\n",
        );
        let _ = writeln!(out, "version = {VERSION}");
        for (section, pins) in [("models", &self.models), ("datasets", &self.datasets)] {
            for (name, pin) in pins {
                let _ = writeln!(out, "\n[{section}.{}]", quoted(name));
                let _ = writeln!(out, "asked = {}\ncommit = {}", quoted(&pin.asked), quoted(&pin.commit));
                let _ = writeln!(out, "\n[{section}.{}.files]", quoted(name));
                for (file, f) in &pin.files {
                    let (file, sha256) = (quoted(file), quoted(&f.sha256));
                    let _ = writeln!(out, "{file} = {{ bytes = {}, sha256 = {sha256} }}", f.bytes);
                }
            }
        }
        out
    }
}

impl Pin {
    /// Whether this pin answers a request for `revision` of `name`.
    ///
    /// # Errors
    /// The recipe was edited to ask for another revision since the lock was written.
    pub(crate) fn check_asked(&self, name: &str, revision: &str) -> Result<()> {
        if self.asked != revision && self.commit != revision {
            bail!(hinted(
                format!(
                    "`{name}` is asked for at revision `{revision}`, but the lock file pins `{}` ({})",
                    self.asked, self.commit
                ),
                "run `proxykv-train fetch` to lock the new revision, or ask for the old one"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn lock(commit: &str) -> Lock {
        let file = PinnedFile { bytes: 12, sha256: "ab".repeat(32) };
        let pin = Pin {
            asked: "main".into(),
            commit: commit.into(),
            files: [("config.json".to_owned(), file.clone()), ("data/a b \"c\".parquet".to_owned(), file)]
                .into(),
        };
        Lock { version: VERSION, models: [("o/n.1".to_owned(), pin)].into(), datasets: BTreeMap::new() }
    }

    #[test]
    fn a_lock_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("llama-3.1-8b.toml");
        assert_eq!(Lock::beside(&recipe).unwrap(), Lock::default());
        lock("c0").write_beside(&recipe).unwrap();
        assert!(dir.path().join("llama-3.1-8b.lock.toml").exists());
        assert_eq!(Lock::beside(&recipe).unwrap(), lock("c0"));
    }

    #[test]
    fn a_lock_that_says_the_same_is_not_written() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("a.toml");
        let written = |commit| {
            lock(commit).write_beside(&recipe).unwrap();
            fs::metadata(lock_path(&recipe)).unwrap().ino()
        };
        // A written file is a new one that is renamed.
        let first = written("c0");
        assert_eq!(written("c0"), first);
        assert_ne!(written("c1"), first);
        assert_eq!(Lock::beside(&recipe).unwrap(), lock("c1"));
    }

    #[test]
    fn a_broken_lock_says_how_to_repair_it() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("a.toml");
        for text in ["version = 2\n", "models = 3\n"] {
            fs::write(lock_path(&recipe), text).unwrap();
            let error = Lock::beside(&recipe).unwrap_err();
            assert!(error.to_string().contains("a.lock.toml"), "{error:#}");
            assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("fetch"));
        }
    }

    #[test]
    fn two_locks_must_agree() {
        assert_eq!(lock("c0").merge(lock("c0")).unwrap(), lock("c0"));
        let error = lock("c0").merge(lock("c1")).unwrap_err();
        assert_eq!(error.to_string(), "`o/n.1` is locked at c0 and at c1");
    }
}
