//! Candidate values: recipes, runs and keys that exist on this machine, and names of tasks and methods.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use pkv_core::{Channel, Source};
use pkv_recipe::{DEEPEST, toml_files};

fn words<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<CompletionCandidate> {
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// `--device`.
pub fn devices() -> ArgValueCandidates {
    ArgValueCandidates::new(|| words(["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:0+cuda:1"]))
}

/// `--methods`.
pub fn methods() -> ArgValueCandidates {
    ArgValueCandidates::new(|| words(pkv_eval::methods::names().map(|name| name.name())))
}

/// `--tasks`: whole suites, then single tasks.
pub fn tasks() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let whole = pkv_eval::tasks::names().map(str::to_owned);
        whole.chain(pkv_eval::tasks::singles()).map(CompletionCandidate::new).collect()
    })
}

/// `--recipe`: the recipes below `recipes/`, and the way to any other TOML file.
pub fn recipe() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let mut found = Vec::new();
        toml_files(Path::new("recipes"), DEEPEST, &mut found);
        let mut all = starting_with(current, found.into_iter().map(PathBuf::into_os_string));
        if all.is_empty() || !current.is_empty() {
            let is_toml = |p: &Path| p.extension().is_some_and(|e| e == "toml");
            let paths = PathCompleter::any().filter(is_toml).complete(current);
            // All below `recipes/` are listed already.
            all.extend(paths.into_iter().filter(|p| !Path::new(p.get_value()).starts_with("recipes")));
        }
        all
    })
}

/// `recipes show`: the names that `recipes ls` prints, and the way to any other TOML file.
pub fn recipe_name() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let known = crate::recipes::files().unwrap_or_default();
        let names = known.iter().filter_map(|path| path.file_stem().map(OsStr::to_owned));
        let mut all = starting_with(current, names);
        if all.is_empty() {
            let is_toml = |p: &Path| p.extension().is_some_and(|e| e == "toml");
            all = PathCompleter::any().filter(is_toml).complete(current);
        }
        all
    })
}

fn starting_with(current: &OsStr, all: impl Iterator<Item = OsString>) -> Vec<CompletionCandidate> {
    let fits = |value: &OsString| value.as_encoded_bytes().starts_with(current.as_encoded_bytes());
    all.filter(fits).map(CompletionCandidate::new).collect()
}

fn leads_to(path: &OsStr, all: &[CompletionCandidate]) -> bool {
    all.iter().any(|c| c.get_value().as_encoded_bytes().starts_with(path.as_encoded_bytes()))
}

/// A run by its name below `--runs` (`compare`), or a folder.
pub fn run_name() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let names = run_folders().into_iter().filter_map(|p| p.file_name().map(OsStr::to_owned));
        or_folders(current, starting_with(current, names))
    })
}

/// A run folder below `--runs`, whose export is meant (`push`, `infer --mapper`), or any other folder.
pub fn run_path() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        or_folders(current, starting_with(current, run_folders().into_iter().map(PathBuf::into_os_string)))
    })
}

fn or_folders(current: &OsStr, mut all: Vec<CompletionCandidate>) -> Vec<CompletionCandidate> {
    if all.is_empty() || !current.is_empty() {
        let new: Vec<_> = PathCompleter::dir()
            .complete(current)
            .into_iter()
            // A run with a slash after it is the same run.
            .filter(|p| !leads_to(Path::new(p.get_value()).as_os_str(), &all) && !is_one_of(p, &all))
            .collect();
        all.extend(new);
    }
    all
}

fn is_one_of(path: &CompletionCandidate, all: &[CompletionCandidate]) -> bool {
    all.iter().any(|c| Path::new(c.get_value()) == Path::new(path.get_value()))
}

/// Folders with a run.json below the `--runs` of the line so far.
fn run_folders() -> Vec<PathBuf> {
    let runs = typed("--runs").unwrap_or_else(|| "runs".into());
    let mut all: Vec<PathBuf> = fs::read_dir(runs)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| pkv_shard::RunLayout::new(path).run_json().is_file())
        .collect();
    all.sort();
    all
}

/// What was given to an option in the words that are being completed, `--option value` or `--option=value`.
fn typed(option: &str) -> Option<PathBuf> {
    let words: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let at = words.iter().rposition(|w| w == option || w.starts_with(&format!("{option}=")))?;
    let value = match words[at].split_once('=') {
        Some((_, value)) => value,
        // bash has the `=` as a word.
        None => words.get(at + 1..)?.iter().find(|w| *w != "=")?,
    };
    Some(PathBuf::from(value))
}

/// `--set`: the keys of a recipe, with what they are in the recipe that was named.
pub fn assignment() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let named = typed("--recipe").and_then(|path| pkv_recipe::load(&path, &[]).ok());
        let known = named.and_then(|recipe| serde_json::to_value(recipe).ok());
        let current = current.to_string_lossy();
        if current.starts_with("extract.") && current.contains('=') {
            let fits = |(value, _): &(String, &str)| value.starts_with(&*current);
            let candidate = |(value, meaning): (String, &'static str)| {
                CompletionCandidate::new(value).help(Some(meaning.into()))
            };
            return channel_lists().into_iter().filter(fits).map(candidate).collect();
        }
        keys()
            .into_iter()
            .map(|key| {
                let now = known.as_ref().and_then(|r| r.pointer(&format!("/{}", key.replace('.', "/"))));
                let help = now.map(|value| value.to_string().into());
                (format!("{key}="), help)
            })
            .filter(|(key, _)| key.starts_with(&*current))
            .map(|(key, help)| CompletionCandidate::new(key).help(help))
            .collect()
    })
}

/// `extract.channels=` and `extract.target_channels=`, with each channel that the source gives.
fn channel_lists() -> Vec<(String, &'static str)> {
    let keys = [("extract.channels", Source::Proxy), ("extract.target_channels", Source::Target)];
    let of = |(key, source): (&str, Source)| {
        let given = Channel::ALL.iter().filter(move |c| c.sources().contains(&source));
        given.map(|c| (format!("{key}=[\"{c}\"]"), c.meaning())).collect::<Vec<_>>()
    };
    keys.into_iter().flat_map(of).collect()
}

/// Every dotted key of a recipe, in the order of its sections.
fn keys() -> Vec<String> {
    pkv_recipe::schema::Keys::all().keys.iter().map(|key| key.path.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_that_a_recipe_may_have_is_offered() {
        let offered = keys();
        for key in ["name", "train.steps", "train.contexts", "target.shape.layers", "loss.fine_pairs.top"] {
            assert!(offered.iter().any(|o| o == key), "{key}");
        }
    }

    #[test]
    fn channels_are_offered_to_the_source_that_gives_them() {
        let offered = channel_lists();
        let has = |text: &str| offered.iter().any(|(value, meaning)| value == text && meaning.len() > 10);
        assert!(
            has("extract.channels=[\"recon_log\"]") && has("extract.target_channels=[\"hidden_linear\"]")
        );
        assert!(
            !has("extract.target_channels=[\"recon_log\"]") && !has("extract.channels=[\"hidden_linear\"]")
        );
        for (value, _) in offered {
            let key = value.split_once('=').unwrap().0.to_owned();
            assert!(keys().contains(&key), "{key}");
        }
    }
}
