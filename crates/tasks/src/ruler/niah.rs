//! Needles in a haystack: `scripts/data/synthetic/niah.py`, eight tasks of `scripts/synthetic.yaml`.

use std::rc::Rc;

use pkv_core::Rng;
use rand::Rng as _;

use super::{Draft, RulerTask};
use crate::draw::{sample, shuffle, uuid};
use crate::words::Words;

/// `niah.py`: what surrounds the needles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haystack {
    /// The same five sentences, again and again.
    Noise,
    /// Prose.
    Essay,
    /// Needles that no question asks for.
    Needle,
}

/// `niah.py`: what a key or a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    Words,
    Numbers,
    Uuids,
}

/// A task's arguments in `synthetic.yaml`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    pub haystack: Haystack,
    pub key: Token,
    pub value: Token,
    /// Keys that are hidden, values of each, keys asked for.
    pub keys: usize,
    pub values: usize,
    pub queries: usize,
}

impl Parameters {
    /// `None` of the tasks without needles.
    pub fn of(task: RulerTask) -> Option<Self> {
        use Haystack::{Essay, Needle, Noise};
        use Token::{Numbers, Uuids, Words};
        let (haystack, key, value, keys, values, queries) = match task {
            RulerTask::NiahSingle1 => (Noise, Words, Numbers, 1, 1, 1),
            RulerTask::NiahSingle2 => (Essay, Words, Numbers, 1, 1, 1),
            RulerTask::NiahSingle3 => (Essay, Words, Uuids, 1, 1, 1),
            RulerTask::NiahMultikey1 => (Essay, Words, Numbers, 4, 1, 1),
            RulerTask::NiahMultikey2 => (Needle, Words, Numbers, 1, 1, 1),
            RulerTask::NiahMultikey3 => (Needle, Uuids, Uuids, 1, 1, 1),
            RulerTask::NiahMultivalue => (Essay, Words, Numbers, 1, 4, 1),
            RulerTask::NiahMultiquery => (Essay, Words, Numbers, 1, 1, 4),
            _ => return None,
        };
        // `num_needle_k = max(num_needle_k, num_needle_q)`.
        Some(Self { haystack, key, value, keys: keys.max(queries), values, queries })
    }
}

/// `niah.py`: one piece of noise.
pub const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// `constants.py`, `niah`: `{v}` means `type_needle_v`, `{q}` for `query`.
const INTRODUCTION: &str = "Some special magic {v} are hidden within the following text. Make sure to memorize it. \
                            I will quiz you about the {v} afterwards.\n";
const QUESTION: &str = "\nWhat are all the special magic {v} for {q} mentioned in the provided text?";
const ANSWER_PREFIX: &str = " The special magic {v} for {q} mentioned in the provided text are";
/// `niah.py`: `DEPTHS`, evenly spaced percentages from 0 to 100.
const DEPTHS: usize = 40;

/// The generator of one task.
pub struct Niah {
    p: Parameters,
    /// Words of the essays, single spaces between them.
    essay: Rc<[String]>,
    words: Words,
}

impl Niah {
    pub fn new(p: Parameters, essay: Rc<[String]>, words: Words) -> Self {
        Self { p, essay, words }
    }

    /// Fewest pieces of haystack: needles are put between different ones.
    pub fn least(&self) -> usize {
        self.p.keys * self.p.values
    }

