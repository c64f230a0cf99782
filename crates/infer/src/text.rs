//! Incremental decoding of tokens to text.

use anyhow::Result;
use pkv_text::TextTokenizer;

/// Turns tokens into pieces of text that can be printed one after the other.
///
/// A character may need several tokens, and a token's text may depend on the one before it. So a piece
/// is what a token adds to the text of those since the last break, held back while it ends inside a
/// character.
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    ids: Vec<u32>,
    /// Decoding begins here: far enough back for the context that a token's text depends on.
    from: usize,
    /// The text of the tokens before this one was given out.
    emitted: usize,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), from: 0, emitted: 0 }
    }

    /// The text that `id` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// The tokenizer does not know the id.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let all = self.tokenizer.decode(&self.ids[self.from..])?;
        if all.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.give(all)
    }

    /// The remaining text: an unfinished character, as the tokenizer shows it.
    ///
    /// # Errors
    /// As [`TextStream::push`].
    pub fn finish(&mut self) -> Result<String> {
        let all = self.tokenizer.decode(&self.ids[self.from..])?;
        self.give(all)
    }

    fn give(&mut self, all: String) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.from..self.emitted])?;
        let piece = all.get(before.len()..).unwrap_or_default().to_owned();
        (self.from, self.emitted) = (self.emitted, self.ids.len());
        Ok(piece)
    }

    /// All tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}
