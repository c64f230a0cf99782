//! Text to token ids and back, and the fixed tokens around a user's text.
//!
//! `tokenizer.json` is the reference `tokenizers` crate's matter, whether it can be used `checks`', where a
//! long text is cut `pieces`', and the tokens that other files add `special`'s; this module adds what labels
//! depend on: prefix, switch, stop tokens, and hashes that tell whether two models share a vocabulary.

mod checks;
mod pieces;
mod special;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use pkv_core::{hinted, sha256_hex};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::template::Frame;
use pieces::PIECE;
pub(crate) use special::SpecialTokens;
use special::optional_json;

/// A model's tokenizer with its chat template.
///
/// ```
/// use std::path::Path;
///
/// use pkv_text::TextTokenizer;
///
/// let tokenizer = TextTokenizer::open(Path::new("../../recipes/nano-llama/target"))?;
/// let ids = tokenizer.encode("The king said that he is going.")?;
/// assert_eq!(tokenizer.decode(&ids)?, "The king said that he is going.");
/// let prompt = [tokenizer.prefix(), &ids, tokenizer.switch()].concat();
/// assert!(tokenizer.decode(&prompt)?.ends_with("assistant<|end_header_id|>\n\n"));
/// # Ok::<(), anyhow::Error>(())
/// ```
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Text put before each text while it is encoded, and its tokens.
    lead: Option<(&'static str, Vec<u32>)>,
    prefix: Vec<u32>,
    switch: Vec<u32>,
    turn: Option<Vec<u32>>,
    stop: Vec<u32>,
    template_hash: String,
    vocab_hash: String,
}

