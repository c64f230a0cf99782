//! Planted facts: sentences that a question can be asked about, put into documents.
//!
//! Six templates over word lists, as the small models of this project were trained on; any
//! instruction-tuned model understands them. Examples get them so that labels show what a target
//! keeps of them, evaluation asks for them.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{Rng, hinted};
use pkv_shard::PlantedFact;
use rand::Rng as _;
use serde::Deserialize;

/// Words from which facts are made.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct WordLists {
    /// Adjectives: every fact is about an adjective and a noun.
    pub adj: Vec<String>,
    /// Nouns.
    pub noun: Vec<String>,
    /// Answers to where something was built.
    pub city: Vec<String>,
    /// First names of owners.
    pub name: Vec<String>,
}

/// A sentence, what is asked about it, and the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    pub sentence: String,
    pub question: String,
    pub answer: String,
}

/// A fact with the tokens of its sentence and of the white space around it.
pub struct TokenizedFact {
    pub fact: Fact,
    pub tokens: Vec<u32>,
}

/// Sentence and question with `{a}` adjective, `{n}` noun, `{v}` value; and the kind of value.
const TEMPLATES: [(&str, &str, Value); 6] = [
    ("The access code for the {a} {n} is {v}.", "What is the access code for the {a} {n}?", Value::Number),
    (
        "One of the special magic numbers for {a}-{n} is: {v}.",
        "What is the special magic number for {a}-{n} mentioned in the provided text?",
        Value::Number,
    ),
    ("The {a} {n} was built in the city of {v}.", "In which city was the {a} {n} built?", Value::City),
    ("The owner of the {a} {n} is {v}.", "Who is the owner of the {a} {n}?", Value::Name),
    ("Remember that the {a} {n} opens at {v}.", "When does the {a} {n} open?", Value::Time),
    ("The secret word of the {a} {n} is {v}.", "What is the secret word of the {a} {n}?", Value::Word),
];

/// Names of the kinds of facts, in the order of [`TEMPLATES`], each with words of its question alone.
const KINDS: [(&str, &str); 6] = [
    ("access code", "the access code for"),
    ("magic number", "special magic number"),
    ("city", "In which city"),
    ("owner", "Who is the owner"),
    ("opening time", "When does"),
    ("secret word", "the secret word"),
];

/// Kind of the fact that `question` asks for; `None` if it is not one of this module's.
///
/// ```
/// assert_eq!(pkv_data::fact_kind("Who is the owner of the red bell?"), Some("owner"));
/// assert_eq!(pkv_data::fact_kind("Why?"), None);
/// ```
pub fn fact_kind(question: &str) -> Option<&'static str> {
    KINDS.iter().find(|(_, words)| question.contains(words)).map(|(name, _)| *name)
}

#[derive(Clone, Copy)]
enum Value {
    /// Four to seven digits.
    Number,
    City,
    /// A name and a capitalized adjective.
    Name,
    /// `H:MM`, hour 1 to 12.
    Time,
    /// A noun directly followed by an adjective.
    Word,
}

impl WordLists {
    /// The lists that the project's small models know.
    pub fn built_in() -> Self {
        serde_json::from_str(include_str!("facts/words.json")).expect("the built-in lists are tested")
    }

    /// Lists from a JSON file with the keys `adj`, `noun`, `city` and `name`; others are ignored.
    ///
    /// # Errors
    /// The file is absent, no JSON, or lacks a list.
    pub fn read(path: &Path) -> Result<Self> {
        let what = || {
            hinted(
                format!("cannot read word lists `{}`", path.display()),
                "`facts.words` names a JSON file with the lists `adj`, `noun`, `city` and `name`; leave it out for \
                 the built-in ones",
            )
        };
        let lists: Self =
            serde_json::from_slice(&pkv_core::read_small(path).with_context(what)?).with_context(what)?;
        for (name, list) in lists.named() {
            ensure!(!list.is_empty(), anyhow::anyhow!("its list `{name}` is empty").context(what()));
        }
        Ok(lists)
    }

