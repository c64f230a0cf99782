//! The files that a chat template may come from, in the order in which transformers takes them.
//!
//! Rendering is left to `jinja`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;
use serde_json::Value;

/// A chat template and where it was found.
pub(super) struct Source {
    pub text: String,
    /// For errors: "`chat_template.jinja`".
    pub name: String,
}

/// The template of a model folder; `None` for a base model.
///
/// The order is that of `PreTrainedTokenizerBase.from_pretrained` (transformers 5.24): `chat_template.jinja`
/// and the named ones of `additional_chat_templates/` replace what `tokenizer_config.json` says.
/// `chat_template.json` is what processors read; it counts where there is no other.
///
/// # Errors
/// A file cannot be read, or there are several templates and none is called `default`.
pub(super) fn find(folder: &Path, tokenizer_config: &Value) -> Result<Option<Source>> {
    let files = files(folder)?;
    if !files.is_empty() {
        return choose(files, &format!("the templates of `{}`", folder.display())).map(Some);
    }
    let name = "`chat_template` of `tokenizer_config.json`";
    if let Some(found) = of_json(tokenizer_config.get("chat_template"), name)? {
        return Ok(Some(found));
    }
    let path = folder.join("chat_template.json");
    if pkv_core::look_for(&path)?.is_none() {
        return Ok(None);
    }
    let text = pkv_core::read_small_text(&path).with_context(|| format!("reading `{}`", path.display()))?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("parsing `{}`", path.display()))?;
    of_json(json.get("chat_template"), "`chat_template.json`")
}

/// Templates in files of their own by their names; `chat_template.jinja` is the default.
fn files(folder: &Path) -> Result<BTreeMap<String, Source>> {
    let mut found = BTreeMap::new();
    let mut read = |name: &str, path: &Path| -> Result<()> {
        let text =
            pkv_core::read_small_text(path).with_context(|| format!("reading `{}`", path.display()))?;
        let file = path.strip_prefix(folder).unwrap_or(path).display().to_string();
        found.insert(name.to_owned(), Source { text, name: format!("`{file}`") });
        Ok(())
    };
    let default = folder.join("chat_template.jinja");
    if pkv_core::look_for(&default)?.is_some() {
        read("default", &default)?;
    }
    let more = folder.join("additional_chat_templates");
    if pkv_core::look_for(&more)?.is_some_and(|found| found.is_dir()) {
        for entry in fs::read_dir(&more).with_context(|| format!("listing `{}`", more.display()))? {
            let path = entry?.path();
            if let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".jinja")) {
                read(name, &path)?;
            }
        }
    }
    Ok(found)
}

/// A template, a list of named ones, or an object of them.
fn of_json(value: Option<&Value>, place: &str) -> Result<Option<Source>> {
    let source = |text: &str| Source { text: text.to_owned(), name: place.to_owned() };
    let malformed = || {
        hinted(
            format!("{place} is neither a template nor a list of named templates"),
            "a list holds objects with `name` and `template`; one of them is called `default`",
        )
    };
    let named: BTreeMap<String, Source> = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(source(text))),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| {
                Some((item.get("name")?.as_str()?.to_owned(), source(item.get("template")?.as_str()?)))
            })
            .collect::<Option<_>>()
            .with_context(malformed)?,
        Some(Value::Object(items)) => items
            .iter()
            .map(|(name, text)| Some((name.clone(), source(text.as_str()?))))
            .collect::<Option<_>>()
            .with_context(malformed)?,
        Some(_) => return Err(malformed().into()),
    };
    choose(named, place).map(Some)
}

/// The default of several templates; transformers refuses to choose where there is none.
fn choose(mut named: BTreeMap<String, Source>, place: &str) -> Result<Source> {
    let default = named.remove("default");
    default.with_context(|| {
        let names: Vec<String> = named.keys().map(|name| format!("`{name}`")).collect();
        hinted(
            format!("none of the chat templates is called `default`: {place} has {}", names.join(", ")),
            "copy the one that is meant into `chat_template.jinja` in the model's folder; it takes precedence",
        )
    })
}
