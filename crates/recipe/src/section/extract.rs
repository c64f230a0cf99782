//! `[extract]`: which features of which models the mapper sees.

use anyhow::{Result, ensure};
use pkv_core::{Channel, FeatureLayout, GlobalChannel, Hinted, Pass, Source, StoreDtype, hinted};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Features of each source, [layer, KV head, channel, position] and [global channel, position].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExtractSection {
    /// Models that features come from, in the order of the mapper's input: `proxy` is the paper's ProxyKV;
    /// `target` takes them from the target's own prefill and needs no second model.
    #[serde(skip_serializing_if = "is_proxy_alone")]
    #[schemars(extend("default" = ExtractSection::default().from))]
    pub from: Vec<Source>,
    /// Channels per (layer, KV head) of the proxy, in this order. By default the eight that need only a
    /// prefill: they are as good as the reconstruction channels at a tenth of the cost.
    pub channels: Vec<Channel>,
    /// The same for the target, if it is a source; without reconstruction, which would be KVzip itself.
    #[serde(skip_serializing_if = "is_prefill")]
    #[schemars(extend("default" = ExtractSection::default().target_channels))]
    pub target_channels: Vec<Channel>,
    /// Channels per position, in this order.
    pub globals: Vec<GlobalChannel>,
    /// Length of the sliding window of queries, tokens.
    pub window_tokens: usize,
    /// A query counts only if it is at least this many positions later than the key.
    pub min_distance: usize,
    /// Queries at the end of the context that the `*_last` channels read.
    pub last_queries: usize,
    /// Stride of the queries of the whole causal range: those at multiples of it count. Every fourth query is
    /// as good for the mapper as all of them, at a quarter of the cost, which grows with the square of the
    /// context.
    pub whole_range_stride: usize,
    /// Queries per block of the blockwise statistics; bounds memory, changes nothing else.
    pub block_tokens: usize,
    /// Tokens per forward while prefilling.
    pub prefill_chunk_tokens: usize,
    /// Dtype of the stored features.
    pub store: StoreDtype,
    /// What to do if features are not on disk.
    #[serde(skip_serializing_if = "MissingFeatures::is_default")]
    #[schemars(extend("default" = MissingFeatures::default()))]
    pub missing: MissingFeatures,
    /// What to do with features after the mapper was trained on them; `delete` needs `missing = "generate"`.
    #[serde(skip_serializing_if = "AfterUse::is_default")]
    #[schemars(extend("default" = AfterUse::default()))]
    pub after_use: AfterUse,
}

/// What a stage does that reads features which are not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MissingFeatures {
    /// Fail with a hint to run `extract`.
    #[default]
    Fail,
    /// Compute them. With `after_use = "keep"`, `extract` runs first; with `"delete"`, a row is computed each
    /// time it is read.
    Generate,
}

/// What becomes of features when the mapper is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AfterUse {
    /// They stay on disk.
    #[default]
    Keep,
    /// Missing features are never written: `extract` does nothing, and the models read contexts beyond
    /// `train.cache_gb` again in every epoch. Existing complete shards are used, and removed when training is
    /// complete.
    Delete,
}

impl MissingFeatures {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl AfterUse {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for ExtractSection {
    fn default() -> Self {
        Self {
            from: vec![Source::Proxy],
            channels: Channel::PREFILL.to_vec(),
            target_channels: Channel::PREFILL.to_vec(),
            globals: GlobalChannel::ALL.to_vec(),
            window_tokens: 256,
            min_distance: 4,
            last_queries: 64,
            whole_range_stride: 4,
            block_tokens: 512,
            prefill_chunk_tokens: 32_768,
            store: StoreDtype::F16,
            missing: MissingFeatures::default(),
            after_use: AfterUse::default(),
        }
    }
}

impl ExtractSection {
    /// The channels of a source, in the order they are stored in.
    pub fn channels_of(&self, source: Source) -> &[Channel] {
        match source {
            Source::Proxy => &self.channels,
            Source::Target => &self.target_channels,
        }
    }

    /// How the sources' features make the mapper's input.
    pub fn layout(&self) -> FeatureLayout {
        let sources: Vec<_> = self.from.iter().map(|&source| (source, self.channels_of(source))).collect();
        FeatureLayout::new(&sources, &self.globals)
    }

    /// What one source is asked for: the section of a recipe that has this source alone, with its list as
    /// `channels`. What else the recipe takes features from does not show in it, so that runs share what one
    /// source gave.
    pub fn of(&self, source: Source) -> Self {
        Self {
            channels: self.channels_of(source).to_vec(),
            from: vec![Source::Proxy],
            target_channels: Channel::PREFILL.to_vec(),
            ..self.content()
        }
    }

    /// What the features are, whether they are stored or not.
    pub fn content(&self) -> Self {
        Self { missing: MissingFeatures::default(), after_use: AfterUse::default(), ..self.clone() }
    }

