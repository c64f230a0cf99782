//! What is done of an evaluation: one file per context, so that an interrupted one continues.
//!
//! A file is used only if it carries the fingerprint of the evaluation that asks; anything else
//! in its place is computed again. Several processes may work on one folder: whoever holds a context's
//! [`Claim`] computes it. A claim is a locked file, which the system unlocks when its process ends, however
//! it ends, so that no claim is ever stale.

use std::fs::{self, File, TryLockError};
use std::path::PathBuf;

use anyhow::{Context, Result};
use pkv_shard::durable::{WriteBudget, write_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The folder `contexts/` of an evaluation.
pub struct ContextStore {
    dir: PathBuf,
    fingerprint: String,
    /// Locked by all processes that read the folder together; whoever can lock it alone is the last.
    users: File,
}

/// The right to compute one context, given back when dropped.
pub struct Claim {
    _locked: Option<File>,
}

#[derive(Serialize, Deserialize)]
struct Stored<T> {
    fingerprint: String,
    outcome: T,
}

impl ContextStore {
    /// # Errors
    /// The folder cannot be made.
    pub fn open(dir: PathBuf, fingerprint: String) -> Result<Self> {
        let opened = || format!("cannot make folder `{}`", dir.display());
        fs::create_dir_all(&dir).with_context(opened)?;
        let users = lock_file(&dir.join("users.lock")).with_context(opened)?;
        // Without locks (some network folders have none) every process counts as the only one.
        let _ = users.lock_shared();
        Ok(Self { dir, fingerprint, users })
    }

    /// Claim context `index` of `task`; `None` while another process has it.
    ///
    /// Where the file system has no locks the claim is given: two processes may then do the same work, with the
    /// same outcome.
    ///
    /// # Errors
    /// The claim's file cannot be made.
    pub fn claim(&self, task: &str, index: usize) -> Result<Option<Claim>> {
        let path = self.path(task, index).with_extension("lock");
        let file = lock_file(&path).with_context(|| format!("cannot make `{}`", path.display()))?;
        Ok(match file.try_lock() {
            Ok(()) => Some(Claim { _locked: Some(file) }),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(_)) => Some(Claim { _locked: None }),
        })
    }

    /// The outcome of context `index` of `task`, if it was stored by this evaluation.
    pub fn get<T: DeserializeOwned>(&self, task: &str, index: usize) -> Option<T> {
        let text = fs::read_to_string(self.path(task, index)).ok()?;
        let stored: Stored<T> = serde_json::from_str(&text).ok()?;
        (stored.fingerprint == self.fingerprint).then_some(stored.outcome)
    }

    /// Store an outcome; reading it gives the same numbers to the last bit.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put<T: Serialize>(&self, task: &str, index: usize, outcome: T) -> Result<T> {
        let stored = Stored { fingerprint: self.fingerprint.clone(), outcome };
        let text = serde_json::to_string(&stored).context("an outcome has a number that JSON cannot hold")?;
        write_file(&self.path(task, index), text.as_bytes(), &WriteBudget::from_env())?;
        Ok(stored.outcome)
    }

    /// Remove the folder, unless other processes still read it: its numbers are in the results now.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn clear(self) -> Result<()> {
        let _ = self.users.unlock();
        if matches!(self.users.try_lock(), Err(TryLockError::WouldBlock)) || !self.dir.exists() {
            return Ok(());
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove `{}`", self.dir.display()))
    }

    fn path(&self, task: &str, index: usize) -> PathBuf {
        self.dir.join(format!("{task}-{index:05}.json"))
    }
}

/// A file to be locked, made if absent.
pub(crate) fn lock_file(path: &std::path::Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_claimed_once_and_the_last_one_clears() {
        let dir = tempfile::tempdir().unwrap();
        let open = || ContextStore::open(dir.path().join("c"), "f".to_owned()).unwrap();
        let (one, other) = (open(), open());
        let claim = one.claim("facts", 0).unwrap();
        assert!(claim.is_some());
        assert!(other.claim("facts", 0).unwrap().is_none());
        assert!(other.claim("facts", 1).unwrap().is_some());
        drop(claim);
        assert!(other.claim("facts", 0).unwrap().is_some());
        one.clear().unwrap();
        assert!(dir.path().join("c").exists(), "another process reads it");
        other.clear().unwrap();
        assert!(!dir.path().join("c").exists());
    }

    #[test]
    fn outcomes_are_found_again_by_the_same_evaluation_only() {
        let dir = tempfile::tempdir().unwrap();
        let open =
            |fingerprint: &str| ContextStore::open(dir.path().join("c"), fingerprint.to_owned()).unwrap();
        let store = open("a");
        assert_eq!(store.get::<Vec<f64>>("facts", 3), None);
        let value = vec![0.1f64 + 0.2, 1e-300, 3.0];
        store.put("facts", 3, value.clone()).unwrap();
        assert_eq!(open("a").get("facts", 3), Some(value));
        assert_eq!(open("a").get::<Vec<f64>>("perplexity", 3), None);
        assert_eq!(open("b").get::<Vec<f64>>("facts", 3), None, "another evaluation's");
        fs::write(dir.path().join("c/facts-00003.json"), "{\"finger").unwrap();
        assert_eq!(store.get::<Vec<f64>>("facts", 3), None, "damaged");
        store.clear().unwrap();
        assert!(!dir.path().join("c").exists());
    }
}
