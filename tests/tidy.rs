//! Rules of the source tree that neither the compiler nor rustfmt checks: module docs, line widths, file
//! lengths, layers of crates, words.
//!
//! Only files are read, nothing is built.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Widest comment line in characters: rustfmt's `max_width`, which it does not apply to comments.
const COMMENT_WIDTH: usize = 110;

/// Longest file in lines, and the files that may be longer, with their own limits.
const FILE_LINES: usize = 600;
const LONGER: [(&str, usize); 1] = [("tests/infer.rs", 700)];

/// Words that comments, help and documents do without, and what to write.
const WORDS: [(&str, &str); 8] = [
    ("told", "reported, given, distinguished"),
    ("whoever", "the process that, the caller that"),
    ("nobody", "no caller, no process"),
    ("news", "message"),
    ("wish", "request"),
    ("wishes", "requests"),
    ("behind", "after"),
    ("stands", "is"),
];

/// Phrases in which such a word is the right one: scores compared.
const ALLOWED: [&str; 2] = ["points behind", "falls behind"];

fn root() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
}

/// Files below the folders that hold sources and documents, by the path from the root.
fn files(extension: &str) -> Vec<(String, String)> {
    let root = root();
    let mut folders: Vec<PathBuf> =
        ["crates", "tests", "docs", "recipes", "data-manifests", "scripts"].map(|f| root.join(f)).into();
    let mut found = vec![root.join("README.md")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // Build outputs, virtual environments.
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    found.retain(|path| path.extension().is_some_and(|e| e == extension));
    found.sort();
    assert!(!found.is_empty(), "no `.{extension}` file below {}", root.display());
    let name = |path: &Path| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
    found.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// Lines of a Rust file that hold nothing but a comment, by number from 1.
fn comments(source: &str) -> impl Iterator<Item = (usize, &str)> {
    source
        .lines()
        .enumerate()
        .filter(|(_, line)| line.trim_start().starts_with("//"))
        .map(|(i, l)| (i + 1, l))
}

fn none(broken: &[String]) {
    assert!(broken.is_empty(), "{} places:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn every_file_begins_with_what_it_owns() {
    let without = files("rs").into_iter().filter(|(_, source)| {
        let first = source.lines().next().unwrap_or_default();
        first.strip_prefix("//!").is_none_or(|text| text.trim().is_empty())
    });
    none(
        &without.map(|(name, _)| format!("{name}: the first line is no `//!` with text")).collect::<Vec<_>>(),
    );
}

#[test]
fn comments_are_as_narrow_as_code() {
    let mut wide = Vec::new();
    for (name, source) in files("rs") {
        for (number, line) in comments(&source) {
            let table = line.trim_start().trim_start_matches(['/', '!']).trim_start().starts_with('|');
            let width = line.chars().count();
            if width > COMMENT_WIDTH && !table {
                wide.push(format!("{name}:{number}: {width} characters, {COMMENT_WIDTH} are allowed"));
            }
        }
    }
    none(&wide);
}

#[test]
fn no_file_is_too_long() {
    let mut long = Vec::new();
    for (name, source) in files("rs") {
        let limit = LONGER.iter().find(|(longer, _)| *longer == name).map_or(FILE_LINES, |(_, limit)| *limit);
        let lines = source.lines().count();
        if lines > limit {
            long.push(format!(
                "{name}: {lines} lines, {limit} are allowed; a second subject wants a second file"
            ));
        }
    }
    none(&long);
    for (name, _) in LONGER {
        let lines = fs::read_to_string(root().join(name)).unwrap().lines().count();
        assert!(lines > FILE_LINES, "{name} has {lines} lines: take it off the list");
    }
}

/// Places of [`WORDS`] in `text`, where no phrase of [`ALLOWED`] covers them.
fn words_in(text: &str) -> Vec<String> {
    let mut text = text.to_lowercase();
    for phrase in ALLOWED {
        text = text.replace(phrase, "");
    }
    let separates = |c: char| !c.is_alphanumeric() && c != '_' && c != '-';
    let found = text.split(separates).filter_map(|word| WORDS.iter().find(|(banned, _)| *banned == word));
    found.map(|(banned, instead)| format!("`{banned}`; write {instead}")).collect()
}

#[test]
fn comments_and_documents_use_the_standard_words() {
    let mut found = Vec::new();
    for (name, source) in files("rs") {
        for (number, line) in comments(&source) {
            found.extend(words_in(line).iter().map(|said| format!("{name}:{number}: {said}")));
        }
    }
    for (name, text) in files("md") {
        for (i, line) in text.lines().enumerate() {
            found.extend(words_in(line).iter().map(|said| format!("{name}:{}: {said}", i + 1)));
        }
    }
    none(&found);
    assert_eq!(words_in("Two points behind; the rest stands behind it.").len(), 2);
}

/// Layer of each crate by the table of the code map: `| L2 | [lm](lm) | …`.
fn layers(code_map: &str) -> BTreeMap<String, usize> {
    let mut layers = BTreeMap::new();
    for line in code_map.lines().filter(|line| line.starts_with("| L")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let layer = cells[1].trim_start_matches('L').parse().unwrap_or_else(|e| panic!("`{line}`: {e}"));
        let name = cells[2].trim_start_matches('[').split(']').next().unwrap();
        assert!(layers.insert(name.to_owned(), layer).is_none(), "{name} is in the table twice");
    }
    layers
}

/// Crates of this workspace that a manifest depends on, to build it or to test it.
fn dependencies(manifest: &toml::Table) -> Vec<String> {
    let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
    assert!(!manifest.contains_key("target"), "dependencies by target are not read here");
    let names = tables.iter().filter_map(|t| manifest.get(*t)?.as_table()).flat_map(|t| t.keys());
    names.filter_map(|name| name.strip_prefix("pkv-")).map(str::to_owned).collect()
}

#[test]
fn a_crate_depends_only_on_layers_above_its_own_in_the_code_map() {
    let crates = root().join("crates");
    let layers = layers(&fs::read_to_string(crates.join("README.md")).unwrap());
    let mut seen = Vec::new();
    let mut broken = Vec::new();
    let mut arrows = 0;
    for entry in fs::read_dir(&crates).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(manifest) = fs::read_to_string(folder.join("Cargo.toml")) else { continue };
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest: toml::Table = manifest.parse().unwrap();
        assert_eq!(manifest["package"]["name"].as_str(), Some(&*format!("pkv-{name}")));
        let Some(layer) = layers.get(&name) else {
            broken.push(format!("{name} is not in the table of crates/README.md"));
            continue;
        };
        for other in dependencies(&manifest) {
            arrows += 1;
            if layers[&other] >= *layer {
                broken.push(format!("{name} (L{layer}) depends on {other} (L{})", layers[&other]));
            }
        }
        seen.push(name);
    }
    none(&broken);
    seen.sort();
    assert_eq!(seen, layers.keys().cloned().collect::<Vec<_>>(), "the table names a crate that is not there");
    assert!(arrows > seen.len(), "only {arrows} dependencies were read");
}

#[test]
fn the_code_map_and_the_steps_to_add_something_name_files_that_exist() {
    let root = root();
    let mut missing = Vec::new();
    let mut seen = 0;
    for (page, from) in [("docs/contributing.md", "."), ("crates/README.md", "crates")] {
        let text = fs::read_to_string(root.join(page)).unwrap();
        // Every second piece is inside of backticks. A `<name>` is for the reader to choose.
        for name in text.split('`').skip(1).step_by(2).filter(|n| n.contains('/') && !n.contains(['<', ' ']))
        {
            let source = [".rs", ".py", ".toml", ".md", ".sh"].iter().any(|e| name.ends_with(e))
                || name.contains("/src");
            if source {
                seen += 1;
                if ![from, "."].iter().any(|f| root.join(f).join(name).exists()) {
                    missing.push(format!("{page}: there is no `{name}`"));
                }
            }
        }
    }
    none(&missing);
    assert!(seen > 40, "only {seen} names were read");
}
