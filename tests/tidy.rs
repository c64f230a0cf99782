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

/// Up to the parenthesis that closes; parentheses in texts come in pairs.
fn within_parentheses(text: &str) -> &str {
    let mut depth = 1;
    let end = text.find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    &text[..end.unwrap_or(text.len())]
}

/// A log line that is filtered out is not computed, so what it would return with `?` is lost.
#[test]
fn no_log_line_returns_an_error() {
    let mut broken = Vec::new();
    for (name, source) in files("rs") {
        for (at, _) in source.match_indices("tracing::") {
            let line = source[at..].split_once("!(").filter(|(name, _)| !name.contains([' ', '\n']));
            let arguments = line.map(|(_, rest)| within_parentheses(rest)).unwrap_or_default();
            let line = format!("{arguments})");
            if line.contains(")?,") || line.contains(")?)") || line.contains(")?.") {
                broken.push(format!("{name}: {line}"));
            }
        }
    }
    none(&broken);
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

/// The manifest of every crate of this workspace, by the name of its folder.
fn manifests() -> BTreeMap<String, toml::Table> {
    let mut manifests = BTreeMap::new();
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(manifest) = fs::read_to_string(folder.join("Cargo.toml")) else { continue };
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest: toml::Table = manifest.parse().unwrap();
        assert_eq!(manifest["package"]["name"].as_str(), Some(&*format!("pkv-{name}")));
        manifests.insert(name, manifest);
    }
    manifests
}

#[test]
fn a_crate_depends_only_on_layers_above_its_own_in_the_code_map() {
    let layers = layers(&fs::read_to_string(root().join("crates/README.md")).unwrap());
    let mut seen = Vec::new();
    let mut broken = Vec::new();
    let mut arrows = 0;
    for (name, manifest) in manifests() {
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
    assert_eq!(seen, layers.keys().cloned().collect::<Vec<_>>(), "the table names a crate that is not there");
    assert!(arrows > seen.len(), "only {arrows} dependencies were read");
}

/// Crates outside of this workspace that link libtorch.
const LIBTORCH: [&str; 2] = ["tch", "torch-sys"];

/// Begins the line of the code map that lists the crates without libtorch.
const WITHOUT_LIBTORCH: &str = "- Built and tested without libtorch:";

/// The dependencies by which a crate links libtorch when it is built with `features`, and with `tests` when
/// its tests are: the last one is tch's. Empty if it does not link it.
fn way_to_libtorch(
    manifests: &BTreeMap<String, toml::Table>,
    name: &str,
    features: &[String],
    tests: bool,
) -> Vec<String> {
    let strings = |value: Option<&toml::Value>| -> Vec<String> {
        let list = value.and_then(toml::Value::as_array).into_iter().flatten();
        list.map(|v| v.as_str().unwrap().to_owned()).collect()
    };
    let manifest = &manifests[name];
    let enabled: Vec<String> = features.iter().flat_map(|f| strings(manifest["features"].get(f))).collect();
    let mut tables = vec!["dependencies", "build-dependencies"];
    if tests {
        tables.push("dev-dependencies");
    }
    for (dependency, how) in tables.iter().filter_map(|t| manifest.get(*t)?.as_table()).flatten() {
        let optional = how.get("optional").and_then(toml::Value::as_bool) == Some(true);
        if optional && !enabled.contains(&format!("dep:{dependency}")) {
            continue;
        }
        if LIBTORCH.contains(&dependency.as_str()) {
            return vec![dependency.clone()];
        }
        if let Some(own) = dependency.strip_prefix("pkv-") {
            let way = way_to_libtorch(manifests, own, &strings(how.get("features")), false);
            if !way.is_empty() {
                return [vec![dependency.clone()], way].concat();
            }
        }
    }
    Vec::new()
}

#[test]
fn crates_without_tensors_link_no_libtorch() {
    let code_map = fs::read_to_string(root().join("crates/README.md")).unwrap();
    let line = code_map.lines().find(|line| line.starts_with(WITHOUT_LIBTORCH));
    let line = line.unwrap_or_else(|| panic!("the code map has no line `{WITHOUT_LIBTORCH}`"));
    let mut stated: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
    stated.sort_unstable();
    let manifests = manifests();
    let ways = manifests.keys().map(|name| (name, way_to_libtorch(&manifests, name, &[], true)));
    let ways: BTreeMap<_, _> = ways.collect();
    for name in &stated {
        let way = ways.get(&name.to_string()).unwrap_or_else(|| panic!("there is no crate `{name}`"));
        assert!(way.is_empty(), "{name} links libtorch: {name} -> {}", way.join(" -> "));
    }
    let free: Vec<&str> =
        ways.iter().filter(|(_, way)| way.is_empty()).map(|(name, _)| name.as_str()).collect();
    assert_eq!(stated, free, "the code map leaves out a crate that links no libtorch");
    assert_eq!(ways[&"gpu".to_owned()], ["tch"]);
    assert_eq!(ways[&"eval".to_owned()].last().map(String::as_str), Some("tch"));
    let tensors = ["tensors".to_owned()];
    assert_eq!(
        way_to_libtorch(&manifests, "test-support", &tensors, false),
        ["tch"],
        "a feature is followed"
    );
}

/// `cargo deny` is not installed everywhere: what it would refuse of our own crates is seen here.
#[test]
fn the_crates_that_may_use_tch_are_those_that_do() {
    let deny: toml::Table = fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap();
    let entries = deny["bans"]["deny"].as_array().unwrap();
    let entry = entries.iter().find(|entry| entry["crate"].as_str() == Some("tch")).unwrap();
    let wrappers = entry["wrappers"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
    let uses = |manifest: &toml::Table| {
        let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
        tables.iter().any(|t| manifest.get(*t).is_some_and(|t| t.get("tch").is_some()))
    };
    let users = manifests().into_iter().filter(|(_, manifest)| uses(manifest));
    let users: Vec<String> = users.map(|(name, _)| format!("pkv-{name}")).collect();
    assert_eq!(wrappers.collect::<Vec<_>>(), users, "deny.toml, `tch`");
}

#[test]
fn one_version_of_libtorch_is_named() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let setup = read("scripts/setup.sh");
    let version = setup.lines().find_map(|line| line.strip_prefix("readonly TORCH=")).unwrap();
    for name in ["Cargo.toml", "README.md", "scripts/release.sh", "scripts/setup.sh"] {
        let text = read(name);
        let named: Vec<&str> = text.split("libtorch ").filter(|t| t.starts_with(char::is_numeric)).collect();
        assert!(!named.is_empty(), "{name} names no version");
        for after in named {
            assert!(after.starts_with(version), "{name}: `libtorch {:.8}`, setup.sh has {version}", after);
        }
    }
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
