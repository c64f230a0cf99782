//! Mistakes in TOML that a person wrote, with what repairs them: the key that was meant, the form of a value.
//!
//! Goes by the messages of serde, which name a key and what was expected.

use std::path::Path;

use anyhow::Error;
use pkv_core::{Hinted, hinted};
use toml::de::DeTable;

use crate::Override;
use crate::schema::Keys;

/// Similarity, from 0 to 1, from which one name counts as a misspelling of the other.
pub const ALIKE: f64 = 0.8;

/// The error of a file that is no recipe, with its hint under the context `what`.
pub(crate) fn in_file(error: toml::de::Error, what: String) -> Error {
    let hint = hint(error.message(), None);
    Error::from(error).context(hinted(what, hint))
}

/// The error of a recipe's file: a key that another section has is named with that section.
pub(crate) fn in_recipe(error: toml::de::Error, what: String) -> Error {
    let hint = elsewhere(error.message()).unwrap_or_else(|| hint(error.message(), None));
    Error::from(error).context(hinted(what, hint))
}

/// The error of an override, with its hint.
pub(crate) fn in_assignment(error: toml::de::Error, over: &Override) -> Error {
    let (key, value) = over.assignment.split_once('=').unwrap_or((&over.assignment, ""));
    let hint =
        elsewhere(error.message()).unwrap_or_else(|| hint(error.message(), Some((key.trim(), value.trim()))));
    Error::from(error).context(hinted(format!("cannot apply `{}`", over.said), hint))
}

/// `error` under the context `what`, with `hint` unless it has one.
pub(crate) fn or_hint(error: Error, what: String, hint: &str) -> Error {
    let has = error.is::<Hinted>() || error.chain().any(|cause| cause.is::<Hinted>());
    if has { error.context(what) } else { error.context(hinted(what, hint)) }
}

/// Which of `files` sets the key that `error` is about, and on which line.
pub(crate) fn line_of<'a>(
    error: &toml::de::Error,
    files: &'a [(impl AsRef<Path>, String)],
) -> Option<(&'a Path, usize)> {
    let said = error.to_string();
    let mut keys: Vec<&str> = said
        .rsplit_once("\nin `")
        .map(|(_, k)| k.trim_end().trim_end_matches('`').split('.').collect())
        .unwrap_or_default();
    if error.message().starts_with("unknown field") {
        keys.extend(names(error.message()).first());
    }
    files.iter().find_map(|(path, text)| Some((path.as_ref(), line_in(text, &keys)?)))
}

pub(crate) fn line_in(text: &str, keys: &[&str]) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    for (i, name) in keys.iter().enumerate() {
        let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
        if i + 1 == keys.len() {
            return Some(text[..key.span().start].matches('\n').count() + 1);
        }
        table = value.get_ref().as_table()?;
    }
    None
}

