//! `[label]`: which KVzip score of the target becomes the label.

use anyhow::{Result, ensure};
use pkv_core::StoreDtype;
use serde::{Deserialize, Serialize};

/// KVzip scoring of the target (arXiv 2505.23416).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LabelSection {
    pub preset: LabelPreset,
    /// Tokens per scoring chunk; the preset's own (2000 or 2048) if absent.
    pub chunk_tokens: Option<usize>,
    /// Cache positions that every row may attend to beside its chunk; the preset's own if absent.
    pub sink: Option<Sink>,
    /// Tokens per forward while prefilling (KVzip: 16,000).
    pub prefill_chunk_tokens: usize,
    /// Dtype of the stored scores. f16 keeps 99.4% of the f32 kept set at 1% kept, measured on the tiny pair.
    pub store: StoreDtype,
}

/// A published definition of the score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelPreset {
    /// snu-mllab/KVzip: chunks of 2000, the whole prefix as sink, a space after the request.
    #[default]
    Original,
    /// NVIDIA/kvpress 0.5.5 `KVzipPress`: chunks of 2048, sink of 4.
    Kvpress,
    /// KVzip+: `kvpress` with each weight over the row's hidden norm, times the norm of the value through W_O.
    Plus,
}

/// How many of the first cache positions every row of the repeat may attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sink {
    /// All of the chat template's prefix.
    Prefix,
    /// min(n, prefix) positions.
    Tokens(usize),
}

impl Default for LabelSection {
    fn default() -> Self {
        Self {
            preset: LabelPreset::Original,
            chunk_tokens: None,
            sink: None,
            prefill_chunk_tokens: 16_000,
            store: StoreDtype::F16,
        }
    }
}

impl LabelSection {
    /// Tokens per scoring chunk.
    pub fn chunk(&self) -> usize {
        self.chunk_tokens.unwrap_or(match self.preset {
            LabelPreset::Original => 2000,
            LabelPreset::Kvpress | LabelPreset::Plus => 2048,
        })
    }

    /// Sink positions for a prefix of `prefix` tokens.
    pub fn sink_tokens(&self, prefix: usize) -> usize {
        let sink = self.sink.unwrap_or(match self.preset {
            LabelPreset::Original => Sink::Prefix,
            LabelPreset::Kvpress | LabelPreset::Plus => Sink::Tokens(4),
        });
        match sink {
            Sink::Prefix => prefix,
            Sink::Tokens(n) => n.min(prefix),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.chunk() > 0, "`label.chunk_tokens` is 0");
        ensure!(self.prefill_chunk_tokens > 0, "`label.prefill_chunk_tokens` is 0");
        Ok(())
    }
}
