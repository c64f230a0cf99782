//! The JSON schema of recipes, for editors, and the list of a recipe's keys that is read off it.
//!
//! Both come from the structs that serde reads and their doc comments. How the list is shown is
//! `reference`'s and `resolved`'s; which methods there are, `pkv_eval` knows and the
//! command adds.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::Recipe;

/// The whole schema (draft 2020-12).
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Recipe).to_value();
    let complete = complete(&schema, &schema);
    strip_required(&mut schema);
    schema["title"] = json!("A recipe of proxykv-train");
    schema["properties"]["base"] = json!({
        "type": "string",
        "description": "Recipe, beside this one, whose keys this one changes. What the base says need not be repeated."
    });
    // A recipe on top of another may leave out anything.
    schema["if"] = json!({"not": {"required": ["base"]}});
    schema["then"] = complete;
    schema
}

/// Keys that a recipe without a base must have, section by section.
fn complete(root: &Value, section: &Value) -> Value {
    let mut rules = Map::new();
    if let Some(required) = section.get("required") {
        rules.insert("required".to_owned(), required.clone());
    }
    let mut inner = Map::new();
    for (name, value) in section["properties"].as_object().into_iter().flatten() {
        let rules = complete(root, follow(root, value));
        if rules.as_object().is_some_and(|r| !r.is_empty()) {
            inner.insert(name.clone(), rules);
        }
    }
    if !inner.is_empty() {
        rules.insert("properties".to_owned(), inner.into());
    }
    rules.into()
}

fn strip_required(root: &mut Value) {
    let strip = |section: &mut Value| {
        if section.get("properties").is_some()
            && let Some(section) = section.as_object_mut()
        {
            section.remove("required");
        }
    };
    strip(root);
    if let Some(defs) = root["$defs"].as_object_mut() {
        // A choice with a value of its own, such as `{ tokens = 4 }`, is no section and keeps what it needs.
        defs.values_mut().for_each(strip);
    }
}

/// The target of a `$ref`.
fn follow<'a>(root: &'a Value, value: &'a Value) -> &'a Value {
    let named = value["$ref"].as_str().and_then(|r| root.pointer(r.strip_prefix('#')?));
    named.unwrap_or(value)
}

/// One key of a recipe.
#[derive(Clone, Debug)]
pub struct Key {
    /// `train.lr`.
    pub path: String,
    /// `train`; empty at the top.
    pub section: String,
    /// `lr`.
    pub name: String,
    /// Accepted values, in words.
    pub kind: String,
    /// As TOML; `None` for a key that must be there, or may be absent.
    pub default: Option<String>,
    pub required: bool,
    pub meaning: String,
    /// Values to choose from, each with its meaning, where the kind is a name.
    pub choices: Vec<(String, String)>,
}

/// A section and what it is for.
#[derive(Clone, Debug)]
pub struct Section {
    pub path: String,
    pub meaning: String,
}

/// Every key, section by section, and the sections themselves.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    pub keys: Vec<Key>,
    pub sections: Vec<Section>,
}