    pub fn draft(&self, size: usize, rng: &mut Rng) -> Draft {
        let p = &self.p;
        let (mut keys, mut values, mut needles) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..p.keys {
            let key = self.token(p.key, rng);
            let of_key: Vec<String> = (0..p.values).map(|_| self.token(p.value, rng)).collect();
            needles.extend(of_key.iter().map(|value| needle(p.value, &key, value)));
            keys.push(key);
            values.push(of_key);
        }
        shuffle(rng, &mut needles);
        let context = match p.haystack {
            Haystack::Essay => self.in_prose(size, needles, rng),
            Haystack::Noise => between(vec![NOISE.to_owned(); size], needles, rng),
            Haystack::Needle => {
                let other =
                    |rng: &mut Rng| needle(p.value, &self.token(p.key, rng), &self.token(p.value, rng));
                let hay = (0..size).map(|_| other(rng)).collect();
                between(hay, needles, rng)
            }
        };
        let asked = sample(rng, p.keys, p.queries);
        let answers = asked.iter().flat_map(|&i| values[i].clone()).collect();
        let query = enumerate(&asked.iter().map(|&i| keys[i].as_str()).collect::<Vec<_>>());
        let fill = |template: &str| {
            let (template, kind) = match p.queries * p.values {
                1 => (singular(template), p.value.plural().trim_end_matches('s')),
                _ => (template.to_owned(), p.value.plural()),
            };
            template.replace("{v}", kind).replace("{q}", &query)
        };
        Draft {
            context: format!("{}{context}", fill(INTRODUCTION)),
            question: fill(QUESTION),
            answer_prefix: fill(ANSWER_PREFIX),
            answers,
        }
    }

    /// The first `size` words of the essays, over again where they end, with needles between sentences.
    fn in_prose(&self, size: usize, needles: Vec<String>, rng: &mut Rng) -> String {
        let words: Vec<&str> = self.essay.iter().cycle().take(size).map(String::as_str).collect();
        let text = words.join(" ");
        // Differs: the reference uses NLTK's trained splitter; `pkv_core` goes by marks, capitals and common
        // abbreviations.
        let sentences: Vec<&str> = pkv_core::sentences(&text).filter(|one| !one.is_empty()).collect();
        let mut at: Vec<usize> = sample(rng, DEPTHS, needles.len())
            .into_iter()
            .map(|i| (sentences.len() as f64 * depth(i) / 100.0) as usize)
            .collect();
        at.sort_unstable();
        let mut parts = Vec::with_capacity(2 * needles.len() + 1);
        let mut from = 0;
        for (needle, at) in needles.iter().zip(at) {
            parts.push(sentences[from..at].join(" "));
            parts.push(needle.clone());
            from = at;
        }
        parts.push(sentences[from..].join(" "));
        parts.join(" ")
    }

    fn token(&self, token: Token, rng: &mut Rng) -> String {
        match token {
            Token::Words => self.words.pair(rng),
            // `generate_random_number`: seven digits.
            Token::Numbers => rng.random_range(1_000_000..=9_999_999).to_string(),
            Token::Uuids => uuid(rng),
        }
    }
}

impl Token {
    const fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }
}

/// Depth number `i` in percent: rounded to the nearest, halves to the even, as NumPy does.
fn depth(i: usize) -> f64 {
    (100.0 * i as f64 / (DEPTHS - 1) as f64).round_ties_even()
}

/// `niah.py`: the needle keeps its plural.
fn needle(value_kind: Token, key: &str, value: &str) -> String {
    format!("One of the special magic {} for {key} is: {value}.", value_kind.plural())
}

/// Needles before different pieces of `hay`, one piece per line.
fn between(mut hay: Vec<String>, needles: Vec<String>, rng: &mut Rng) -> String {
    let mut at = sample(rng, hay.len(), needles.len());
    at.sort_unstable_by(|a, b| b.cmp(a));
    for (at, needle) in at.into_iter().zip(needles) {
        hay.insert(at, needle);
    }
    hay.join("\n")
}

/// `niah.py`: what the template becomes when one value is asked for.
fn singular(template: &str) -> String {
    template.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")
}

/// `a`, or `a, b, and c`.
fn enumerate(items: &[&str]) -> String {
    match items {
        [one] => (*one).to_owned(),
        [rest @ .., last] => format!("{}, and {last}", rest.join(", ")),
        [] => String::new(),
    }
}
