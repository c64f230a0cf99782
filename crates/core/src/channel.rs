//! Names of the features: one channel per statistic, in the order recipes and shards use.
//!
//! What a channel means numerically is written where it is computed, in `extract`.

use serde::{Deserialize, Serialize};

/// A feature of one (layer, KV head, position) of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Log of the strongest attention from queries at least `min_distance` positions later, whole causal range, of which
    /// every `whole_range_stride`-th query counts.
    MaxAll,
    /// Log of the mean of the same.
    MeanAll,
    /// Log of the strongest attention from the next `window_tokens` queries.
    MaxWindow,
    /// Log of the mean of the same.
    MeanWindow,
    /// Log of the strongest attention from the last `last_queries` queries of the context.
    MaxLast,
    /// Log of the mean of the same.
    MeanLast,
    /// Log of the key's norm.
    KeyNorm,
    /// Log of the value's norm.
    ValueNorm,
    /// Log of the source's own KVzip score.
    ReconLog,
    /// Log-odds of the source's own KVzip score.
    ReconLogOdds,
    /// Log of the mean, over the repeat's rows, of the same softmax weights.
    ReconMean,
    /// Log-odds of the target's own KVzip score, by a linear map of the layer's hidden state that was fitted to training
    /// labels: the target's alone.
    HiddenLinear,
}

impl Channel {
    /// Channels that need the attention of the whole causal range: one more pass of queries times keys.
    pub const fn is_whole_range(self) -> bool {
        matches!(self, Self::MaxAll | Self::MeanAll)
    }

    /// Channels that need the source to repeat its context.
    pub const fn is_reconstruction(self) -> bool {
        matches!(self, Self::ReconLog | Self::ReconLogOdds | Self::ReconMean)
    }

    /// Channels that read the hidden states of a layer through a fitted map.
    pub const fn is_fitted(self) -> bool {
        matches!(self, Self::HiddenLinear)
    }

    /// The eight channels that cost one prefill.
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

/// A feature of a position, the same for all heads of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GlobalChannel {
    /// Negative log-likelihood (nats) that the source gave the token during prefill.
    Surprisal,
    /// t / T.
    Position,
    /// log(t + 1).
    LogPosition,
    /// log(T - t).
    LogRemaining,
}

impl GlobalChannel {
    pub const ALL: [Self; 4] = [Self::Surprisal, Self::Position, Self::LogPosition, Self::LogRemaining];
}