    /// Whether features are made when they are read and never written.
    pub fn is_transient(&self) -> bool {
        self.missing == MissingFeatures::Generate && self.after_use == AfterUse::Delete
    }

    /// Whether a source's channels are fitted to labels.
    pub fn is_fitted(&self, source: Source) -> bool {
        self.channels_of(source).iter().any(|c| c.is_fitted())
    }

    /// Whether a source's channels depend on `label`: on the repeat's scoring chunks and requests.
    pub fn reads_label_section(&self, source: Source) -> bool {
        self.channels_of(source).iter().any(|c| c.pass().reads_label_section())
    }

    /// Whether a source repeats its context.
    pub fn repeats(&self, source: Source) -> bool {
        self.channels_of(source).iter().any(|c| c.is_reconstruction())
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(
            !self.from.is_empty(),
            hinted("`extract.from` is empty", "name a source of features: `proxy`, `target` or both")
        );
        unique("from", &self.from)?;
        unique("channels", &self.channels)?;
        unique("target_channels", &self.target_channels)?;
        unique("globals", &self.globals)?;
        for (source, key) in [(Source::Proxy, "channels"), (Source::Target, "target_channels")] {
            let used = self.from.contains(&source);
            ensure!(
                !used || !self.channels_of(source).is_empty(),
                hinted(
                    format!("`extract.{key}` is empty"),
                    format!("name a channel, or leave `{}` out of `extract.from`", source.name())
                )
            );
        }
        for (source, key) in [(Source::Proxy, "channels"), (Source::Target, "target_channels")] {
            let foreign = |c: &Channel| !c.sources().contains(&source);
            if let Some(i) = self.channels_of(source).iter().position(foreign) {
                return Err(
                    refusal(self.channels_of(source)[i], source, &format!("extract.{key}[{i}]")).into()
                );
            }
        }
        ensure!(
            self.after_use == AfterUse::Keep || self.missing == MissingFeatures::Generate,
            hinted(
                "`extract.after_use` is `delete` and `extract.missing` is `fail`: `eval` and `export` would lack features",
                "set `extract.missing = \"generate\"` as well, or leave `extract.after_use` out"
            )
        );
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

/// Why a source does not give a channel, which `key` names.
fn refusal(channel: Channel, source: Source, key: &str) -> Hinted {
    match channel.pass() {
        Pass::HiddenStates => hinted(
            format!("`{key}` reads hidden states of the target"),
            "name it in `extract.target_channels`, and `target` in `extract.from`",
        ),
        Pass::Replay => hinted(
            format!("`{key}` makes the target repeat its context"),
            "that is KVzip's own scoring: take reconstruction channels from the proxy, in `extract.channels`",
        ),
        _ => hinted(
            format!("`{key}` is `{channel}`, which the {} does not give", source.name()),
            format!("of the {}, choose from {}", source.name(), names_for(source)),
        ),
    }
}

/// Names of the channels that a source gives.
fn names_for(source: Source) -> String {
    let given = Channel::ALL.iter().filter(|c| c.sources().contains(&source));
    given.map(|c| c.name()).collect::<Vec<_>>().join(", ")
}

fn unique<T: PartialEq>(key: &str, list: &[T]) -> Result<()> {
    for (i, x) in list.iter().enumerate() {
        ensure!(
            !list[..i].contains(x),
            hinted(format!("`extract.{key}[{i}]` is named twice"), "leave the second one out")
        );
    }
    Ok(())
}

/// Recipes, exports and fingerprints from before there was a choice say nothing of it.
fn is_proxy_alone(from: &[Source]) -> bool {
    from == [Source::Proxy]
}

fn is_prefill(channels: &[Channel]) -> bool {
    channels == Channel::PREFILL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_features_are_kept_is_no_part_of_what_they_are() {
        let kept = ExtractSection::default();
        let made = ExtractSection {
            missing: MissingFeatures::Generate,
            after_use: AfterUse::Delete,
            ..kept.clone()
        };
        assert!(made.is_transient() && !kept.is_transient());
        assert_eq!(made.of(Source::Proxy), kept.of(Source::Proxy));
        // Fingerprints of earlier versions lack the keys.
        let keys = |e: &ExtractSection| {
            let json = serde_json::to_value(e).unwrap();
            ["missing", "after_use"].map(|key| json.get(key).and_then(|v| v.as_str().map(str::to_owned)))
        };
        assert_eq!(keys(&kept), [None, None]);
        assert_eq!(keys(&made), [Some("generate".to_owned()), Some("delete".to_owned())]);
        // `eval` and `export` read features too.
        let e = ExtractSection { missing: MissingFeatures::Fail, ..made }.check().unwrap_err();
        assert!(e.to_string().contains("`extract.after_use` is `delete`"), "{e}");
    }
}
