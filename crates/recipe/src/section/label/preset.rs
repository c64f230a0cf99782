//! The published definitions of the label, as data: one entry each.
//!
//! `docs/contributing.md` has the steps to add a preset or a scorer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Sink;

/// What a preset means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// Tokens per scoring chunk.
    pub chunk_tokens: usize,
    /// Cache positions that every row may attend to beside its chunk.
    pub sink: Sink,
    /// The request for a later chunk ends in a space, before the tokens that it quotes.
    pub space_before_quote: bool,
    /// By name, as `score` registers it.
    pub scorer: &'static str,
}

macro_rules! presets {
    ($default:ident; $($variant:ident: $name:literal, $meaning:literal, $preset:expr;)+) => {
        pkv_core::named! {
            /// A published definition of the score.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
            pub enum LabelPreset {
                $(#[doc = $meaning] #[serde(rename = $name)] $variant = $name, $meaning;)+
            }
        }

        impl LabelPreset {
            /// What it means.
            pub const fn preset(self) -> Preset {
                match self { $(Self::$variant => $preset,)+ }
            }
        }

        impl Default for LabelPreset {
            fn default() -> Self {
                Self::$default
            }
        }
    };
}

presets! {
    Original;
    Original: "original", "snu-mllab/KVzip: chunks of 2000, the whole prefix as sink, a space after the request",
        Preset { chunk_tokens: 2000, sink: Sink::Prefix, space_before_quote: true, scorer: "plain" };
    Kvpress: "kvpress", "NVIDIA/kvpress 0.5.5 `KVzipPress`: chunks of 2048, sink of 4",
        Preset { chunk_tokens: 2048, sink: Sink::Tokens(4), space_before_quote: false, scorer: "plain" };
    Plus: "plus", "KVzip+: `kvpress` with each weight over the row's hidden norm, times the norm of the value through W_O",
        Preset { chunk_tokens: 2048, sink: Sink::Tokens(4), space_before_quote: false, scorer: "kvzip-plus" };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_preset_has_a_name_of_its_own_and_files_have_it() {
        let names: BTreeSet<&str> = LabelPreset::ALL.iter().map(|p| p.name()).collect();
        let meanings: BTreeSet<&str> = LabelPreset::ALL.iter().map(|p| p.meaning()).collect();
        assert_eq!([names.len(), meanings.len()], [LabelPreset::ALL.len(); 2]);
        for p in LabelPreset::ALL {
            let text = serde_json::to_string(&p).unwrap();
            assert_eq!(text, format!("\"{}\"", p.name()));
            assert_eq!(serde_json::from_str::<LabelPreset>(&text).unwrap(), p);
            assert!(p.preset().chunk_tokens > 0);
        }
        // Recipes and fingerprints of older versions.
        assert!(["original", "kvpress", "plus"].iter().all(|name| names.contains(name)));
        assert_eq!(LabelPreset::default(), LabelPreset::Original);
    }
}
