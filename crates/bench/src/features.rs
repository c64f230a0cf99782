//! Sets of features by source and cost, for `prefill`.

use pkv_core::{Channel, Final, GlobalChannel, Source};
use pkv_recipe::{ExtractSection, Recipe};

pkv_core::named! {
    /// Features that ProxyKV may read.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum FeatureSet {
        Recipe = "recipe", "The recipe's features";
        Window = "window", "Proxy features from a window of queries";
        Reconstruction = "reconstruction", "The proxy's own KVzip scores";
        Target = "target", "Target features: the default channels without surprisal";
        TargetWindow = "target-window", "Target features from a window of queries";
        TargetUnrun = "target-unrun", "Target features: all channels except those of the whole range";
        TargetAll = "target-all", "Target features: all channels";
        Both = "both", "Target features, and proxy features with the proxy's KVzip scores";
    }
}

impl FeatureSet {
    /// The sets to measure where none is named: the recipe's, and of a recipe that reads a proxy those of a
    /// proxy by cost.
    pub fn defaults(recipe: &Recipe) -> &'static [Self] {
        match recipe.read_proxy() {
            Some(_) => &[Self::Recipe, Self::Window, Self::Reconstruction],
            None => &[Self::Recipe],
        }
    }

    /// Its channels and globals, as a section of `recipe`.
    pub fn section(self, recipe: &Recipe) -> ExtractSection {
        let with = |channels: Vec<Channel>| {
            // Surprisal needs the LM head at every position; the recipe's own set tells what it costs.
            let globals = recipe.extract.globals.iter().filter(|g| **g != GlobalChannel::Surprisal);
            let from = vec![Source::Proxy];
            ExtractSection { from, channels, globals: globals.copied().collect(), ..recipe.extract.clone() }
        };
        let of_target = |target_channels| ExtractSection {
            from: vec![Source::Target],
            target_channels,
            ..with(Vec::new())
        };
        // Final before the context's end.
        let windowed =
            || Channel::PREFILL.into_iter().filter(|c| c.pass().is_final() != Final::AtEnd).collect();
        let given = |whole_range: bool| {
            let all = Channel::ALL.iter().filter(|c| c.sources().contains(&Source::Target));
            all.filter(|c| whole_range || !c.is_whole_range()).copied().collect()
        };
        let reconstruction = [Channel::ReconLog, Channel::ReconLogOdds];
        match self {
            Self::Recipe => recipe.extract.clone(),
            Self::Window => with(windowed()),
            Self::Reconstruction => with(reconstruction.to_vec()),
            Self::Target => of_target(Channel::PREFILL.to_vec()),
            Self::TargetWindow => of_target(windowed()),
            Self::TargetUnrun => of_target(given(false)),
            Self::TargetAll => of_target(given(true)),
            Self::Both => ExtractSection {
                from: vec![Source::Target, Source::Proxy],
                target_channels: Channel::PREFILL.to_vec(),
                ..with([&Channel::PREFILL[..], &reconstruction].concat())
            },
        }
    }
}
