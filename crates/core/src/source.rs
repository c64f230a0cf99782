//! Feature sources (proxy, target), and how the features of several sources are joined.
//!
//! Each source is stored and computed on its own, with its own channels. [`FeatureLayout`] says where its
//! rows go in the one array that the mapper reads: heads of the sources follow one another, and a channel
//! that a source lacks is 0.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Channel, GlobalChannel, ModelShape};

crate::named! {
    /// A model that features come from.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    pub enum Source {
        /// The proxy's prefill: the paper's ProxyKV.
        Proxy = "proxy";
        /// The target's own prefill.
        Target = "target";
    }
}

/// One source's place in the mapper's input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLayout {
    pub source: Source,
    /// Its own channels, in the order it is stored in.
    pub channels: Vec<Channel>,
    /// Channel of the mapper's input that each of `channels` goes to.
    pub slots: Vec<usize>,
    /// Rows of its globals that the mapper sees.
    pub globals: Vec<usize>,
}

/// Layout of the features of all sources in one input.
///
/// Heads are those of the sources in their order. Channels are the union of the sources' lists, in the order
/// of first mention. Globals are all of the first source and, of the others, the surprisal: positions are the
/// same for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureLayout {
    sources: Vec<SourceLayout>,
    channels: Vec<Channel>,
}

impl FeatureLayout {
    /// `sources` in the mapper's order, each with its channels; every source computes all of `globals`.
    pub fn new(sources: &[(Source, &[Channel])], globals: &[GlobalChannel]) -> Self {
        let mut channels: Vec<Channel> = Vec::new();
        let mut layouts = Vec::new();
        for (i, (source, own)) in sources.iter().enumerate() {
            let slots = own
                .iter()
                .map(|channel| match channels.iter().position(|c| c == channel) {
                    Some(slot) => slot,
                    None => {
                        channels.push(*channel);
                        channels.len() - 1
                    }
                })
                .collect();
            let seen = |(row, global): (usize, &GlobalChannel)| {
                (i == 0 || *global == GlobalChannel::Surprisal).then_some(row)
            };
            let globals = globals.iter().enumerate().filter_map(seen).collect();
            layouts.push(SourceLayout { source: *source, channels: own.to_vec(), slots, globals });
        }
        Self { sources: layouts, channels }
    }

    pub fn sources(&self) -> &[SourceLayout] {
        &self.sources
    }

    /// Channels of the mapper's input.
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// Globals of the mapper's input.
    pub fn globals(&self) -> usize {
        self.sources.iter().map(|s| s.globals.len()).sum()
    }

    /// KV heads of the mapper's input, over all layers of all sources; a proxy that is not there has none.
    pub fn heads(&self, target: &ModelShape, proxy: Option<&ModelShape>) -> usize {
        let shapes = self.sources.iter().filter_map(|s| s.source.shape(target, proxy));
        shapes.map(ModelShape::total_kv_heads).sum()
    }

    pub fn has(&self, source: Source) -> bool {
        self.sources.iter().any(|s| s.source == source)
    }
}

impl Source {
    /// This one of the pair's shapes, if it is there.
    pub const fn shape<'a>(
        self,
        target: &'a ModelShape,
        proxy: Option<&'a ModelShape>,
    ) -> Option<&'a ModelShape> {
        match self {
            Self::Proxy => proxy,
            Self::Target => Some(target),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_is_laid_out_as_it_is_stored() {
        let layout = FeatureLayout::new(&[(Source::Proxy, &Channel::PREFILL)], &GlobalChannel::ALL);
        assert_eq!(layout.channels(), Channel::PREFILL);
        assert_eq!(layout.sources()[0].slots, (0..8).collect::<Vec<_>>());
        assert_eq!(layout.sources()[0].globals, [0, 1, 2, 3]);
    }

    #[test]
    fn sources_share_the_channels_that_both_have() {
        let target = [Channel::MaxAll, Channel::KeyNorm];
        let proxy = [Channel::ReconLog, Channel::KeyNorm];
        let layout = FeatureLayout::new(
            &[(Source::Target, &target), (Source::Proxy, &proxy)],
            &[GlobalChannel::Position, GlobalChannel::Surprisal],
        );
        assert_eq!(layout.channels(), [Channel::MaxAll, Channel::KeyNorm, Channel::ReconLog]);
        assert_eq!(layout.sources()[1].slots, [2, 1]);
        assert_eq!((layout.globals(), &layout.sources()[1].globals[..]), (3, &[1][..]));
    }
}
