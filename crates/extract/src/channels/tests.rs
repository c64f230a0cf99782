//! Every channel of the table has a way to be computed, and something that holds it.

use std::fs;
use std::path::Path;

use pkv_core::{Channel, Pass};

use super::{Compute, REGISTRY};

/// Reference of each channel: the test's file, and the line of it that has the channel's definition.
const HELD_BY: [(Channel, &str, &str); 16] = [
    (Channel::MaxAll, "reference.rs", "Channel::MaxAll |"),
    (Channel::MeanAll, "reference.rs", "Channel::MeanAll |"),
    (Channel::MaxWindow, "reference.rs", "Channel::MaxWindow |"),
    (Channel::MeanWindow, "reference.rs", "Channel::MeanWindow |"),
    (Channel::MaxLast, "reference.rs", "| Channel::MaxLast =>"),
    (Channel::MeanLast, "reference.rs", "| Channel::MeanLast =>"),
    (Channel::MeanLastLayer, "reference.rs", "Channel::MeanLastLayer =>"),
    (Channel::KeyNorm, "model.rs", "Channel::KeyNorm =>"),
    (Channel::ValueNorm, "model.rs", "Channel::ValueNorm =>"),
    (Channel::ReconLog, "model.rs", "Channel::ReconLog =>"),
    (Channel::ReconLogOdds, "model.rs", "Channel::ReconLogOdds =>"),
    (Channel::ReconMean, "model.rs", "Channel::ReconMean =>"),
    (Channel::HiddenLinear, "hidden.rs", "fn the_map_is_the_ridge_solution_and_the_channel_its_values"),
    (Channel::ReplayUnrun, "model.rs", "Channel::ReplayUnrun =>"),
    (Channel::ReplayUnrunMean, "model.rs", "Channel::ReplayUnrunMean =>"),
    (Channel::KeyDiff, "model.rs", "Channel::KeyDiff =>"),
];

#[test]
fn every_channel_is_computed_once_and_held_by_a_reference() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/extract");
    for &channel in Channel::ALL {
        let computed: Vec<_> = REGISTRY.iter().filter(|e| e.channel == channel).collect();
        assert_eq!(computed.len(), 1, "`{channel}` is in the registry {} times", computed.len());
        let fits = match computed[0].compute {
            Compute::Statistic(..) => {
                matches!(channel.pass(), Pass::WholeRange | Pass::Window | Pass::Last)
            }
            Compute::Layer(_) => matches!(channel.pass(), Pass::Vectors | Pass::HiddenStates),
            Compute::ScoringChunk(_) => channel.pass() == Pass::ScoringChunk,
            Compute::Keys(_) => channel.pass() == Pass::AllKeys,
            Compute::Replay { .. } => channel.pass() == Pass::Replay,
        };
        assert!(fits, "`{channel}` is not computed by what the table says that it reads");
        let held: Vec<_> = HELD_BY.iter().filter(|h| h.0 == channel).collect();
        let [(_, file, what)] = held[..] else { panic!("nothing holds `{channel}`") };
        let text = fs::read_to_string(folder.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(text.contains(what), "`{channel}`: `{file}` has no {what}");
    }
    assert_eq!((REGISTRY.len(), HELD_BY.len()), (Channel::ALL.len(), Channel::ALL.len()));
}
