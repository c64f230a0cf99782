//! How each channel is computed: a file for each way, and [`REGISTRY`], which lists them.
//!
//! Names, meanings, sources and costs are in the table of `core/src/channel.rs`. The functions are called by
//! `tap` (layer by layer), `stream` (at the context's end) and `extractor` (after a repeat).
//!
//! Dimension key: h KV head of a layer, p KV head of all layers, d head_dim, k cached position, s new context
//! position, t context position.

mod attention;
mod hidden_linear;
mod key_diff;
mod norms;
mod reconstruction;
mod replay_unrun;
#[cfg(test)]
mod tests;

use anyhow::Result;
use pkv_core::Channel;
use pkv_gpu::ReplayScores;
use pkv_lm::LayerView;
use pkv_score::ContextScores;
use tch::Tensor;

use crate::hidden::HiddenProjection;
use crate::statistics::{Fold, Reach};

pub use key_diff::{key_diff, key_diff_of};

pub(crate) use replay_unrun::UnrunReplay;

/// A channel and its way to values.
pub(crate) struct Entry {
    pub channel: Channel,
    pub compute: Compute,
}

/// When a channel is computed, and of what.
pub(crate) enum Compute {
    /// With the other attention statistics, in one sweep over queries and keys.
    Statistic(Reach, Fold),
    /// As a layer's new context positions come: written into the channel's row of them, f32 `[h, s]`.
    Layer(fn(&NewPositions, &mut Tensor) -> Result<()>),
    /// Once a scoring chunk has been read: f32 `[h, positions of the chunk]`.
    ScoringChunk(fn(&ReplayScores) -> Tensor),
    /// From all of a layer's keys `[h, k]`, of which the first are the prefix: f32 `[h, t]`.
    Keys(fn(&Tensor, usize) -> Result<Tensor>),
    /// From the scores of a repeat: f32 `[p, t]`.
    Replay { reads_means: bool, values: fn(&ContextScores) -> Result<Tensor> },
}

/// A layer's data at new context positions.
pub(crate) struct NewPositions<'a> {
    pub view: &'a LayerView<'a>,
    /// Cache positions before the context.
    pub prefix: usize,
    /// The map of hidden states, if a channel needs it.
    pub hidden: Option<&'a HiddenProjection>,
}

impl NewPositions<'_> {
    /// Cache position of the first.
    pub fn first(&self) -> usize {
        self.view.start.max(self.prefix)
    }

    /// Their number.
    pub fn len(&self) -> usize {
        (self.view.k_hkd.size()[1] as usize).saturating_sub(self.first())
    }
}

/// All channels, by file.
static REGISTRY: &[&[Entry]] = &[
    attention::ENTRIES,
    norms::ENTRIES,
    reconstruction::ENTRIES,
    hidden_linear::ENTRIES,
    replay_unrun::ENTRIES,
    key_diff::ENTRIES,
];

fn all() -> impl Iterator<Item = &'static Entry> {
    REGISTRY.iter().copied().flatten()
}

/// The registry's entries of `channels`, each with its place in the list.
pub(crate) fn chosen(channels: &[Channel]) -> impl Iterator<Item = (i64, &'static Compute)> {
    channels.iter().enumerate().filter_map(|(slot, channel)| Some((slot as i64, find(*channel)?)))
}

fn find(channel: Channel) -> Option<&'static Compute> {
    all().find(|entry| entry.channel == channel).map(|entry| &entry.compute)
}