/// The repair; `set` is the key and the value of an assignment.
fn hint(message: &str, set: Option<(&str, &str)>) -> String {
    let names = names(message);
    let meant = names.split_first().and_then(|(wrong, known)| closest(wrong, known));
    if message.starts_with("unknown field") {
        let rename = "remove or rename the key; `expected` above lists the keys of that section";
        return meant
            .map_or_else(|| rename.to_owned(), |meant| format!("did you mean `{meant}`? Else {rename}"));
    }
    if message.starts_with("unknown variant") {
        let choose = "write one of the values that `expected` above lists";
        return meant
            .map_or_else(|| choose.to_owned(), |meant| format!("did you mean `{meant}`? Else {choose}"));
    }
    if message.starts_with("missing field `shape`") {
        return "`proxykv-train recipes init --target MODEL` writes a recipe with the shape that is in the model's \
                config.json"
            .to_owned();
    }
    if message.starts_with("missing field") {
        return "add the key to its section".to_owned();
    }
    let expected = message.rsplit_once("expected ").map_or("", |(_, expected)| expected.trim());
    let list = expected.starts_with("a sequence") || expected.contains("array");
    let or_auto = if expected.ends_with(" or `auto`") { ", or `auto`" } else { "" };
    let first = expected.trim_end_matches(" or `auto`");
    let number = ["u8", "u16", "u32", "u64", "usize", "i32", "i64"].contains(&first);
    match set {
        Some((key, value)) if list => {
            format!("a list has brackets, and texts in it have quotes: `--set '{key}={}'`", as_list(value))
        }
        Some((key, value)) if expected == "a string" => {
            format!("a text has quotes: `--set '{key}=\"{value}\"'`")
        }
        Some((key, _)) if number => {
            format!("write a whole number that is not negative: `--set {key}=3`{or_auto}")
        }
        Some((key, _)) if expected.starts_with('f') => format!("write a number: `--set {key}=0.5`"),
        Some((key, _)) if expected == "a boolean" => {
            format!("write `--set {key}=true` or `--set {key}=false`")
        }
        Some((key, _)) => format!("write `--set {key}=VALUE` with a value of the type that is expected"),
        None if list => "a list has brackets, and texts in it have quotes: `key = [\"text\"]`".to_owned(),
        None if !expected.is_empty() && message.starts_with("invalid type") => {
            format!("write {expected} there; `plan --resolved` shows every key with a value of its type")
        }
        None => "mend the line: texts have quotes, lists have brackets, and a key is set once".to_owned(),
    }
}

/// `a, b` as the TOML list of its parts.
fn as_list(value: &str) -> String {
    let inner = value.trim_start_matches('[').trim_end_matches(']');
    let one = |part: &str| {
        let part = part.trim().trim_matches(['"', '\'']);
        let share = part.strip_suffix('%').and_then(|percent| percent.trim().parse::<f64>().ok());
        if let Some(percent) = share {
            return format!("{}", percent / 100.0);
        }
        let plain = part.parse::<f64>().is_ok() || part == "true" || part == "false";
        if plain { part.to_owned() } else { format!("\"{part}\"") }
    };
    format!("[{}]", inner.split(',').map(one).collect::<Vec<_>>().join(", "))
}

/// The names in a message: the wrong one, then those that are known.
fn names(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

/// The hint for an unknown key that is no misspelling of its section's keys, if other sections have one of
/// that name.
fn elsewhere(message: &str) -> Option<String> {
    let names = names(message);
    let (wrong, known) = names.split_first().filter(|_| message.starts_with("unknown field"))?;
    if closest(wrong, known).is_some() {
        return None;
    }
    let keys = Keys::all().keys.iter().filter(|key| !key.section.is_empty() && key.name == *wrong);
    let paths: Vec<&str> = keys.map(|key| key.path.as_str()).collect();
    (!paths.is_empty()).then(|| format!("did you mean `{}`?", paths.join("` or `")))
}

fn closest<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    let alike = |name: &str| strsim::jaro_winkler(wrong, name);
    known.iter().copied().filter(|n| alike(n) > ALIKE).max_by(|a, b| alike(a).total_cmp(&alike(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_that_was_meant_is_named() {
        assert_eq!(closest("stepz", &["lr", "steps", "seed"]), Some("steps"));
        assert_eq!(closest("trian", &["train", "target"]), Some("train"));
        assert_eq!(closest("color", &["lr", "steps", "seed"]), None);
    }

    #[test]
    fn lists_are_shown_as_they_are_written() {
        for (value, expected) in [
            ("mapper", "[\"mapper\"]"),
            ("mapper,kvzip", "[\"mapper\", \"kvzip\"]"),
            ("[mapper, 'kvzip']", "[\"mapper\", \"kvzip\"]"),
            ("0.5", "[0.5]"),
            ("20%,12.5%", "[0.2, 0.125]"),
            ("300,400", "[300, 400]"),
        ] {
            assert_eq!(as_list(value), expected);
        }
    }
}
