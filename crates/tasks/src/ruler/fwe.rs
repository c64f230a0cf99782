//! Frequent words extraction: `scripts/data/synthetic/freq_words_extraction.py`.

use std::f64::consts::PI;

use anyhow::{Result, ensure};
use pkv_core::{Rng, hinted};

use super::Draft;
use crate::draw::{codes, shuffle};

/// `coded_wordlen`: letters of a word.
const LETTERS: usize = 6;
const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz";
/// `sys_kwext`: tokens per word of the vocabulary.
const TOKENS_PER_WORD: usize = 50;
/// `generate_input_output`: the most frequent word is noise.
const NOISE: &str = "...";
/// `generate_input_output`: words that are asked for.
const ASKED: usize = 3;
/// `synthetic.yaml`: exponent of the zeta distribution, and zeta of it.
const ALPHA: i32 = 2;
const ZETA: f64 = PI * PI / 6.0;
/// `constants.py`, `freq_words_extraction`.
const INTRODUCTION: &str = "Read the following coded text and track the frequency of each coded word. Find the three most \
                            frequently appeared coded words. ";
const QUESTION: &str = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most \
                        frequently appeared words in the above coded text?";
const ANSWER_PREFIX: &str =
    " Answer: According to the coded text above, the three most frequently appeared words are:";

/// The generator; a size is the number of words that the distribution is scaled to.
pub struct Fwe {
    vocabulary: usize,
}

impl Fwe {
    /// `limit`: tokens of the prompt.
    ///
    /// # Errors
    /// The length has no room for a vocabulary.
    pub fn new(limit: usize) -> Result<Self> {
        let vocabulary = limit / TOKENS_PER_WORD;
        ensure!(
            vocabulary > ASKED,
            hinted(
                format!(
                    "`fwe` asks for {ASKED} of a word per {TOKENS_PER_WORD} tokens; {limit} tokens are too few"
                ),
                "raise `eval.benchmark.ruler_tokens`, or leave `fwe` out of `eval.benchmark.ruler_tasks`"
            )
        );
        Ok(Self { vocabulary })
    }

    pub fn draft(&self, size: usize, rng: &mut Rng) -> Draft {
        let words = codes(rng, ALPHABET, LETTERS, self.vocabulary);
        let mut text: Vec<&str> = Vec::new();
        for (rank, word) in words.iter().enumerate() {
            let word = if rank == 0 { NOISE } else { word };
            text.extend(std::iter::repeat_n(word, times(size, rank + 1)));
        }
        shuffle(rng, &mut text);
        Draft {
            context: format!("{INTRODUCTION}{}", text.join(" ")),
            question: QUESTION.to_owned(),
            answer_prefix: ANSWER_PREFIX.to_owned(),
            answers: words[1..=ASKED].to_vec(),
        }
    }
}

/// How often the word of `rank` (from 1) is in a text scaled to `size` words.
pub(super) fn times(size: usize, rank: usize) -> usize {
    (size as f64 * (rank as f64).powi(-ALPHA) / ZETA) as usize
}
