//! The demo's own recipe, text and tokenizer, from manifest to shards and questions.

use std::collections::{HashMap, HashSet};

use pkv_core::{Fingerprint, NoProgress, Split, sentence_gaps};
use pkv_data::facts::WordLists;
use pkv_data::{FactContext, PrepareSummary, fact_contexts, inputs, prepare};
use pkv_hub::Hub;
use pkv_recipe::{FactPlace, Manifest, Recipe};
use pkv_shard::Example;
use pkv_test_support::files::root;
use pkv_text::TextTokenizer;

struct Demo {
    recipe: Recipe,
    manifest: Manifest,
    tokenizer: TextTokenizer,
    hub: Hub,
}

impl Demo {
    fn open() -> Self {
        let recipe = pkv_recipe::load(&root().join("recipes/demo-nano.toml"), &[]).unwrap();
        let manifest = pkv_recipe::load_manifest(&root().join(&recipe.data.manifest)).unwrap();
        let hub = Hub::from_env();
        let model = hub.model(&recipe.target.model, &recipe.target.revision, &[&root()]).unwrap();
        let tokenizer = TextTokenizer::open(&model.folder).unwrap();
        Self { recipe, manifest, tokenizer, hub }
    }

    fn examples(&self) -> (Vec<Example>, PrepareSummary) {
        let mut examples = Vec::new();
        let summary =
            prepare(&self.recipe, &self.manifest, &self.hub, &self.tokenizer, &NoProgress, &mut |e| {
                examples.push(e);
                Ok(())
            });
        (examples, summary.unwrap())
    }

    fn contexts(&self, test: &[Example]) -> Vec<FactContext> {
        let Recipe { eval, facts, seed, .. } = &self.recipe;
        fact_contexts(test, &WordLists::built_in(), eval, facts.place, &self.tokenizer, *seed).unwrap()
    }
}

#[test]
fn the_demo_has_enough_text_and_splits_it_by_page() {
    let demo = Demo::open();
    let (examples, summary) = demo.examples();
    let data = &demo.recipe.data;
    assert_eq!(examples.len(), data.train + data.validation + data.test);
    let mut split_of = HashMap::new();
    for e in &examples {
        assert_eq!(
            *split_of.entry(e.document.clone()).or_insert(e.split),
            e.split,
            "{} is in two splits",
            e.document
        );
        assert!((256..=512).contains(&e.tokens.len()) && e.facts.len() <= 6);
        for fact in &e.facts {
            let span = &e.tokens[fact.start as usize..(fact.start + fact.len) as usize];
            assert_eq!(demo.tokenizer.decode(span).unwrap().trim(), fact.sentence);
        }
    }
    // Examples are spread over the pages of their split, and none is made twice.
    let pages = |split| split_of.values().filter(|s| **s == split).count();
    assert!(
        pages(Split::Train) > 70 && pages(Split::Validation) > 8 && pages(Split::Test) > 8,
        "{split_of:?}"
    );
    let places: HashSet<_> = examples.iter().map(|e| (&e.document, e.window)).collect();
    assert_eq!(places.len(), examples.len());
    let source = &summary.sources[0];
    assert_eq!((source.documents, source.empty, source.duplicates, source.short), (142, 0, 0, 0));
    assert!(summary.facts > 400 && summary.tokens > 90_000, "{summary:?}");

    let (again, _) = demo.examples();
    assert!(again == examples, "the same seed gave other examples");
}

/// Each fact of `tokens` in the decoded text: what is before it, the fact, what is after it.
fn around(tokenizer: &TextTokenizer, tokens: &[u32], facts: &[(u32, u32)]) -> Vec<[String; 3]> {
    let decode = |t: &[u32]| tokenizer.decode(t).unwrap();
    let whole = decode(tokens);
    let parts = facts.iter().map(|&(start, len)| {
        let (start, end) = (start as usize, (start + len) as usize);
        let parts = [&tokens[..start], &tokens[start..end], &tokens[end..]].map(decode);
        assert_eq!(parts.concat(), whole, "a fact broke a character");
        parts
    });
    parts.collect()
}

/// Facts are surrounded by white space. They are after a sentence or another fact, unless the text has no
/// sentence that ends inside it; how many are.
fn check_places(tokenizer: &TextTokenizer, tokens: &[u32], facts: &[(u32, u32)]) -> usize {
    let mut bare = tokens.to_vec();
    for &(start, len) in facts.iter().rev() {
        bare.drain(start as usize..(start + len) as usize);
    }
    let text = tokenizer.decode(&bare).unwrap();
    // Near the end there may be no place: facts may displace the text there.
    let mut sentences = sentence_gaps(&text);
    sentences.retain(|gap| gap.end + 40 * facts.len() < text.len());
    let mut after_sentences = 0;
    for [before, fact, after] in around(tokenizer, tokens, facts) {
        let spaced =
            |a: &str, b: &str| a.ends_with(char::is_whitespace) || b.starts_with(char::is_whitespace);
        assert!(spaced(&before, &fact) && spaced(&fact, &after), "{before}|{fact}|{after}");
        let closing = |c: char| "\"')]`*_”’".contains(c);
        let ends = before.trim_end().trim_end_matches(closing).ends_with(['.', '!', '?', '…']);
        assert!(ends || sentences.is_empty(), "{before}|{fact}|{after}");
        after_sentences += usize::from(ends);
    }
    after_sentences
}

