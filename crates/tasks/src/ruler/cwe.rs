//! Common words extraction: `scripts/data/synthetic/common_words_extraction.py`.

use pkv_core::Rng;

use super::Draft;
use crate::draw::{sample, shuffle};
use crate::words::Words;

/// Common words, how often each of them is in the list, and how often every other word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub common: usize,
    pub common_repeats: usize,
    pub other_repeats: usize,
}

/// `synthetic.yaml`: `num_cw`.
const COMMON: usize = 10;
/// `generate_input_output`: below this length lists are shorter.
const SHORT: usize = 4096;
/// `constants.py`, `common_words_extraction`.
const INTRODUCTION: &str = "Below is a numbered list of words. In these words, some appear more often than others. \
                            Memorize the ones that appear most often.\n";
const QUESTION: &str = "\nQuestion: What are the 10 most common words in the above list?";
const ANSWER_PREFIX: &str = " Answer: The top 10 words that appear most often in the list are:";

/// The generator; a size is a number of different words.
pub struct Cwe {
    counts: Counts,
    /// Counts and different words of the solved example at the start.
    example: (Counts, usize),
    words: Vec<String>,
    /// More words, for lists that are longer than [`Words`] has words.
    extra: Vec<String>,
}

impl Cwe {
    pub fn new(tokens: usize, extra: Option<&[String]>) -> Self {
        let counts = |common_repeats, other_repeats| Counts { common: COMMON, common_repeats, other_repeats };
        // `generate_input_output`, and `synthetic.yaml` for `freq_cw` and `freq_ucw`.
        let (counts, example) = match tokens < SHORT {
            true => (counts(6, 1), (counts(3, 1), 20)),
            false => (counts(30, 3), (counts(10, 3), 40)),
        };
        let words = Words::built_in().all.into_iter().map(str::to_owned).collect();
        Self { counts, example, words, extra: extra.unwrap_or_default().to_vec() }
    }

    pub fn least(&self) -> usize {
        COMMON + 1
    }

    pub fn most(&self) -> usize {
        self.words.len().max(self.extra.len())
    }

    pub fn draft(&self, size: usize, rng: &mut Rng) -> Draft {
        let (counts, n) = self.example;
        let (list, common) = self.list(n, counts, rng);
        let solved = format!("{INTRODUCTION}{list}{QUESTION}{ANSWER_PREFIX} {}", numbered(&common));
        let (list, answers) = self.list(size, self.counts, rng);
        Draft {
            context: format!("{solved}\n{INTRODUCTION}{list}"),
            question: QUESTION.to_owned(),
            answer_prefix: ANSWER_PREFIX.to_owned(),
            answers,
        }
    }

    /// `get_example`: a numbered list of `n` different words, and the common ones among them.
    fn list(&self, n: usize, counts: Counts, rng: &mut Rng) -> (String, Vec<String>) {
        let words = if n <= self.words.len() { &self.words } else { &self.extra };
        let drawn: Vec<&String> = sample(rng, words.len(), n).into_iter().map(|i| &words[i]).collect();
        let (common, others) = drawn.split_at(counts.common);
        let mut list: Vec<&String> = Vec::new();
        for (words, repeats) in [(common, counts.common_repeats), (others, counts.other_repeats)] {
            (0..repeats).for_each(|_| list.extend_from_slice(words));
        }
        shuffle(rng, &mut list);
        (numbered(&list), common.iter().map(|w| (*w).clone()).collect())
    }
}

/// `1. word 2. word 3. word`.
fn numbered<T: std::fmt::Display>(words: &[T]) -> String {
    let numbered: Vec<String> = words.iter().enumerate().map(|(i, w)| format!("{}. {w}", i + 1)).collect();
    numbered.join(" ")
}
