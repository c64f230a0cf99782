//! `index.json`: the shards that a stage has written so far, and the settings they were made with.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{Fingerprint, hinted};
use serde::{Deserialize, Serialize};

/// Version of the index and of the shards' columns. Raise it when either changes meaning.
pub const SCHEMA_VERSION: u32 = 1;

/// The index's file name.
pub const INDEX_FILE: &str = "index.json";

/// A stage's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    pub schema_version: u32,
    /// The command that writes the folder: `prepare`, `label`, `extract`.
    pub stage: String,
    /// Every choice that the rows depend on.
    pub fingerprint: Fingerprint,
    /// Rows that the stage will have when it is complete, if that is known beforehand.
    pub rows_expected: Option<u64>,
    /// No more rows will come.
    pub complete: bool,
    /// In the order of the rows.
    pub shards: Vec<ShardEntry>,
    /// Rows of a shard that was at work when the process was asked to stop; a complete stage has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<ShardEntry>,
}

/// A whole shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Name inside the stage's folder.
    pub file: String,
    pub rows: u64,
    pub bytes: u64,
    pub sha256: String,
}

impl Index {
    pub(crate) fn new(stage: &str, fingerprint: &Fingerprint) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            stage: stage.to_owned(),
            fingerprint: fingerprint.clone(),
            rows_expected: None,
            complete: false,
            shards: Vec::new(),
            rest: None,
        }
    }

    /// Rows in whole shards.
    pub fn rows(&self) -> u64 {
        self.shards.iter().fold(0, |sum, s| sum.saturating_add(s.rows))
    }

    /// Bytes of whole shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, s| sum.saturating_add(s.bytes))
    }

    /// As it is written.
    pub(crate) fn text(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self).context("cannot write the shard index as JSON")?;
        text.push(b'\n');
        Ok(text)
    }

    /// The index of `dir`; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, is no index, or is one of another version.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(INDEX_FILE);
        pkv_files::refresh(&path)?;
        let unusable = || {
            hinted(
                format!("cannot use shard index `{}`", path.display()),
                format!("make the stage again with `--redo`, or remove `{}`", dir.display()),
            )
        };
        let text = match pkv_core::read_small_text(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            // What it holds is no text.
            Err(e) if e.kind() == ErrorKind::InvalidData => return Err(e).with_context(unusable),
            Err(e) => return Err(e).with_context(|| format!("cannot read `{}`", path.display())),
        };
        Self::parse(&text).with_context(unusable).map(Some)
    }

    fn parse(text: &str) -> Result<Self> {
        /// Only the version, so that a newer index is named as such whatever else changed.
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let Version { schema_version } = serde_json::from_str(text).context("it is no shard index")?;
        ensure!(
            schema_version == SCHEMA_VERSION,
            "expected schema version {SCHEMA_VERSION}, found {schema_version}"
        );
        serde_json::from_str(text).context("it is no shard index")
    }
}
