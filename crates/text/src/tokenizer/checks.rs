//! Checks of a `tokenizer.json` before it is used: size, format, and rules that give the right ids.
//!
//! The `tokenizers` crate reads the file; refused here is what it would read without limit, misread silently,
//! or panic on.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pkv_core::{Hinted, hinted};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::utils::SysRegex;
use tokenizers::{
    Encoding, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    Tokenizer,
};

/// The largest known files have some 35 MB.
const MAX_BYTES: u64 = 256 << 20;
/// The largest known vocabularies of language models have 262,144 tokens.
const MAX_TOKENS: usize = 1 << 20;
/// Bytes of the longest added or special token; known ones have below 50.
const LONGEST_TOKEN: usize = 4096;
/// Largest growth of a text by a tokenizer's replacements; known ones stay below 10.
const MAX_GROWTH: usize = 64;

/// Tokens of a text. The engine of regular expressions gives up with a panic where a pattern of the tokenizer
/// tries too many ways to read it.
///
/// # Errors
/// It gives up, or the tokenizer fails.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Encoding> {
    pkv_core::refuse_panics(|| tokenizer.encode_fast(text, false))
        .with_context(|| {
            hinted(
                format!("encoding a text of {} bytes", text.len()),
                "a pattern in `tokenizer.json` is too slow for it: use the model's original `tokenizer.json`",
            )
        })?
        .map_err(|e| anyhow!("encoding text: {e}"))
}

/// Read a tokenizer.
///
/// # Errors
/// The file is absent, damaged, too large, of a format that is not known, or has rules that cannot be used.
pub(super) fn open(path: &Path) -> Result<Tokenizer> {
    let reading = |hint: &str| hinted(format!("reading the tokenizer `{}`", path.display()), hint);
    let fetch = "a model folder holds `tokenizer.json`; `proxykv-train fetch` downloads it";
    let bytes = pkv_core::check_regular(path).with_context(|| reading(fetch))?;
    let large = "a language model's tokenizer has fewer; is this the right file?";
    ensure!(
        bytes <= MAX_BYTES,
        hinted(
            format!("the tokenizer `{}` has {bytes} bytes, at most {MAX_BYTES} are read", path.display()),
            large
        )
    );
    let text = fs::read(path).with_context(|| reading(fetch))?;
    pkv_core::check_json(&text, path)?;
    let probe: Probe = serde_json::from_slice(&text).with_context(|| reading(fetch))?;
    let added = probe.added_tokens.unwrap_or_default();
    let tokens = probe.model.vocab.0.max(added.len());
    added.iter().try_for_each(|token| check_length(&token.content, path))?;
    ensure!(
        tokens <= MAX_TOKENS && probe.model.merges.0 <= 4 * MAX_TOKENS,
        hinted(
            format!("the tokenizer `{}` has {tokens} tokens, at most {MAX_TOKENS} are read", path.display()),
            large
        )
    );
    ensure!(
        probe.model.dropout.is_none_or(|share| share == 0.0),
        hinted(
            format!(
                "the tokenizer `{}` leaves out merges at random (`model.dropout`): a text has no certain tokens",
                path.display()
            ),
            "dropout is for training tokenizers: set it to null"
        )
    );
    for (rules, of) in [
        (&probe.normalizer, "normalizer"),
        (&probe.pre_tokenizer, "pre_tokenizer"),
        (&probe.decoder, "decoder"),
    ] {
        let growth =
            growth(rules).with_context(|| format!("the `{of}` of the tokenizer `{}`", path.display()))?;
        ensure!(
            growth <= MAX_GROWTH,
            unusable(format!(
                "the `{of}` of the tokenizer `{}` makes texts up to {growth} times longer",
                path.display()
            ))
        );
    }
    let version = "it is whole, but not in the format of tokenizers 0.22: probably it was written by a newer tokenizers. \
        Load it with transformers beside `pip install 'tokenizers<0.23'` and `save_pretrained` it, or use an older revision";
    // It panics on some rules that do not fit its tokens.
    let mut tokenizer = pkv_core::refuse_panics(|| Tokenizer::from_bytes(text))
        .map_err(anyhow::Error::from)
        .and_then(|read| read.map_err(|e| anyhow!("{e}")))
        .with_context(|| reading(version))?;
    // Some exports keep the limits of the run that wrote them; every text is encoded whole here.
    tokenizer.with_truncation(None).map_err(|e| anyhow!("{e}")).with_context(|| reading(fetch))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// # Errors
/// A token's id is no row of an embedding of `rows`.
pub(super) fn check_ids(tokenizer: &Tokenizer, rows: u64, path: &Path) -> Result<()> {
    let vocab = tokenizer.get_vocab(true);
    let beyond: Vec<_> = vocab.iter().filter(|(_, id)| u64::from(**id) >= rows).collect();
    let Some((token, id)) = beyond.iter().min_by_key(|(_, id)| **id) else { return Ok(()) };
    bail!(hinted(
        format!(
            "the tokenizer of `{}` has {} tokens beyond the embedding: {token:?} is id {id}, `vocab_size` in config.json is {rows}",
            path.display(),
            beyond.len()
        ),
        "the model was not resized for its tokenizer: `model.resize_token_embeddings(len(tokenizer))`, or remove those tokens",
    ))
}

/// What must stand before a text so that its tokens are those that it has within a longer one; `None` for
/// most tokenizers.
///
/// Prompts are made of pieces that are encoded one by one: prefix, context, question, switch. A SentencePiece
/// tokenizer puts a blank before every text, which the pieces have in no prompt; after another character
/// there is none.
///
/// # Errors
/// There is no such character: the tokenizer cuts blanks off the ends of a text, for example.
pub(super) fn lead(tokenizer: &Tokenizer) -> Result<Option<&'static str>> {
    let mut apart = String::new();
    for lead in ["", "\u{1}", "\n", ".", "|"] {
        let skipped = pieces(tokenizer, lead)?;
        let within = |text: &str| -> Result<Option<String>> {
            Ok(pieces(tokenizer, &format!("{lead}{text}"))?.strip_prefix(&skipped).map(str::to_owned))
        };
        let mut fits = true;
        for (a, b) in [("a", "b"), ("a", " b"), ("a ", "b"), ("a\n", "b")] {
            let (whole, rest) = (pieces(tokenizer, &format!("{a}{b}"))?, within(b)?);
            let joined = rest.map(|rest| pieces(tokenizer, a).map(|first| first + &rest)).transpose()?;
            if joined.as_ref() != Some(&whole) {
                apart = format!("{:?} as {whole:?}, but its parts as {joined:?}", format!("{a}{b}"));
                fits = false;
            }
        }
        if fits && (lead.is_empty() || stays_apart(tokenizer, lead)?) {
            return Ok(Some(lead).filter(|lead| !lead.is_empty()));
        }
    }
    Err(unusable(format!(
        "it reads a text as another one than its parts, which prompts are made of: {apart}"
    ))
    .into())
}

