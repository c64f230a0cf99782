//! Every channel of the table has a way to be computed, and something that holds it.

use std::fs;
use std::path::Path;

use pkv_core::{Channel, Pass};

use super::{Compute, all};

/// Every file of a folder of this crate, its name and its text.
fn files(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(&folder).unwrap().flatten();
    let read =
        |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read_to_string(e.path()).unwrap());
    entries.map(read).collect()
}

#[test]
fn every_channel_is_computed_once_and_held_by_a_reference() {
    let (sources, tests) = (files("src/channels"), files("tests/extract"));
    for channel in Channel::ALL {
        let computed: Vec<_> = all().filter(|e| e.channel == channel).collect();
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
        // Its definition in f64: an arm of the naive version, or a test that names it, here or beside its
        // code.
        let name = format!("Channel::{channel:?}");
        let names_it = |text: &str| {
            text.match_indices(&name)
                .any(|(at, _)| !text[at + name.len()..].starts_with(char::is_alphanumeric))
        };
        let has_arm = |text: &str| text.lines().any(|line| line.contains("=>") && names_it(line));
        let naive = tests.iter().any(|(file, text)| match file.as_str() {
            "reference.rs" | "model.rs" => has_arm(text),
            _ => false,
        });
        let own = tests.iter().filter(|(file, _)| file == "hidden.rs").map(|(_, text)| text.as_str());
        let beside = sources
            .iter()
            .filter(|(file, _)| file != "tests.rs")
            .filter_map(|(_, text)| Some(text.split_once("#[cfg(test)]")?.1));
        assert!(naive || own.chain(beside).any(names_it), "nothing holds `{channel}`");
    }
    assert_eq!(all().count(), Channel::ALL.len());
}
