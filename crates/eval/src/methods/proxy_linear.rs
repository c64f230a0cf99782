//! Ridge regression from the one kind of channel that is nearest to a score, and the choice of that channel.

use anyhow::{Context, Result};
use pkv_core::Channel;
use pkv_recipe::MethodName;

use super::method::{Method, Needs, Start};
use super::ridge::RidgeFit;

pub const METHOD: Method = Method {
    name: MethodName::of("proxy-linear"),
    meaning: "ridge regression from the one channel that is nearest to a score",
    needs: Needs::FEATURES,
    #[cfg(test)]
    held_by: ("src/methods/ridge.rs", "fn a_linear_target_is_found_exactly"),
    start: |setup| {
        let slots = proxy_slots(setup.channels)?;
        let names: Vec<String> = slots.iter().map(|&s| channel_name(setup.channels[s])).collect();
        let note = format!("ridge regression from {}", names.join(", "));
        Start::fit(RidgeFit::new(setup.mapper, Some(&slots))?.noted(note))
    },
};

/// The channel that represents the proxy's own opinion: its reconstruction, else its strongest attention.
///
/// # Errors
/// There is no channel.
pub fn opinion(channels: &[Channel]) -> Result<(usize, Channel)> {
    let by_preference = [
        Channel::ReconLogOdds,
        Channel::ReconLog,
        Channel::ReconMean,
        Channel::MaxAll,
        Channel::MaxWindow,
        Channel::MeanAll,
        Channel::MeanWindow,
    ];
    let found = by_preference.iter().find_map(|c| Some((channels.iter().position(|x| x == c)?, *c)));
    let first = channels.first().map(|c| (0, *c));
    found.or(first).context("the features have no channel")
}

/// All reconstruction channels, or the one that represents the proxy's opinion without them.
fn proxy_slots(channels: &[Channel]) -> Result<Vec<usize>> {
    let recon: Vec<usize> =
        channels.iter().enumerate().filter(|(_, c)| c.is_reconstruction()).map(|(i, _)| i).collect();
    if recon.is_empty() { Ok(vec![opinion(channels)?.0]) } else { Ok(recon) }
}

/// A channel's name in recipes, in backticks.
pub fn channel_name(channel: Channel) -> String {
    format!("`{channel}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_speaks_through_its_reconstruction_or_its_strongest_attention() {
        assert_eq!(opinion(&Channel::PREFILL).unwrap(), (0, Channel::MaxAll));
        let all: Vec<Channel> = Channel::PREFILL.into_iter().chain(Channel::RECONSTRUCTION).collect();
        assert_eq!(opinion(&all).unwrap(), (9, Channel::ReconLogOdds));
        assert_eq!(proxy_slots(&all).unwrap(), [8, 9, 10]);
        assert_eq!(proxy_slots(&[Channel::KeyNorm, Channel::MaxWindow]).unwrap(), [1]);
        assert_eq!(proxy_slots(&[Channel::KeyNorm]).unwrap(), [0]);
        assert!(opinion(&[]).is_err());
        assert_eq!(channel_name(Channel::MaxAll), "`max_all`");
    }
}