impl TextTokenizer {
    /// Open the tokenizer of a model folder: `tokenizer.json`, and where they are there the files that add
    /// tokens and chat templates (as transformers reads them), `config.json` and `generation_config.json`.
    ///
    /// # Errors
    /// A file is missing or damaged, the tokenizer or the chat template cannot be used, or a token has no row
    /// in the embedding.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut tokenizer = checks::open(&folder.join("tokenizer.json"))?;
        let special = SpecialTokens::read(folder)?;
        ensure!(
            special.config().get("split_special_tokens") != Some(&Value::Bool(true)),
            hinted(
                format!(
                    "`split_special_tokens` in the tokenizer_config.json of `{}` is not supported",
                    folder.display()
                ),
                "remove it; `data.special_tokens = \"text\"` and `infer --special-tokens-as-text` read special tokens of \
                 documents as text, and those of the chat template as tokens"
            )
        );
        special.add_to(&mut tokenizer);
        let model = optional_json(&folder.join("config.json"))?;
        if let Some(rows) = model.get("vocab_size").and_then(Value::as_u64) {
            checks::check_ids(&tokenizer, rows, folder)?;
        }
        let frame = Frame::of_folder(folder, &special)?;
        let lead = checks::lead(&tokenizer)
            .with_context(|| format!("the tokenizer `{}`", folder.join("tokenizer.json").display()))?;
        let mut opened = Self {
            lead: None,
            vocab_hash: vocab_hash(&tokenizer),
            template_hash: sha256_hex(format!("{}\u{1}{}", frame.prefix, frame.switch).as_bytes()),
            tokenizer,
            prefix: Vec::new(),
            switch: Vec::new(),
            turn: None,
            stop: Vec::new(),
        };
        // The prefix begins the prompt; all other texts continue it.
        opened.prefix = opened.encode(&frame.prefix)?;
        opened.lead = lead.map(|lead| opened.encode(lead).map(|ids| (lead, ids))).transpose()?;
        opened.switch = opened.encode(&frame.switch)?;
        opened.turn = frame.turn.map(|turn| opened.encode(&turn)).transpose()?;
        opened.stop = opened.find_stop_tokens(folder, &special)?;
        Ok(opened)
    }

    /// Token ids of `text` as it is, within a prompt: nothing is put before or after it. Special tokens that
    /// the text spells out are recognized.
    ///
    /// Memory does not grow with the text, unless it can be cut nowhere, as one word of a megabyte.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() <= 2 * PIECE {
            return self.encode_whole(text);
        }
        let pieces = pieces::pieces(text, PIECE, |part| self.encode_whole(part))?;
        let mut ids = Vec::new();
        for piece in pieces {
            ids.extend(self.encode_whole(&text[piece])?);
        }
        Ok(ids)
    }

    fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        let (lead, skipped) = self.lead.as_ref().map_or(("", &[][..]), |(lead, ids)| (lead, ids));
        let text = if lead.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(format!("{lead}{text}")) };
        let encoding = checks::encode(&self.tokenizer, &text)?;
        let ids = encoding.get_ids().strip_prefix(skipped);
        Ok(ids.context("encoding text: its first token depends on what precedes it")?.to_vec())
    }

    /// From now on, special tokens that a text spells out are encoded as text. Prefix, switch and turn keep
    /// theirs.
    pub fn read_special_tokens_as_text(&mut self) {
        self.tokenizer.set_encode_special_tokens(true);
    }

    /// The special tokens among `ids`, each once, as a text spells them.
    pub fn special_tokens_in(&self, ids: &[u32]) -> BTreeSet<String> {
        let added = self.tokenizer.get_added_tokens_decoder();
        let special = ids.iter().filter_map(|id| added.get(id)).filter(|token| token.special);
        special.map(|token| token.content.clone()).collect()
    }

    /// Text of `ids`, special tokens spelt out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(|e| anyhow!("decoding {} tokens: {e}", ids.len()))
    }

    /// Tokens of the chat template before the user's text, or the bos token without a template; never
    /// evicted.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Tokens between the user's text and the model's answer.
    pub fn switch(&self) -> &[u32] {
        &self.switch
    }

    /// Tokens between the model's answer and the user's next text; `None` if the chat template takes no
    /// conversation.
    pub fn turn(&self) -> Option<&[u32]> {
        self.turn.as_deref()
    }

    /// SHA-256 of the rendered template: texts of prefix and switch.
    pub fn template_hash(&self) -> String {
        self.template_hash.clone()
    }

    /// Tokens that end an answer, ascending.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// SHA-256 of all tokens with their ids, added tokens included.
    pub fn vocab_hash(&self) -> String {
        self.vocab_hash.clone()
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Whether both map the same texts to the same ids: a proxy must read the target's tokens.
    ///
    /// # Errors
    /// The vocabularies differ; the error says in how many tokens, and names the first.
    pub fn same_vocab(&self, other: &Self) -> Result<()> {
        if self.vocab_hash == other.vocab_hash {
            return Ok(());
        }
        let (ours, theirs) = (sorted_vocab(&self.tokenizer), sorted_vocab(&other.tokenizer));
        let only_ours: Vec<_> = ours.difference(&theirs).collect();
        let only_theirs: Vec<_> = theirs.difference(&ours).collect();
        let example = only_ours.first().or(only_theirs.first());
        let (id, token) = example.context("vocabularies that hash differently differ in a token")?;
        Err(hinted(
            format!(
                "the vocabularies differ: {} tokens against {}, {} only in the first and {} only in the second, \
                 for example {token:?} as id {id}",
                ours.len(),
                theirs.len(),
                only_ours.len(),
                only_theirs.len(),
            ),
            "target and proxy must be of one family and share their tokenizer",
        )
        .into())
    }

    /// End tokens of the configurations, and the token by which the chat template ends a turn.
    fn find_stop_tokens(&self, folder: &Path, named: &SpecialTokens) -> Result<Vec<u32>> {
        let mut stop = BTreeSet::new();
        for name in ["config.json", "generation_config.json"] {
            let json = optional_json(&folder.join(name))?;
            let ids = json.get("eos_token_id").map(token_ids).transpose();
            let read = || {
                hinted(
                    format!("reading `{}`", folder.join(name).display()),
                    "write the id of the end token there, as a number or as a list of numbers",
                )
            };
            stop.extend(ids.with_context(read)?.unwrap_or_default());
        }
        for key in ["eos_token", "eot_token"] {
            stop.extend(named.text(key).and_then(|text| self.tokenizer.token_to_id(text)));
        }
        // A user's turn and the model's end alike: `<|eot_id|>`, `<|im_end|>`.
        let special = self.tokenizer.get_added_tokens_decoder();
        let turn_end = self.switch.first().filter(|id| special.get(id).is_some_and(|token| token.special));
        stop.extend(turn_end);
        Ok(stop.into_iter().collect())
    }
}

/// `eos_token_id` is one number or a list of them; -1 is no token.
///
/// # Errors
/// It is something else.
fn token_ids(value: &Value) -> Result<Vec<u32>> {
    let items = match value {
        Value::Null => &[],
        Value::Array(items) => items.as_slice(),
        single => std::slice::from_ref(single),
    };
    let ids = items.iter().map(|id| {
        id.as_i64()
            .with_context(|| format!("`eos_token_id` is {value}; expected a token id, or a list of them"))
    });
    let ids: Vec<i64> = ids.collect::<Result<_>>()?;
    Ok(ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect())
}

fn sorted_vocab(tokenizer: &Tokenizer) -> BTreeSet<(u32, String)> {
    tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect()
}

fn vocab_hash(tokenizer: &Tokenizer) -> String {
    // JSON quotes whatever a token may contain, so no two vocabularies are written alike.
    let text = serde_json::to_vec(&sorted_vocab(tokenizer)).expect("numbers and strings can be written");
    sha256_hex(&text)
}