/// Whether this character's tokens stay the same whatever follows it.
fn stays_apart(tokenizer: &Tokenizer, lead: &str) -> Result<bool> {
    let ids = |text: &str| encode(tokenizer, text).map(|e| e.get_ids().to_vec());
    let alone = ids(lead)?;
    for text in ["a", " b", "1", "[", "\u{e9}", "\u{4eac}"] {
        let both = ids(&format!("{lead}{text}"))?;
        // Unknown characters may be fused into one token.
        if !both.starts_with(&alone) || both.len() == alone.len() {
            return Ok(false);
        }
    }
    Ok(!alone.is_empty())
}

/// Pieces of text that the tokenizer's model splits into tokens.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Result<String> {
    let failed = |e| anyhow!("reading {text:?} with it: {e}");
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut normalized).map_err(failed)?;
    }
    let mut split = PreTokenizedString::from(normalized);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut split).map_err(failed)?;
    }
    let splits = split.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(splits.into_iter().map(|(text, ..)| text).collect())
}

/// Largest growth of a text by these rules.
///
/// # Errors
/// A rule replaces or splits at nothing, which the `tokenizers` crate has no answer to.
fn growth(rules: &Value) -> Result<usize> {
    let inner =
        ["normalizers", "pretokenizers", "decoders"].iter().filter_map(|key| rules.get(key)?.as_array());
    let mut product = 1usize;
    for rule in inner.flatten() {
        product = product.saturating_mul(growth(rule)?);
    }
    let pattern = rules.get("pattern");
    let literal = pattern.and_then(|p| p.get("String")?.as_str());
    let regex = pattern.and_then(|p| p.get("Regex")?.as_str());
    let empty = match (literal, regex) {
        (Some(text), _) => text.is_empty(),
        // What is no expression is the `tokenizers` crate's to say.
        (_, Some(text)) => SysRegex::new(text).is_ok_and(|regex| regex.find_iter("").next().is_some()),
        _ => false,
    };
    let replaces = rules.get("type").and_then(Value::as_str) == Some("Replace");
    ensure!(
        !(empty && replaces || literal == Some("")),
        unusable(format!(
            "a rule replaces nothing by something: its pattern {} matches the empty text",
            pattern.unwrap_or(&Value::Null)
        ))
    );
    let added = ["content", "prepend"]
        .iter()
        .filter_map(|key| rules.get(key)?.as_str())
        .map(str::len)
        .max()
        .unwrap_or(0);
    Ok(product.saturating_mul(added.div_ceil(literal.map_or(1, str::len)).max(1)))
}

/// Refuse an added or special token that searching texts for takes minutes and more.
///
/// # Errors
/// It is longer than [`LONGEST_TOKEN`].
pub(super) fn check_length(token: &str, file: &Path) -> Result<()> {
    ensure!(
        token.len() <= LONGEST_TOKEN,
        hinted(
            format!(
                "a token in `{}` has {} bytes, at most {LONGEST_TOKEN} are read: `{}...`",
                file.display(),
                token.len(),
                token.chars().take(20).collect::<String>()
            ),
            "special tokens are short, such as `<|im_end|>`; is the file damaged?"
        )
    );
    Ok(())
}

fn unusable(what: impl Into<String>) -> Hinted {
    hinted(
        what,
        "use the model's original `tokenizer.json`; those of Llama 3, Qwen2, Qwen2.5 and Qwen3 can be used",
    )
}

/// The sizes and rules of a `tokenizer.json`, without its words.
#[derive(Deserialize)]
struct Probe {
    #[serde(default)]
    added_tokens: Option<Vec<Added>>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: ProbedModel,
}

#[derive(Deserialize)]
struct Added {
    content: String,
}

#[derive(Deserialize)]
struct ProbedModel {
    #[serde(default)]
    vocab: Count,
    #[serde(default)]
    merges: Count,
    #[serde(default)]
    dropout: Option<f64>,
}

/// Number of entries of a list or object.
#[derive(Default)]
struct Count(usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = usize;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list or an object")
            }

            fn visit_unit<E>(self) -> Result<usize, E> {
                Ok(0)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
                let mut n = 0;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    n += 1;
                }
                Ok(n)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
                let mut n = 0;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    n += 1;
                }
                Ok(n)
            }
        }
        deserializer.deserialize_any(Entries).map(Self)
    }
}
