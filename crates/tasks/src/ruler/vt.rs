//! Variable tracking: `scripts/data/synthetic/variable_tracking.py`.

use anyhow::Result;
use pkv_core::Rng;
use rand::Rng as _;

use super::niah::NOISE;
use super::{CountTokens, Draft};
use crate::draw::{codes, sample};
use crate::fit::largest;

/// `synthetic.yaml`: one chain of four hops.
const HOPS: usize = 4;
/// `generate_chains`: letters of a variable, and of one in the solved example.
const LETTERS: usize = 5;
const EXAMPLE_LETTERS: usize = 3;
const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// `main`: length of the solved example at the start, in tokens.
const EXAMPLE_TOKENS: usize = 500;
/// `generate_chains`: value of the solved example, replaced afterwards.
const EXAMPLE_VALUE: &str = "12345";
/// `constants.py`, `variable_tracking`: `{q}` means `query`, `{n}` for `num_v`.
const INTRODUCTION: &str =
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
const QUESTION: &str = "\nQuestion: Find all variables that are assigned the value {q} in the text above.";
const ANSWER_PREFIX: &str = " Answer: According to the chain(s) of variable assignment in the text above, {n} variables \
                             are assigned the value {q}, they are: ";

/// The generator; its solved example is made once and drawn anew in every prompt.
#[derive(Default)]
pub struct Vt {
    example: String,
    /// The part of the example that changes between prompts: its variables.
    example_variables: Vec<String>,
}

impl Vt {
    /// Make the solved example, as long as fits [`EXAMPLE_TOKENS`].
    ///
    /// # Errors
    /// A text cannot be counted.
    pub fn make_example(&mut self, count: &CountTokens, rng: &mut Rng) -> Result<()> {
        let mut variables = codes(rng, ALPHABET, EXAMPLE_LETTERS, HOPS + 1);
        // They are found again by their names.
        while variables.iter().any(|v| v == "VAR") {
            variables = codes(rng, ALPHABET, EXAMPLE_LETTERS, HOPS + 1);
        }
        let positions = rng.clone();
        let text = |size: usize| {
            let context = in_noise(size, EXAMPLE_VALUE, &variables, &mut positions.clone());
            let (question, prefix) = question(EXAMPLE_VALUE);
            format!("{INTRODUCTION}{context}{question}{prefix}")
        };
        count(&text(self.least()))?;
        let size =
            largest(self.least(), EXAMPLE_TOKENS, EXAMPLE_TOKENS, |n| count(&text(n)).unwrap_or(usize::MAX));
        // A tokenizer so fine that the least noise takes more gets the least noise, as in the reference.
        let text = text(size.unwrap_or(self.least()));
        self.example = format!("{text} {}\n", variables.join(" "));
        self.example_variables = variables;
        Ok(())
    }

    /// Fewest pieces of noise: assignments are put before different ones.
    pub fn least(&self) -> usize {
        HOPS + 1
    }

    pub fn draft(&self, size: usize, rng: &mut Rng) -> Draft {
        let variables = codes(rng, ALPHABET, LETTERS, HOPS + 1);
        let value = rng.random_range(10_000..99_999).to_string();
        let context = in_noise(size, &value, &variables, rng);
        let (question, answer_prefix) = question(&value);
        let example = self.solved(rng);
        Draft {
            context: format!("{example}\n{INTRODUCTION}{context}"),
            question,
            answer_prefix,
            answers: variables,
        }
    }

    /// `randomize_icl`: the example with other variables and another value.
    fn solved(&self, rng: &mut Rng) -> String {
        let mut text = self.example.clone();
        let others = codes(rng, ALPHABET, EXAMPLE_LETTERS, HOPS + 1);
        // A letter of an own alphabet in between, so that a new name is not taken for an old one.
        for (i, old) in self.example_variables.iter().enumerate() {
            text = text.replace(old.as_str(), &format!("\u{1}{i}\u{1}"));
        }
        for (i, new) in others.iter().enumerate() {
            text = text.replace(&format!("\u{1}{i}\u{1}"), new);
        }
        text.replace(EXAMPLE_VALUE, &rng.random_range(10_000..99_999).to_string())
    }
}

/// The chain in order, each assignment before another piece of noise, one piece per line.
fn in_noise(size: usize, value: &str, variables: &[String], rng: &mut Rng) -> String {
    let mut lines = vec![NOISE.to_owned(); size];
    let mut at = sample(rng, size, variables.len());
    at.sort_unstable();
    for (i, at) in at.into_iter().enumerate() {
        let line = match i {
            0 => format!("VAR {} = {value}", variables[0]),
            // `generate_chains` leaves a space at the end.
            _ => format!("VAR {} = VAR {} ", variables[i], variables[i - 1]),
        };
        lines.insert(at + i, line);
    }
    lines.join("\n")
}

fn question(value: &str) -> (String, String) {
    let fill = |text: &str| text.replace("{q}", value).replace("{n}", &(HOPS + 1).to_string());
    (fill(QUESTION), fill(ANSWER_PREFIX))
}