    /// Facts that one context can hold: each is about another adjective and noun.
    pub fn capacity(&self) -> usize {
        let distinct = |list: &[String]| list.iter().collect::<HashSet<_>>().len();
        distinct(&self.adj) * distinct(&self.noun)
    }

    fn named(&self) -> [(&'static str, &[String]); 4] {
        [("adj", &self.adj), ("noun", &self.noun), ("city", &self.city), ("name", &self.name)]
    }
}

/// `count` facts, no two about the same adjective and noun.
///
/// # Errors
/// The lists have fewer pairs of adjective and noun.
pub fn generate(rng: &mut Rng, words: &WordLists, count: usize) -> Result<Vec<Fact>> {
    ensure!(
        count <= words.capacity(),
        hinted(
            format!("{count} facts for one context were asked for; the word lists make {}", words.capacity()),
            "lower `facts.max` or `eval.facts_per_context`, or name longer lists with `facts.words`"
        )
    );
    let mut facts = Vec::with_capacity(count);
    let mut taken = HashSet::new();
    while facts.len() < count {
        let (sentence, question, kind) = *pick(rng, &TEMPLATES);
        let (adj, noun) = (pick(rng, &words.adj), pick(rng, &words.noun));
        let answer = value(rng, words, kind);
        if taken.insert((adj, noun)) {
            let fill = |text: &str| text.replace("{a}", adj).replace("{n}", noun).replace("{v}", &answer);
            facts.push(Fact { sentence: fill(sentence), question: fill(question), answer });
        }
    }
    Ok(facts)
}

/// `body` with the facts' tokens between any two of its own, and where each is now, in order of position.
pub fn plant(rng: &mut Rng, body: &[u32], facts: Vec<TokenizedFact>) -> (Vec<u32>, Vec<PlantedFact>) {
    let mut cuts: Vec<usize> = facts.iter().map(|_| rng.random_range(0..body.len().max(1))).collect();
    cuts.sort_unstable();
    insert(body, cuts, facts)
}

/// `body` with each fact's tokens before the token that its cut names; cuts ascend.
pub(crate) fn insert(
    body: &[u32],
    cuts: Vec<usize>,
    facts: Vec<TokenizedFact>,
) -> (Vec<u32>, Vec<PlantedFact>) {
    let mut tokens = Vec::with_capacity(body.len() + facts.iter().map(|f| f.tokens.len()).sum::<usize>());
    let mut planted = Vec::with_capacity(facts.len());
    let mut from = 0;
    for (cut, TokenizedFact { fact, tokens: sentence }) in cuts.into_iter().zip(facts) {
        tokens.extend_from_slice(&body[from..cut]);
        from = cut;
        planted.push(PlantedFact {
            sentence: fact.sentence,
            question: fact.question,
            answer: fact.answer,
            start: tokens.len() as u32,
            len: sentence.len() as u32,
        });
        tokens.extend(sentence);
    }
    tokens.extend_from_slice(&body[from..]);
    (tokens, planted)
}

fn value(rng: &mut Rng, words: &WordLists, kind: Value) -> String {
    match kind {
        Value::Number => {
            let digits = rng.random_range(4..=7);
            (0..digits).map(|_| char::from(b'0' + rng.random_range(0..10u8))).collect()
        }
        Value::City => pick(rng, &words.city).clone(),
        Value::Name => {
            let name = pick(rng, &words.name);
            format!("{name} {}", capitalized(pick::<String>(rng, &words.adj)))
        }
        Value::Time => {
            let hour = rng.random_range(1..=12u8);
            format!("{hour}:{:02}", rng.random_range(0..60u8))
        }
        Value::Word => {
            let noun = pick(rng, &words.noun);
            format!("{noun}{}", pick(rng, &words.adj))
        }
    }
}

fn pick<'a, T>(rng: &mut Rng, list: &'a [T]) -> &'a T {
    &list[rng.random_range(0..list.len())]
}

fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pkv_core::Seed;

    use super::*;

    #[test]
    fn every_question_has_its_own_kind() {
        for ((_, question, _), (kind, _)) in TEMPLATES.iter().zip(KINDS) {
            assert_eq!(fact_kind(question), Some(kind));
            assert_eq!(KINDS.iter().filter(|(_, words)| question.contains(words)).count(), 1, "{question}");
        }
        assert_eq!(fact_kind("Who wrote this?"), None);
    }

    #[test]
    fn facts_are_about_different_things_and_contain_their_answer() {
        let words = WordLists::built_in();
        assert_eq!(words.capacity(), 49 * 49);
        let facts = generate(&mut Seed(1).stream("facts", 0), &words, 600).unwrap();
        let mut about = HashSet::new();
        for fact in &facts {
            assert!(fact.sentence.ends_with(&format!(" {}.", fact.answer)), "{fact:?}");
            let (start, question) = fact.question.split_once(" the ").unwrap();
            assert!(!fact.sentence.contains(['{', '}']) && !question.contains('{'), "{fact:?}");
            let thing = fact.question.trim_start_matches(start);
            assert!(about.insert(thing.to_owned()) && fact.question.ends_with('?'), "{fact:?}");
        }
        assert_eq!(generate(&mut Seed(1).stream("facts", 0), &words, 600).unwrap(), facts);
        assert_ne!(generate(&mut Seed(1).stream("facts", 1), &words, 600).unwrap(), facts);
        // Every template and kind of value was drawn.
        for part in ["access code", "magic numbers for", "city of", "owner of", " opens at ", "secret word"] {
            assert!(facts.iter().any(|f| f.sentence.contains(part)), "{part}");
        }
        assert!(facts.iter().any(|f| f.answer.contains(':')));
    }

    #[test]
    fn more_facts_than_words_is_an_error() {
        let list = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let words = WordLists {
            adj: list(&["red", "red"]),
            noun: list(&["hat", "tie"]),
            city: list(&["Oslo"]),
            name: list(&["Ann"]),
        };
        assert_eq!(generate(&mut Seed(1).stream("f", 0), &words, 2).unwrap().len(), 2);
        let error = generate(&mut Seed(1).stream("f", 0), &words, 3).unwrap_err();
        assert_eq!(error.to_string(), "3 facts for one context were asked for; the word lists make 2");
    }

    #[test]
    fn planting_keeps_the_body_and_records_the_spans() {
        let body: Vec<u32> = (0..100).collect();
        for seed in 0..50 {
            let fact = |n: u32| TokenizedFact {
                fact: Fact { sentence: n.to_string(), question: String::new(), answer: String::new() },
                tokens: vec![1000 + n; n as usize + 1],
            };
            let (tokens, planted) =
                plant(&mut Seed(seed).stream("plant", 0), &body, (0..5).map(fact).collect());
            assert_eq!(tokens.len(), 100 + 15);
            let rest: Vec<u32> = tokens.iter().copied().filter(|t| *t < 1000).collect();
            assert_eq!(rest, body);
            let mut end = 0;
            for (n, p) in planted.iter().enumerate() {
                let span = p.start as usize..(p.start + p.len) as usize;
                assert!(span.start >= end, "spans overlap or are out of order");
                assert_eq!(tokens[span.clone()], vec![1000 + n as u32; n + 1]);
                end = span.end;
            }
        }
        let (tokens, planted) = plant(&mut Seed(1).stream("plant", 0), &body, Vec::new());
        assert_eq!((tokens, planted), (body, Vec::new()));
    }

    #[test]
    fn word_lists_that_lack_a_list_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words.json");
        for (text, expected) in [
            ("{\"adj\": [\"red\"]}", "missing field `noun`"),
            (
                "{\"adj\": [\"red\"], \"noun\": [], \"city\": [\"Oslo\"], \"name\": [\"Ann\"]}",
                "its list `noun` is empty",
            ),
            ("{", "EOF"),
        ] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", WordLists::read(&path).unwrap_err());
            assert!(error.contains("words.json") && error.contains(expected), "{error}");
        }
    }
}
