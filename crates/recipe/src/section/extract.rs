//! `[extract]`: which features of the proxy the mapper sees.

use anyhow::{Result, ensure};
use pkv_core::{Channel, GlobalChannel, StoreDtype};
use serde::{Deserialize, Serialize};

/// Features of the proxy, [proxy layer, proxy KV head, channel, position] and [global channel, position].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExtractSection {
    /// Channels per (layer, KV head), in this order. The prefill-only eight by default: they match
    /// the reconstruction set and cost a tenth of it.
    pub channels: Vec<Channel>,
    /// Channels per position, in this order.
    pub globals: Vec<GlobalChannel>,
    /// Length of the sliding window of queries, tokens.
    pub window_tokens: usize,
    /// A query counts only if it is at least this many positions later than the key.
    pub min_distance: usize,
    /// Queries at the end of the context that the `*_last` channels read.
    pub last_queries: usize,
    /// Of the whole causal range, every so many-th query counts: those at multiples of it. A maximum and a mean over a
    /// quarter of thousands of queries tell the mapper as much as over all of them, at a quarter of the cost, which grows
    /// with the square of the context.
    pub whole_range_stride: usize,
    /// Queries per block of the blockwise statistics; bounds memory, changes nothing else.
    pub block_tokens: usize,
    /// Tokens per forward while prefilling.
    pub prefill_chunk_tokens: usize,
    /// Dtype of the stored features.
    pub store: StoreDtype,
}

impl Default for ExtractSection {
    fn default() -> Self {
        Self {
            channels: Channel::PREFILL.to_vec(),
            globals: GlobalChannel::ALL.to_vec(),
            window_tokens: 256,
            min_distance: 4,
            last_queries: 64,
            whole_range_stride: 4,
            block_tokens: 512,
            prefill_chunk_tokens: 32_768,
            store: StoreDtype::F16,
        }
    }
}

impl ExtractSection {
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.channels.is_empty(), "`extract.channels` is empty");
        for (i, c) in self.channels.iter().enumerate() {
            ensure!(!self.channels[..i].contains(c), "`extract.channels[{i}]` is named twice");
        }
        for (i, c) in self.globals.iter().enumerate() {
            ensure!(!self.globals[..i].contains(c), "`extract.globals[{i}]` is named twice");
        }
        ensure!(
            self.window_tokens > self.min_distance,
            "`extract.window_tokens` is {}, not more than `extract.min_distance` = {}: the window is empty",
            self.window_tokens,
            self.min_distance
        );
        ensure!(self.last_queries > 0, "`extract.last_queries` is 0");
        ensure!(self.whole_range_stride > 0, "`extract.whole_range_stride` is 0: no query would count");
        ensure!(self.block_tokens > 0, "`extract.block_tokens` is 0");
        ensure!(self.prefill_chunk_tokens > 0, "`extract.prefill_chunk_tokens` is 0");
        Ok(())
    }
}
