//! Contexts with questions: what the `facts` task of the evaluation asks.

use anyhow::{Result, ensure};
use pkv_core::{Seed, Split, hinted};
use pkv_recipe::{EvalSection, FactPlace};
use pkv_shard::Example;
use pkv_text::TextTokenizer;
use rand::Rng as _;

use crate::facts::{self, WordLists};
use crate::planting::Planter;

/// A context of the evaluation, prefix left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactContext {
    pub tokens: Vec<u32>,
    /// One per planted fact, in order of position.
    pub questions: Vec<FactQuestion>,
}

/// A question about one planted fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactQuestion {
    /// Tokens that follow the context: an empty line and the question. The switch comes after them.
    pub question: Vec<u32>,
    pub question_text: String,
    pub answer_text: String,
    pub answer: Vec<u32>,
    /// First token of the fact in the context, and how many there are.
    pub fact: (u32, u32),
}

/// `eval.contexts` contexts of exactly `eval.context_tokens` tokens with `eval.facts_per_context` facts.
///
/// Text comes from the test split: of the examples in `test`, with the facts that were planted there
/// taken out. A context is a window of one, continued with windows of others when that is too short.
///
/// # Errors
/// There is no test example with text, one is of another split, or the facts leave no room for text.
pub fn fact_contexts(
    test: &[Example],
    words: &WordLists,
    eval: &EvalSection,
    place: FactPlace,
    tokenizer: &TextTokenizer,
    seed: Seed,
) -> Result<Vec<FactContext>> {
    let encode = |text: &str| tokenizer.encode(text);
    let decode = |tokens: &[u32]| tokenizer.decode(tokens);
    contexts(test, words, eval, Planter { place, encode: &encode, decode: &decode }, seed)
}

fn contexts(
    test: &[Example],
    words: &WordLists,
    eval: &EvalSection,
    planter: Planter,
    seed: Seed,
) -> Result<Vec<FactContext>> {
    let encode = planter.encode;
    if let Some(other) = test.iter().find(|e| e.split != Split::Test) {
        anyhow::bail!("example `{}` is of the {} split, not of test", other.id, other.split.name());
    }
    let bodies: Vec<Vec<u32>> = test.iter().map(without_facts).filter(|b| !b.is_empty()).collect();
    ensure!(
        !bodies.is_empty(),
        hinted(
            "there is no test example to ask questions about",
            "set `data.test` to 1 or more, or drop `facts` from `eval.tasks`"
        )
    );
    (0..eval.contexts)
        .map(|i| {
            let mut rng = seed.stream("eval.facts", i as u64);
            let facts = facts::generate(&mut rng, words, eval.facts_per_context)?;
            let mut taken = 0;
            for fact in &facts {
                taken += planter.room(fact)?;
            }
            ensure!(
                taken < eval.context_tokens,
                hinted(
                    format!(
                        "{} facts take {taken} tokens, `eval.context_tokens` is {}",
                        facts.len(),
                        eval.context_tokens
                    ),
                    "raise `eval.context_tokens`, or lower `eval.facts_per_context`"
                )
            );
            let wanted = match planter.place {
                FactPlace::Anywhere => eval.context_tokens - taken,
                // Facts may take less than their room; what is too much of the text falls away.
                FactPlace::Sentence => eval.context_tokens,
            };
            let mut body = Vec::with_capacity(wanted);
            while body.len() < wanted {
                let text = &bodies[rng.random_range(0..bodies.len())];
                let window = text.len().min(wanted - body.len());
                let start = rng.random_range(0..=text.len() - window);
                body.extend_from_slice(&text[start..start + window]);
            }
            let (tokens, planted) = planter.plant(&mut rng, &body, eval.context_tokens, facts)?;
            let question = |fact: pkv_shard::PlantedFact| {
                Ok(FactQuestion {
                    question: encode(&format!("\n\n{}", fact.question))?,
                    answer: encode(&fact.answer)?,
                    question_text: fact.question,
                    answer_text: fact.answer,
                    fact: (fact.start, fact.len),
                })
            };
            Ok(FactContext { tokens, questions: planted.into_iter().map(question).collect::<Result<_>>()? })
        })
        .collect()
}

