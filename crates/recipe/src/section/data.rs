//! `[data]`: how documents become examples.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// From the manifest's documents to tokenized examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Manifest (TOML) that names the documents. Absent if `files` is given.
    #[serde(default)]
    pub manifest: String,
    /// Documents, instead of a manifest: paths or patterns such as `my/*.txt`, from the working directory.
    /// `.jsonl` and `.parquet` hold their text as `text`; any other file is text. 0 to 8 facts are planted in
    /// each example.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Examples of the training split.
    pub train: usize,
    /// Examples of the validation split.
    pub validation: usize,
    /// Examples of the test split.
    pub test: usize,
    /// Lengths of the sliding window, tokens; one is drawn per document (several lengths train the mapper for
    /// different context lengths). A document shorter than the window is one example of its own length.
    #[serde(default = "default_windows")]
    pub window_tokens: Vec<usize>,
    /// Distance of consecutive training windows of a document as a share of the window's length, in (0, 1].
    /// Windows of the other splits never overlap, so that recipes with another stride are measured on the
    /// same text.
    #[serde(default = "one")]
    pub stride: f64,
    /// Shorter examples are dropped, tokens; at least 2.
    #[serde(default = "default_min_tokens")]
    pub min_tokens: usize,
    /// Share of the documents for validation, by hash of the document's text.
    #[serde(default = "default_share")]
    pub validation_share: f64,
    /// Share of the documents for test.
    #[serde(default = "default_share")]
    pub test_share: f64,
    /// Length of the windows of the test split, tokens, instead of `window_tokens`.
    #[serde(default)]
    pub test_window_tokens: Option<usize>,
    /// What special tokens are that a document spells out, such as `<|im_end|>`.
    #[serde(default, skip_serializing_if = "SpecialTokens::is_default")]
    #[schemars(extend("default" = "parse"))]
    pub special_tokens: SpecialTokens,
    /// Examples per shard.
    #[serde(default = "default_shard_examples")]
    pub shard_examples: usize,
}

/// What special tokens are that a text spells out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SpecialTokens {
    /// The tokens, as kvpress and transformers read them: a document can end the user's turn.
    #[default]
    Parse,
    /// Text like any other.
    Text,
}

impl SpecialTokens {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl DataSection {
    /// Tokens of the longest context of the test split.
    pub fn longest_test_window(&self) -> usize {
        self.test_window_tokens.unwrap_or_else(|| self.window_tokens.iter().copied().max().unwrap_or(0))
    }

    /// Tokens of the longest context.
    pub fn longest_window(&self) -> usize {
        self.window_tokens.iter().chain(&self.test_window_tokens).copied().max().unwrap_or(0)
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(
            !self.files.is_empty() || !self.manifest.is_empty(),
            hinted(
                "neither `data.manifest` nor `data.files` is set: there are no documents",
                "name a manifest, or documents with `--data 'my/*.txt'`"
            )
        );
        ensure!(self.train > 0, "`data.train` is 0; a mapper needs examples to learn from");
        ensure!(!self.window_tokens.is_empty(), "`data.window_tokens` is empty");
        ensure!(
            self.min_tokens >= 2,
            "`data.min_tokens` is {}; a context of one token has nothing to prune",
            self.min_tokens
        );
        for (i, &w) in self.window_tokens.iter().enumerate() {
            ensure!(
                w >= self.min_tokens,
                "`data.window_tokens[{i}]` is {w}, shorter than `data.min_tokens` = {}",
                self.min_tokens
            );
        }
        if let Some(w) = self.test_window_tokens {
            ensure!(
                w >= self.min_tokens,
                "`data.test_window_tokens` is {w}, shorter than `data.min_tokens` = {}",
                self.min_tokens
            );
        }
        ensure!(
            self.stride > 0.0 && self.stride <= 1.0,
            "`data.stride` is {}; it is a share of the window, 0 < stride <= 1",
            self.stride
        );
        for (name, share) in [("validation_share", self.validation_share), ("test_share", self.test_share)] {
            ensure!(
                (0.0..1.0).contains(&share),
                "`data.{name}` is {share}; it is a share of the documents, in [0, 1)"
            );
        }
        let held_out = self.validation_share + self.test_share;
        ensure!(
            held_out < 1.0,
            "`data.validation_share` + `data.test_share` is {held_out}; no document is left for training"
        );
        ensure!(self.shard_examples > 0, "`data.shard_examples` is 0");
        Ok(())
    }
}

fn default_windows() -> Vec<usize> {
    vec![2048, 4096, 8192]
}
fn one() -> f64 {
    1.0
}
fn default_min_tokens() -> usize {
    256
}
fn default_share() -> f64 {
    0.1
}
fn default_shard_examples() -> usize {
    64
}
