//! The tokens of each repeat request, chunk by chunk.
//!
//! Running the model on them is left to `scorer`.

use std::ops::Range;

use anyhow::Result;
use pkv_recipe::LabelSection;
use pkv_text::TextTokenizer;

/// Asks for the first scoring chunk (KVzip, `model/wrapper.py`).
const FIRST: &str = "\n\nRepeat the previous context exactly.";
/// Asks for a later one, and is followed by the last tokens of the chunk before.
const LATER: &str = "\n\nRepeat the part of the previous context exactly, starting with";
/// Number of tokens of the previous chunk that a later request quotes.
const QUOTED_TOKENS: usize = 8;

/// The request of every scoring chunk, as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requests {
    first: Vec<u32>,
    later: Vec<u32>,
    switch: Vec<u32>,
    chunk_tokens: usize,
}

impl Requests {
    /// Tokenize the requests of a preset. Each text is tokenized on its own, as the published
    /// scorers do, and the ids are concatenated.
    ///
    /// # Errors
    /// The tokenizer fails on the request's text.
    pub fn new(tokenizer: &TextTokenizer, label: &LabelSection) -> Result<Self> {
        let later = match label.preset.preset().space_before_quote {
            true => format!("{LATER} "),
            false => LATER.to_owned(),
        };
        Ok(Self::from_ids(
            tokenizer.encode(FIRST)?,
            tokenizer.encode(&later)?,
            tokenizer.switch().to_vec(),
            label.chunk(),
        ))
    }

    /// Requests that are token ids already; without a tokenizer only how many there are matters.
    ///
    /// `switch` follows every request, and a later one quotes its eight tokens before that.
    pub fn from_ids(first: Vec<u32>, later: Vec<u32>, switch: Vec<u32>, chunk_tokens: usize) -> Self {
        Self { first, later, switch, chunk_tokens: chunk_tokens.max(1) }
    }

    /// Scoring chunks of a context, as ranges of its positions; the last may be shorter.
    pub fn chunks(&self, context_tokens: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.chunk_tokens;
        (0..context_tokens).step_by(size).map(move |start| start..context_tokens.min(start + size))
    }

    /// Tokens fed before those of `chunk` itself: request, quote and turn switch.
    pub fn request_tokens(&self, chunk: &Range<usize>) -> usize {
        let request = if chunk.start == 0 { &self.first } else { &self.later };
        request.len() + self.quote(chunk).len() + self.switch.len()
    }

    /// Context positions before `chunk` that its request quotes: a chunk shorter than the quote is quoted
    /// whole, no further back.
    fn quote(&self, chunk: &Range<usize>) -> Range<usize> {
        chunk.start.saturating_sub(self.chunk_tokens.min(QUOTED_TOKENS))..chunk.start
    }

    /// The tokens fed after the cache to score `chunk`: request, turn switch, the chunk itself.
    ///
    /// # Panics
    /// If `chunk` does not lie in `context`; take it from [`Self::chunks`].
    pub fn ids(&self, context: &[u32], chunk: &Range<usize>) -> Vec<u32> {
        let request: &[u32] = if chunk.start == 0 { &self.first } else { &self.later };
        [request, &context[self.quote(chunk)], &self.switch, &context[chunk.clone()]].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(chunk_tokens: usize) -> Requests {
        Requests::from_ids(vec![100, 101], vec![200], vec![300], chunk_tokens)
    }

    #[test]
    fn chunks_cover_the_context_once() {
        let all = |tokens| requests(4).chunks(tokens).collect::<Vec<_>>();
        assert!(all(0).is_empty());
        assert_eq!(all(2), vec![0..2; 1]);
        assert_eq!(all(8), [0..4, 4..8]);
        assert_eq!(all(9), [0..4, 4..8, 8..9]);
    }

    #[test]
    fn later_requests_quote_the_end_of_the_chunk_before() {
        let context: Vec<u32> = (0..25).collect();
        let r = requests(10);
        assert_eq!(r.ids(&context, &(0..10))[..5], [100, 101, 300, 0, 1]);
        assert_eq!(
            r.ids(&context, &(20..25)),
            [200, 12, 13, 14, 15, 16, 17, 18, 19, 300, 20, 21, 22, 23, 24]
        );
        assert_eq!(requests(3).ids(&context, &(3..6)), [200, 0, 1, 2, 300, 3, 4, 5], "a short chunk, whole");
    }
}