/// An example's tokens as they stood in the document.
fn without_facts(example: &Example) -> Vec<u32> {
    let mut out = Vec::with_capacity(example.tokens.len());
    let mut from = 0;
    for fact in &example.facts {
        out.extend_from_slice(&example.tokens[from..fact.start as usize]);
        from = (fact.start + fact.len) as usize;
    }
    out.extend_from_slice(&example.tokens[from..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(text: &str) -> Result<Vec<u32>> {
        Ok(text.chars().map(|c| 10_000 + c as u32).collect())
    }

    /// Tokens of a document are words, those of a fact letters.
    fn decode(tokens: &[u32]) -> Result<String> {
        let one =
            |t: &u32| t.checked_sub(10_000).and_then(char::from_u32).map_or(" word".to_owned(), String::from);
        Ok(tokens.iter().map(one).collect())
    }

    fn contexts(
        test: &[Example],
        words: &WordLists,
        eval: &EvalSection,
        seed: Seed,
    ) -> Result<Vec<FactContext>> {
        contexts_at(FactPlace::Sentence, test, words, eval, seed)
    }

    fn contexts_at(
        place: FactPlace,
        test: &[Example],
        words: &WordLists,
        eval: &EvalSection,
        seed: Seed,
    ) -> Result<Vec<FactContext>> {
        super::contexts(test, words, eval, Planter { place, encode: &encode, decode: &decode }, seed)
    }

    fn example(id: usize, length: u32) -> Example {
        let mut tokens: Vec<u32> = (0..length).map(|t| id as u32 * 1000 + t).collect();
        let sentence = [9_999; 5];
        tokens.splice(3..3, sentence);
        let fact = pkv_shard::PlantedFact {
            sentence: String::new(),
            question: String::new(),
            answer: String::new(),
            start: 3,
            len: 5,
        };
        Example {
            id: format!("test-{id}"),
            document: String::new(),
            source: String::new(),
            split: Split::Test,
            window: 0,
            start: 0,
            tokens,
            facts: vec![fact],
        }
    }

    fn section(contexts: usize, context_tokens: usize, facts_per_context: usize) -> EvalSection {
        EvalSection { contexts, context_tokens, facts_per_context, ..EvalSection::default() }
    }

    #[test]
    fn contexts_have_their_length_and_their_facts() {
        let test: Vec<_> = (0..4).map(|i| example(i, 300)).collect();
        let words = WordLists::built_in();
        for place in [FactPlace::Anywhere, FactPlace::Sentence] {
            check(place, &test, &words);
        }
    }

    fn check(place: FactPlace, test: &[Example], words: &WordLists) {
        let contexts = |s: &EvalSection| contexts_at(place, test, words, s, Seed(3)).unwrap();
        let made = contexts(&section(20, 700, 4));
        assert_eq!(made.len(), 20);
        for context in &made {
            assert_eq!((context.tokens.len(), context.questions.len()), (700, 4));
            assert!(!context.tokens.contains(&9_999), "a fact of the example came along");
            for q in &context.questions {
                let (start, len) = (q.fact.0 as usize, q.fact.1 as usize);
                let sentence: String = context.tokens[start..start + len]
                    .iter()
                    .map(|t| char::from_u32(t - 10_000).unwrap())
                    .collect();
                assert!(
                    sentence.starts_with(' ') && sentence.ends_with(&format!("{}.", q.answer_text)),
                    "{sentence}"
                );
                assert_eq!(q.question, encode(&format!("\n\n{}", q.question_text)).unwrap());
                assert_eq!(q.answer, encode(&q.answer_text).unwrap());
            }
            // Text is whole windows of examples: almost every token is followed by its successor.
            let body: Vec<_> = context.tokens.iter().filter(|t| **t < 10_000).collect();
            assert!(body.windows(2).filter(|w| *w[0] + 1 != *w[1]).count() <= 3);
        }
        assert_eq!(contexts(&section(20, 700, 4)), made);
        // More contexts leave the first ones as they were.
        assert_eq!(contexts(&section(25, 700, 4))[..20], made);
    }

    #[test]
    fn bad_input_is_an_error() {
        let words = WordLists::built_in();
        let error =
            |test: &[Example], s: &EvalSection| contexts(test, &words, s, Seed(1)).unwrap_err().to_string();
        assert_eq!(error(&[], &section(1, 700, 4)), "there is no test example to ask questions about");
        let crowded = error(&[example(0, 300)], &section(1, 160, 4));
        assert!(
            crowded.starts_with("4 facts take ") && crowded.ends_with("`eval.context_tokens` is 160"),
            "{crowded}"
        );
        let train = Example { split: Split::Train, ..example(0, 300) };
        assert_eq!(
            error(&[train], &section(1, 700, 4)),
            "example `test-0` is of the train split, not of test"
        );
    }
}
