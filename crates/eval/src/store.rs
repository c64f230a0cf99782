//! What is done of an evaluation: one file per context, so that an interrupted one continues.
//!
//! A file is used only if it carries the fingerprint of the evaluation that asks; anything else
//! in its place is computed again.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use pkv_shard::durable::{WriteBudget, write_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The folder `contexts/` of an evaluation.
pub struct ContextStore {
    dir: PathBuf,
    fingerprint: String,
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
        fs::create_dir_all(&dir).with_context(|| format!("cannot make folder `{}`", dir.display()))?;
        Ok(Self { dir, fingerprint })
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

    /// Remove the folder: its numbers are in the results now.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn clear(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove `{}`", self.dir.display()))
    }

    fn path(&self, task: &str, index: usize) -> PathBuf {
        self.dir.join(format!("{task}-{index:05}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
