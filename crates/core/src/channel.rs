//! The table of feature channels: name, meaning, models that can give it, and inputs.
//!
//! Recipes, `plan`, completion and the stages ask this table; `extract/src/channels` holds one file for each
//! way to compute.
//!
//! `docs/contributing.md` has the steps to add a channel.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Source;

/// Input of a channel. Channels of one pass share its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// Attention of the whole causal range, at every `whole_range_stride`-th query.
    WholeRange,
    /// Attention of the next `window_tokens` queries.
    Window,
    /// Attention of the last `last_queries` queries.
    Last,
    /// Each key or value on its own.
    Vectors,
    /// The keys of the whole context.
    AllKeys,
    /// Queries and keys of one scoring chunk.
    ScoringChunk,
    /// The attention of a repeat of the context.
    Replay,
    /// The layer's hidden states, through a map that was fitted to training labels.
    HiddenStates,
}

/// When a pass is done with a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Final {
    /// With its token.
    AtOnce,
    /// `window_tokens` later.
    AfterWindow,
    /// At the context's end.
    AtEnd,
}

/// Lengths that the cost of a pass depends on, tokens.
#[derive(Clone, Copy, Debug)]
pub struct PassLengths {
    pub context: usize,
    /// Keys that a block of queries sees of the window's band.
    pub window: usize,
    pub last_queries: usize,
    pub whole_range_stride: usize,
    pub scoring_chunk: usize,
}

impl Pass {
    /// Every pass, in the order in which costs are added.
    pub const ALL: [Self; 8] = [
        Self::WholeRange,
        Self::Window,
        Self::Last,
        Self::Vectors,
        Self::AllKeys,
        Self::ScoringChunk,
        Self::Replay,
        Self::HiddenStates,
    ];

    pub const fn is_final(self) -> Final {
        match self {
            Self::Vectors | Self::HiddenStates => Final::AtOnce,
            Self::Window => Final::AfterWindow,
            Self::WholeRange | Self::Last | Self::AllKeys | Self::ScoringChunk | Self::Replay => Final::AtEnd,
        }
    }

    /// Keys that are multiplied with every query head of a position, beside those of the prefill itself. What
    /// a repeat costs depends on the model, and is counted apart.
    pub fn keys_per_position(self, lengths: &PassLengths) -> f64 {
        let context = lengths.context;
        match self {
            Self::WholeRange => context as f64 / 2.0 / lengths.whole_range_stride as f64,
            Self::Window => lengths.window.min(context) as f64,
            Self::Last => lengths.last_queries.min(context) as f64,
            Self::ScoringChunk => lengths.scoring_chunk.min(context) as f64,
            // A key's length, and its product with the mean key.
            Self::AllKeys => 2.0,
            Self::Vectors | Self::Replay | Self::HiddenStates => 0.0,
        }
    }

    /// Does it depend on what a repeat would feed, which `label` of a recipe says?
    pub const fn reads_label_section(self) -> bool {
        matches!(self, Self::ScoringChunk | Self::Replay)
    }
}

macro_rules! channels {
    ($($variant:ident: $name:literal, $pass:ident, $sources:expr, $meaning:literal;)+) => {
        crate::named! {
            /// A feature of one (layer, KV head, position) of a source.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
            pub enum Channel {
                $(#[doc = $meaning] #[serde(rename = $name)] $variant = $name, $meaning;)+
            }
        }

        impl Channel {
            pub const fn pass(self) -> Pass {
                match self { $(Self::$variant => Pass::$pass,)+ }
            }

            /// The models that give it.
            pub const fn sources(self) -> &'static [Source] {
                match self { $(Self::$variant => $sources,)+ }
            }
        }
    };
}

const BOTH: &[Source] = &[Source::Target, Source::Proxy];
const PROXY: &[Source] = &[Source::Proxy];
const TARGET: &[Source] = &[Source::Target];

