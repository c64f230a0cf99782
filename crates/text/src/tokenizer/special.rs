//! Tokens that a model folder names outside `tokenizer.json`: special tokens by their names, and tokens to
//! add.
//!
//! The order of files and the rules are those of `PreTrainedTokenizerBase._from_pretrained` and
//! `TokenizersBackend.__init__` (transformers 5.24); goldens of it are in `tests/goldens/tokenizers`. Their
//! meaning in a chat template is left to `template`.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::checks::check_length;

/// The names that transformers knows, in the order in which it adds their tokens.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens of a model folder.
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    config: Value,
    /// In transformers' order: the known names, then a model's own.
    named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// By the id that the file states, and the file.
    stated: BTreeMap<u32, AddedToken>,
    stated_in: PathBuf,
}

impl SpecialTokens {
    /// Read `tokenizer_config.json`; only where that has no `added_tokens_decoder`, also
    /// `special_tokens_map.json`, whose tokens win, and `added_tokens.json`.
    ///
    /// # Errors
    /// A file cannot be read or parsed, or a token in it is malformed.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer_config.json");
        let config = optional_json(&path)?;
        let mut keys = config.as_object().cloned().unwrap_or_default();
        let mut found = Self::default();
        let decoder = keys.remove("added_tokens_decoder").filter(|decoder| !decoder.is_null());
        if decoder.is_none() {
            let map = optional_json(&folder.join("special_tokens_map.json"))?;
            keys.extend(map.as_object().cloned().unwrap_or_default());
        }
        found.name_tokens(&keys);
        if let Some(decoder) = decoder {
            let malformed =
                || malformed("added_tokens_decoder", &path, "ids with an object that has `content`");
            for (id, token) in decoder.as_object().with_context(malformed)? {
                let token = of_json(token, false).with_context(malformed)?;
                found.stated.insert(id.parse().with_context(malformed)?, token);
            }
            found.stated_in = path;
        } else {
            let path = folder.join("added_tokens.json");
            let added = optional_json(&path)?;
            let malformed = || malformed("tokens", &path, "tokens with their ids");
            let special: HashSet<String> = found.all().map(|token| token.content.clone()).collect();
            for (text, id) in added.as_object().into_iter().flatten() {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).with_context(malformed)?;
                found.stated.insert(id, AddedToken::from(text.clone(), special.contains(text)));
            }
            found.stated_in = path;
        }
        let names: HashSet<&String> = found.named.iter().map(|(_, token)| &token.content).collect();
        for token in found.stated.values_mut() {
            token.special |= names.contains(&token.content);
        }
        found.all().chain(found.stated.values()).try_for_each(|t| check_length(&t.content, folder))?;
        found.config = config;
        Ok(found)
    }

    /// `tokenizer_config.json` as it is, `null` if there is none.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The text of a special token, such as `bos_token`.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(n, _)| n == name).map(|(_, token)| token.content.as_str())
    }

    /// All that have a name, by it.
    pub fn texts(&self) -> impl Iterator<Item = (String, String)> {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.clone()))
    }

    /// Add to the tokenizer what its own file lacks. A token that is in its vocabulary keeps its id and is
    /// recognized in texts from now on; another gets the next id. Where a file states a different id, that is
    /// logged, because transformers gives the same one without a word.
    pub fn add_to(&self, tokenizer: &mut Tokenizer) {
        let known: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
        let mut texts: HashSet<String> = known.iter().map(|token| token.content.clone()).collect();
        let mut new: Vec<AddedToken> =
            self.stated.values().filter(|token| !known.contains(token)).cloned().collect();
        texts.extend(new.iter().map(|token| token.content.clone()));
        for token in self.all() {
            if texts.insert(token.content.clone()) {
                new.push(token.clone());
            }
        }
        let before = tokenizer.get_vocab_size(true);
        tokenizer.add_tokens(&new);
        let added = tokenizer.get_vocab_size(true) - before;
        if added > 0 {
            tracing::info!(file = %self.stated_in.display(), "{added} tokens that tokenizer.json lacks were added");
        }
        for (stated, token) in &self.stated {
            let found = tokenizer.token_to_id(&token.content);
            if found != Some(*stated) {
                tracing::warn!(
                    file = %self.stated_in.display(),
                    "token {:?} is said to be id {stated}; with tokenizer.json it is {found:?}, as in transformers",
                    token.content
                );
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &AddedToken> {
        self.named.iter().map(|(_, token)| token).chain(&self.extra)
    }

    fn name_tokens(&mut self, keys: &Map<String, Value>) {
        let own = keys.keys().filter(|key| key.ends_with("_token") && !NAMES.contains(&key.as_str()));
        let names = NAMES.iter().map(|name| (*name).to_owned()).chain(own.cloned());
        self.named =
            names.filter_map(|name| Some((of_json(keys.get(&name)?, true)?, name))).map(swap).collect();
        // Older files call the tokens without a name `additional_special_tokens`.
        let given = |key: &str| {
            keys.get(key).filter(|v| v.as_array().is_some_and(|list| !list.is_empty()) || v.is_object())
        };
        match given("extra_special_tokens").or_else(|| given("additional_special_tokens")) {
            Some(Value::Array(list)) => {
                self.extra = list.iter().filter_map(|token| of_json(token, true)).collect()
            }
            Some(Value::Object(named)) => {
                let tokens =
                    named.iter().filter_map(|(name, token)| Some((name.clone(), of_json(token, true)?)));
                self.named.extend(tokens);
            }
            _ => {}
        }
    }

    /// For tests: special tokens of these names and texts.
    #[cfg(test)]
    pub fn of_texts(texts: &[(&str, &str)]) -> Self {
        let named = texts.iter().map(|(name, text)| ((*name).to_owned(), AddedToken::from(*text, true)));
        Self { named: named.collect(), ..Self::default() }
    }
}

fn swap<A, B>((a, b): (A, B)) -> (B, A) {
    (b, a)
}

/// A token is written as text or as an object that holds it.
fn of_json(value: &Value, special: bool) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, special));
    }
    let text = value.get("content")?.as_str()?;
    let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", special);
    Some(AddedToken {
        content: text.to_owned(),
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", !special),
        special,
    })
}

fn malformed(what: &str, path: &Path, expected: &str) -> pkv_core::Hinted {
    hinted(
        format!("the {what} of `{}` are malformed: expected {expected}", path.display()),
        "load the tokenizer with transformers and `save_pretrained` it again",
    )
}

/// A JSON object in a file that need not be there: `null` then.
///
/// # Errors
/// The file cannot be read, or holds something else.
pub(super) fn optional_json(path: &Path) -> Result<Value> {
    if pkv_core::look_for(path)?.is_none() {
        return Ok(Value::Null);
    }
    let hint =
        "it must be plain JSON, an object: no comments, no byte order mark, no `NaN`; or copy the file again";
    let reading = || hinted(format!("reading `{}`", path.display()), hint);
    let text = pkv_core::read_small(path).with_context(reading)?;
    pkv_core::check_json(&text, path)?;
    let json: Value = serde_json::from_slice(&text)
        .with_context(|| hinted(format!("parsing `{}`", path.display()), hint))?;
    ensure!(
        json.is_object(),
        hinted(
            format!("`{}` holds {}, expected an object", path.display(), pkv_core::json_kind(&json)),
            hint
        )
    );
    Ok(json)
}
