//! `[label]`: the KVzip score of the target that is used as label.

mod preset;

use anyhow::{Result, ensure};
use pkv_core::{Fingerprint, StoreDtype};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use preset::{LabelPreset, Preset};

/// KVzip scoring of the target (arXiv 2505.23416).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LabelSection {
    /// Published definition of the score.
    pub preset: LabelPreset,
    /// How a context's scores are computed; the preset's own way if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scorer: Option<String>,
    /// Tokens per scoring chunk; the preset's own (2000 or 2048) if absent.
    pub chunk_tokens: Option<usize>,
    /// Cache positions that every row may attend to beside its chunk; the preset's own if absent.
    pub sink: Option<Sink>,
    /// Tokens per forward while prefilling (KVzip: 16,000). Memory and speed only.
    pub prefill_chunk_tokens: usize,
    /// Tokens per forward while repeating: as many whole scoring chunks as fit, at least one. 16,384 on a
    /// GPU, one chunk on a CPU, where matrix products gain nothing. Memory and speed only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pack_tokens: Option<usize>,
    /// Dtype of the stored scores. f16 keeps 99.4% of the f32 kept set at 1% kept, measured on the tiny pair.
    pub store: StoreDtype,
}

/// How many of the first cache positions every row of the repeat may attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
            preset: LabelPreset::default(),
            scorer: None,
            chunk_tokens: None,
            sink: None,
            prefill_chunk_tokens: 32_768,
            pack_tokens: None,
            store: StoreDtype::F16,
        }
    }
}

impl LabelSection {
    /// The way that scores are computed, by name. `score` knows which there are.
    pub fn scorer(&self) -> &str {
        self.scorer.as_deref().unwrap_or(self.preset.preset().scorer)
    }

    /// The definition in a phrase.
    pub fn definition(&self) -> String {
        let (preset, chunk) = (self.preset.name(), self.chunk());
        match &self.scorer {
            None => format!("KVzip preset {preset}, scoring chunks of {chunk} tokens"),
            Some(scorer) => format!("scorer {scorer}, preset {preset}, scoring chunks of {chunk} tokens"),
        }
    }

    /// Tokens per scoring chunk.
    pub fn chunk(&self) -> usize {
        self.chunk_tokens.unwrap_or(self.preset.preset().chunk_tokens)
    }

    /// Tokens per forward while repeating, on a GPU or not; a scoring chunk is never cut.
    pub fn pack(&self, on_gpu: bool) -> usize {
        self.pack_tokens.unwrap_or(if on_gpu { 16_384 } else { 1 })
    }

    /// The choices that change a label, for fingerprints: what is about memory and speed is set back.
    pub fn material(&self) -> Self {
        let default = Self::default();
        Self {
            prefill_chunk_tokens: default.prefill_chunk_tokens,
            pack_tokens: default.pack_tokens,
            ..self.clone()
        }
    }

    /// The highest score of labels whose fingerprint is `choices`, with room for the rounding of f16: softmax
    /// weights end at
    /// 1. Infinite where they are multiplied with something, or where the choices are not known.
    pub fn most_score(choices: &Fingerprint) -> f32 {
        const ROUNDED_ONE: f32 = 1.001;
        let section = choices.get("label").and_then(|label| Self::deserialize(label).ok());
        match section {
            Some(label) if label.scorer() == "plain" => ROUNDED_ONE,
            _ => f32::INFINITY,
        }
    }

    /// Sink positions for a prefix of `prefix` tokens.
    pub fn sink_tokens(&self, prefix: usize) -> usize {
        let sink = self.sink.unwrap_or(self.preset.preset().sink);
        match sink {
            Sink::Prefix => prefix,
            Sink::Tokens(n) => n.min(prefix),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.chunk() > 0, "`label.chunk_tokens` is 0");
        ensure!(self.prefill_chunk_tokens > 0, "`label.prefill_chunk_tokens` is 0");
        ensure!(self.pack_tokens != Some(0), "`label.pack_tokens` is 0");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_speed_are_no_part_of_a_label() {
        let default = LabelSection::default();
        let fast =
            LabelSection { prefill_chunk_tokens: 4096, pack_tokens: Some(30_000), ..LabelSection::default() };
        assert_eq!(fast.material(), default);
        let other = LabelSection { chunk_tokens: Some(7), ..fast.clone() };
        assert_ne!(other.material(), default);
        assert_eq!((fast.pack(false), default.pack(true), default.pack(false)), (30_000, 16_384, 1));
        let text = serde_json::to_string(&default).unwrap();
        assert!(!text.contains("pack_tokens"), "fingerprints of older runs stay: {text}");
        assert!(LabelSection { pack_tokens: Some(0), ..default }.check().is_err());
    }
}