channels! {
    MaxAll: "max_all", WholeRange, BOTH,
        "log of the strongest attention from queries at least `min_distance` later, of which every `whole_range_stride`-th counts";
    MeanAll: "mean_all", WholeRange, BOTH, "log of the mean attention from the queries of `max_all`";
    MaxWindow: "max_window", Window, BOTH, "log of the strongest attention from the next `window_tokens` queries";
    MeanWindow: "mean_window", Window, BOTH, "log of the mean attention from the queries of `max_window`";
    MaxLast: "max_last", Last, BOTH, "log of the strongest attention from the context's last `last_queries` queries";
    MeanLast: "mean_last", Last, BOTH, "log of the mean attention from the queries of `max_last`";
    KeyNorm: "key_norm", Vectors, BOTH, "log of the key's norm";
    ValueNorm: "value_norm", Vectors, BOTH, "log of the value's norm";
    ReconLog: "recon_log", Replay, PROXY, "log of the source's own KVzip score";
    ReconLogOdds: "recon_log_odds", Replay, PROXY, "log-odds of the source's own KVzip score";
    ReconMean: "recon_mean", Replay, PROXY, "log of the mean, over the repeat's rows, of the weights whose maximum is the KVzip score";
    HiddenLinear: "hidden_linear", HiddenStates, TARGET,
        "log-odds of the target's own KVzip score, by a linear map of the layer's hidden state that was fitted to training labels";
    ReplayUnrun: "replay_unrun", ScoringChunk, BOTH,
        "log of the strongest attention that the scoring chunk's own queries, moved to where its repeat would be, pay within the chunk";
    ReplayUnrunMean: "replay_unrun_mean", ScoringChunk, BOTH, "log of the mean attention of the queries of `replay_unrun`";
    KeyDiff: "key_diff", AllKeys, BOTH, "minus the cosine between the key and the mean key of its head";
    MeanLastLayer: "mean_last_layer", Last, BOTH, "log of `mean_last`'s mean over all query heads of the layer";
}

impl Channel {
    /// Channels that need the source to repeat its context.
    pub const fn is_reconstruction(self) -> bool {
        matches!(self.pass(), Pass::Replay)
    }

    /// Channels that read the hidden states of a layer through a fitted map.
    pub const fn is_fitted(self) -> bool {
        matches!(self.pass(), Pass::HiddenStates)
    }

    /// Channels that need the attention of the whole causal range: one more pass of queries times keys.
    pub const fn is_whole_range(self) -> bool {
        matches!(self.pass(), Pass::WholeRange)
    }

    /// The eight channels that cost one prefill, and are a recipe's default.
    pub const PREFILL: [Self; 8] = [
        Self::MaxAll,
        Self::MeanAll,
        Self::MaxWindow,
        Self::MeanWindow,
        Self::MaxLast,
        Self::MeanLast,
        Self::KeyNorm,
        Self::ValueNorm,
    ];

    /// The three channels that cost a reconstruction as well.
    pub const RECONSTRUCTION: [Self; 3] = [Self::ReconLog, Self::ReconLogOdds, Self::ReconMean];
}

crate::named! {
    /// A feature of a position, the same for all heads of a source.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    pub enum GlobalChannel {
        /// Negative log-likelihood (nats) that the source gave the token during prefill.
        Surprisal = "surprisal";
        /// t / T.
        Position = "position";
        /// log(t + 1).
        LogPosition = "log_position";
        /// log(T - t).
        LogRemaining = "log_remaining";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_entry_has_a_name_a_meaning_and_a_source_of_its_own() {
        let names: BTreeSet<&str> = Channel::ALL.iter().map(|c| c.name()).collect();
        let meanings: BTreeSet<&str> = Channel::ALL.iter().map(|c| c.meaning()).collect();
        assert_eq!([names.len(), meanings.len()], [Channel::ALL.len(); 2], "each is another's");
        for c in Channel::ALL {
            assert!(!c.sources().is_empty() && !c.meaning().ends_with('.'), "{c}");
            assert!(Pass::ALL.contains(&c.pass()), "{c}");
            let text = serde_json::to_string(&c).unwrap();
            assert_eq!(text, format!("\"{c}\""), "files have the name");
            assert_eq!(serde_json::from_str::<Channel>(&text).unwrap(), c);
        }
    }

    /// Names that shards, exports and fingerprints of older versions hold, in the order that shards are
    /// sorted by.
    #[test]
    fn older_files_find_their_channels() {
        let older = [
            "max_all",
            "mean_all",
            "max_window",
            "mean_window",
            "max_last",
            "mean_last",
            "key_norm",
            "value_norm",
            "recon_log",
            "recon_log_odds",
            "recon_mean",
            "hidden_linear",
        ];
        for (channel, name) in Channel::ALL.iter().zip(older) {
            assert_eq!(channel.name(), name);
        }
    }

    #[test]
    fn a_pass_costs_by_the_lengths_it_depends_on() {
        let lengths = PassLengths {
            context: 1000,
            window: 2000,
            last_queries: 64,
            whole_range_stride: 4,
            scoring_chunk: 160,
        };
        let keys = Pass::ALL.map(|pass| pass.keys_per_position(&lengths));
        assert_eq!(keys, [125.0, 1000.0, 64.0, 0.0, 2.0, 160.0, 0.0, 0.0]);
    }
}