impl Keys {
    /// Those of the schema.
    pub fn all() -> &'static Self {
        static ALL: LazyLock<Keys> = LazyLock::new(|| {
            let root = schemars::schema_for!(Recipe).to_value();
            let mut keys = Keys::default();
            keys.read(&root, &root, "");
            keys
        });
        &ALL
    }

    pub fn get(&self, path: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.path == path)
    }

    fn read(&mut self, root: &Value, section: &Value, path: &str) {
        let required =
            |name: &str| section["required"].as_array().is_some_and(|all| all.iter().any(|key| key == name));
        let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let mut inner = Vec::new();
        for (name, value) in section["properties"].as_object().into_iter().flatten() {
            let of = follow(root, value);
            let said = value["description"].as_str().or(of["description"].as_str()).unwrap_or_default();
            if of["properties"].is_object() {
                inner.push((name, of, said));
                continue;
            }
            self.keys.push(Key {
                path: join(name),
                section: path.to_owned(),
                name: name.clone(),
                kind: kind(root, value),
                default: value.get("default").filter(|v| !v.is_null()).map(in_toml),
                required: required(name),
                meaning: one_line(said),
                choices: choices(root, value),
            });
        }
        for (name, of, said) in inner {
            self.sections.push(Section { path: join(name), meaning: one_line(said) });
            self.read(root, of, &join(name));
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value of a recipe, as it is written there.
pub(crate) fn in_toml(value: &Value) -> String {
    toml::Value::try_from(value).map_or_else(|_| value.to_string(), |value| value.to_string())
}

fn alternatives<'a>(root: &'a Value, value: &'a Value) -> Vec<&'a Value> {
    let of = follow(root, value);
    let several = of.get("anyOf").or_else(|| of.get("oneOf")).and_then(Value::as_array);
    several.map_or_else(|| vec![of], |all| all.iter().map(|one| follow(root, one)).collect())
}

fn kind(root: &Value, value: &Value) -> String {
    let name = |of: &Value| match of["type"].as_str().or_else(|| of["type"][0].as_str()) {
        _ if of.get("const").is_some() => of["const"].as_str().map(|c| format!("`\"{c}\"`")),
        Some("integer") => Some("whole number".to_owned()),
        Some("number") => Some("number".to_owned()),
        Some("boolean") => Some("`true` or `false`".to_owned()),
        Some("array") => Some(match of["prefixItems"].as_array() {
            Some(parts) => {
                let parts: Vec<String> = parts.iter().map(|part| kind(root, part)).collect();
                format!("`[{}]`", parts.join(", "))
            }
            None => format!("list of {}", plural(&kind(root, &of["items"]))),
        }),
        Some("object") => of["properties"]
            .as_object()
            .and_then(|fields| fields.iter().next())
            .map(|(name, value)| format!("`{{ {name} = {} }}`", kind(root, value))),
        Some("string") if of.get("enum").is_some() => Some("a name of those below".to_owned()),
        Some("string") => Some("text".to_owned()),
        _ => None,
    };
    let all: Vec<&Value> = alternatives(root, value).into_iter().filter(|of| of["type"] != "null").collect();
    let names = choices(root, value);
    if names.len() > 3 && follow(root, value)["type"] != "array" {
        return "a name of those below".to_owned();
    }
    let of_choice = |of: &&Value| of.get("enum").and_then(Value::as_array).cloned();
    let mut words: Vec<String> = Vec::new();
    for of in &all {
        // A union may hold another one.
        match of_choice(of) {
            Some(values) => {
                words.extend(values.iter().filter_map(Value::as_str).map(|v| format!("`\"{v}\"`")))
            }
            None if of.get("oneOf").is_some() => words.push(kind(root, of)),
            None => words.extend(name(of)),
        }
    }
    words.join(" or ")
}

fn plural(kind: &str) -> String {
    match kind {
        "whole number" => "whole numbers".to_owned(),
        "number" => "numbers".to_owned(),
        "text" => "texts".to_owned(),
        "a name of those below" => "names of those below".to_owned(),
        other => other.to_owned(),
    }
}

fn choices(root: &Value, value: &Value) -> Vec<(String, String)> {
    let of = follow(root, value);
    if of["type"] == "array" {
        return choices(root, &of["items"]);
    }
    let mut names = Vec::new();
    for one in alternatives(root, value) {
        let said = one_line(one["description"].as_str().unwrap_or_default());
        if let Some(name) = one["const"].as_str().filter(|_| !said.is_empty()) {
            names.push((name.to_owned(), said));
        } else if one.get("oneOf").is_some() {
            names.extend(choices(root, one));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_meaning_and_a_kind() {
        let all = Keys::all();
        assert!(all.keys.len() > 100, "{}", all.keys.len());
        for key in &all.keys {
            assert!(!key.meaning.is_empty(), "`{}` has no doc comment", key.path);
            assert!(!key.kind.is_empty() && !key.kind.ends_with(' '), "`{}` has no kind", key.path);
            assert!(
                !key.choices.iter().any(|c| c.1.is_empty()),
                "a value of `{}` has no doc comment",
                key.path
            );
        }
        for section in &all.sections {
            assert!(!section.meaning.is_empty(), "`{}` has no doc comment", section.path);
        }
    }

    #[test]
    fn a_default_is_the_one_that_a_recipe_gets() {
        let get = |path: &str| Keys::all().get(path).unwrap_or_else(|| panic!("{path}")).clone();
        assert_eq!(get("train.lr").default.as_deref(), Some("0.002"));
        assert_eq!(get("extract.from").default.as_deref(), Some("[\"proxy\"]"));
        assert_eq!(get("train.steps").kind, "whole number or `\"auto\"`");
        assert_eq!(get("data.window_tokens").kind, "list of whole numbers");
        assert_eq!(get("train.lr_cuts").kind, "list of `[whole number, number]`");
        assert!(get("target.model").required && get("train.patience").default.is_none());
        assert_eq!(get("eval.policies").choices.len(), pkv_core::Policy::ALL.len());
    }

    /// serde names the keys that it knows when it meets one that it does not.
    #[test]
    fn the_keys_are_those_that_serde_takes() {
        let shape = json!({"layers": 1, "kv_heads": 1, "query_heads": 1, "head_dim": 1, "hidden": 1, "intermediate": 1, "vocab": 1});
        let model = json!({"model": "", "shape": shape});
        let data = json!({"train": 1, "validation": 1, "test": 1});
        let least = json!({"name": "", "target": model, "proxy": model, "data": data});
        let all = Keys::all();
        let sections = all.sections.iter().map(|s| s.path.as_str()).chain([""]);
        for section in sections {
            let mut changed = least.clone();
            let mut at = &mut changed;
            for part in section.split('.').filter(|part| !part.is_empty()) {
                if at[part].is_null() {
                    at[part] = json!({});
                }
                at = &mut at[part];
            }
            at["no_such_key"] = json!(1);
            let error = serde_json::from_value::<Recipe>(changed).unwrap_err().to_string();
            let known = error.split("expected").nth(1).unwrap_or_else(|| panic!("`{section}`: {error}"));
            for name in known.split('`').skip(1).step_by(2) {
                let path = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
                let is_section = all.sections.iter().any(|s| s.path == path);
                assert!(is_section || all.get(&path).is_some(), "`{path}` is missing");
            }
        }
    }

    #[test]
    fn only_a_recipe_without_a_base_must_be_complete() {
        let schema = schema();
        assert_eq!(schema["then"]["required"], json!(["name", "target", "data"]));
        assert!(schema["then"]["properties"]["target"]["properties"]["shape"]["required"].is_array());
        assert!(schema.get("required").is_none() && schema["properties"]["base"].is_object());
        assert_eq!(schema["additionalProperties"], json!(false));
    }
}