#[test]
fn facts_are_between_sentences_and_break_no_text() {
    let mut demo = Demo::open();
    let (examples, summary) = demo.examples();
    let mut after_sentences = 0;
    for e in &examples {
        let facts: Vec<_> = e.facts.iter().map(|f| (f.start, f.len)).collect();
        after_sentences += check_places(&demo.tokenizer, &e.tokens, &facts);
    }
    // Some windows are tables and lists without a sentence.
    assert!(after_sentences > 600, "{after_sentences} of {}", summary.facts);

    // The text is the one without facts, less what they displaced.
    demo.manifest.facts = None;
    let (bare, _) = demo.examples();
    for (with, without) in examples.iter().zip(&bare) {
        assert_eq!(
            (&with.document, with.window, with.tokens.len()),
            (&without.document, without.window, without.tokens.len())
        );
        let mut tokens = with.tokens.clone();
        for fact in with.facts.iter().rev() {
            tokens.drain(fact.start as usize..(fact.start + fact.len) as usize);
        }
        assert_eq!(tokens, without.tokens[..tokens.len()]);
    }
}

#[test]
fn facts_placed_anywhere_are_those_of_old() {
    let mut demo = Demo::open();
    demo.recipe.facts.place = FactPlace::Anywhere;
    let (examples, _) = demo.examples();
    let mut hash = Fingerprint::new();
    for e in &examples {
        let facts: Vec<_> = e.facts.iter().map(|f| (f.start, f.len, &f.sentence)).collect();
        hash = hash.with(&e.id, (&e.tokens, facts));
    }
    let test: Vec<_> = examples.into_iter().filter(|e| e.split == Split::Test).collect();
    for (i, c) in demo.contexts(&test).iter().enumerate() {
        hash = hash.with(&i.to_string(), (&c.tokens, c.questions.iter().map(|q| q.fact).collect::<Vec<_>>()));
    }
    assert_eq!(&hash.hash()[..16], "11d66b2e3edc37f0");
}

#[test]
fn questions_are_asked_about_test_pages_alone() {
    let demo = Demo::open();
    let (examples, _) = demo.examples();
    let test: Vec<_> = examples.into_iter().filter(|e| e.split == Split::Test).collect();
    let eval = &demo.recipe.eval;
    let contexts = demo.contexts(&test);
    assert_eq!(contexts.len(), eval.contexts);
    for context in &contexts {
        assert_eq!(
            (context.tokens.len(), context.questions.len()),
            (eval.context_tokens, eval.facts_per_context)
        );
        let text = demo.tokenizer.decode(&context.tokens).unwrap();
        for q in &context.questions {
            let (start, len) = (q.fact.0 as usize, q.fact.1 as usize);
            let sentence = demo.tokenizer.decode(&context.tokens[start..start + len]).unwrap();
            assert!(
                sentence.trim().ends_with(&format!("{}.", q.answer_text)) && text.contains(&sentence),
                "{sentence}"
            );
            assert_eq!(demo.tokenizer.decode(&q.question).unwrap(), format!("\n\n{}", q.question_text));
            assert_eq!(demo.tokenizer.decode(&q.answer).unwrap(), q.answer_text);
        }
        let facts: Vec<_> = context.questions.iter().map(|q| q.fact).collect();
        check_places(&demo.tokenizer, &context.tokens, &facts);
        // What is asked has one answer.
        let asked: HashSet<_> = context.questions.iter().map(|q| &q.question_text).collect();
        assert_eq!(asked.len(), context.questions.len());
    }
}

#[test]
fn the_inputs_change_with_the_text() {
    let demo = Demo::open();
    let before = inputs(&demo.manifest, &demo.hub).unwrap();
    assert_eq!(inputs(&demo.manifest, &demo.hub).unwrap(), before);
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("demo")).unwrap();
    std::fs::write(dir.path().join("demo/sqlite-docs.jsonl"), "{\"text\": \"other\"}\n").unwrap();
    let moved = Manifest { folder: dir.path().into(), ..demo.manifest };
    let difference = inputs(&moved, &demo.hub).unwrap().difference(&before);
    assert_eq!(difference.len(), 1);
    assert!(difference[0].0.starts_with("sqlite-docs"), "{difference:?}");
}
