//! Names of the proxy features: one channel per statistic, in the order recipes and shards use.
//!
//! What a channel means numerically is written where it is computed, in `extract`.

use serde::{Deserialize, Serialize};

/// A feature of one (proxy layer, proxy KV head, position).
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
    /// Log of the proxy's own KVzip score.
    ReconLog,
    /// Log-odds of the proxy's own KVzip score.
    ReconLogOdds,
    /// Log of the mean, over the repeat's rows, of the same softmax weights.
    ReconMean,
}

impl Channel {
    /// Channels that need the attention of the whole causal range: one more pass of queries times keys.
    pub const fn is_whole_range(self) -> bool {
        matches!(self, Self::MaxAll | Self::MeanAll)
    }

    /// Channels that need the proxy to repeat its context.
    pub const fn is_reconstruction(self) -> bool {
        matches!(self, Self::ReconLog | Self::ReconLogOdds | Self::ReconMean)
    }

    /// The eight channels that cost one prefill of the proxy.
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

    /// The three channels that cost the proxy's reconstruction as well.
    pub const RECONSTRUCTION: [Self; 3] = [Self::ReconLog, Self::ReconLogOdds, Self::ReconMean];
}

/// A feature of a position, the same for all proxy heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GlobalChannel {
    /// Negative log-likelihood (nats) that the proxy gave the token during prefill.
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
