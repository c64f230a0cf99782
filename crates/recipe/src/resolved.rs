//! A resolved recipe as TOML to read: every key with its meaning above it and, at the end of the line, where
//! it was set.

use std::fmt::Write;

use serde_json::Value;

use crate::schema::{Keys, in_toml};
use crate::{Origin, Origins, Recipe};

/// Widest line of a comment.
const WIDTH: usize = 100;

impl Recipe {
    /// TOML that `load` reads back to the same recipe.
    ///
    /// # Panics
    /// Never for a recipe that `load` returned.
    pub fn explained(&self, origins: &Origins) -> String {
        let all = Keys::all();
        let values = serde_json::to_value(self).expect("a recipe can be written as JSON");
        let mut out = format!(
            "# The recipe `{}` with every key. After each value: where it was set. A key without a value (`# key =`) is absent.\n\n",
            self.name
        );
        let mut section = "";
        for key in all.keys.iter().filter(|key| is_there(&values, &key.section)) {
            if key.section != section {
                section = &key.section;
                let of = all.sections.iter().find(|s| s.path == *section);
                out.push('\n');
                comment(&mut out, of.map_or("", |s| s.meaning.as_str()));
                let _ = writeln!(out, "[{section}]");
            }
            comment(&mut out, &key.meaning);
            let value = values.pointer(&format!("/{}", key.path.replace('.', "/"))).filter(|v| !v.is_null());
            let value = value.map(in_toml).or_else(|| key.default.clone());
            let _ = match value {
                Some(value) => writeln!(out, "{} = {value}  # {}", key.name, origins.of(&key.path)),
                None => writeln!(out, "# {} =", key.name),
            };
        }
        out
    }

    /// Every key's value and where it was set.
    ///
    /// # Panics
    /// Never for a recipe that `load` returned.
    pub fn explained_json(&self, origins: &Origins) -> Value {
        let values = serde_json::to_value(self).expect("a recipe can be written as JSON");
        let there = Keys::all().keys.iter().filter(|key| is_there(&values, &key.section));
        let places = there.map(|key| {
            let place = origins.of(&key.path);
            let file = match &place {
                Origin::Line(path, line) => {
                    serde_json::json!({"file": path.display().to_string(), "line": line})
                }
                other => other.to_string().into(),
            };
            (key.path.clone(), file)
        });
        serde_json::json!({"recipe": values, "origins": places.collect::<serde_json::Map<_, _>>()})
    }
}

/// Whether a recipe has a section: `[proxy]` may be absent, and its defaults with it.
fn is_there(recipe: &Value, section: &str) -> bool {
    section.split('.').next().is_none_or(|top| top.is_empty() || recipe.get(top).is_some())
}

/// `text` as comment lines, its first sentence only: the reference has the rest.
fn comment(out: &mut String, text: &str) {
    let end = text.find(". ").map_or(text.len(), |at| at + 1);
    let mut line = String::from("#");
    for word in text[..end].split_whitespace() {
        if line.len() + word.len() >= WIDTH {
            let _ = writeln!(out, "{line}");
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    if line.len() > 1 {
        let _ = writeln!(out, "{line}");
    }
}
