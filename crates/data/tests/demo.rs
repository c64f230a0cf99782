//! The demo's own recipe, text and tokenizer, from manifest to shards and questions.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use pkv_core::{NoProgress, Split};
use pkv_data::facts::WordLists;
use pkv_data::{PrepareSummary, fact_contexts, inputs, prepare};
use pkv_gpu::DeviceChoice;
use pkv_hub::Hub;
use pkv_lm::TextTokenizer;
use pkv_recipe::{Manifest, Recipe};
use pkv_shard::Example;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

struct Demo {
    recipe: Recipe,
    manifest: Manifest,
    tokenizer: TextTokenizer,
    hub: Hub,
}

impl Demo {
    fn open() -> Self {
        // Nothing is computed on it; the call keeps libtorch linked.
        pkv_gpu::device(DeviceChoice::Cpu).unwrap();
        let recipe = pkv_recipe::load(&root().join("recipes/demo-nano.toml"), &[]).unwrap();
        let manifest = pkv_recipe::load_manifest(&root().join(&recipe.data.manifest)).unwrap();
        let hub = Hub::from_env();
        let model = hub.model(&recipe.target.model, &recipe.target.revision, &[&root()]).unwrap();
        let tokenizer = TextTokenizer::open(&model.folder).unwrap();
        Self { recipe, manifest, tokenizer, hub }
    }

    fn examples(&self) -> (Vec<Example>, PrepareSummary) {
        let mut examples = Vec::new();
        let (data, seed) = (&self.recipe.data, self.recipe.seed);
        let summary =
            prepare(data, &self.manifest, &self.hub, &self.tokenizer, seed, &NoProgress, &mut |e| {
                examples.push(e);
                Ok(())
            });
        (examples, summary.unwrap())
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
            assert_eq!(demo.tokenizer.decode(span).unwrap(), format!(" {}", fact.sentence));
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

#[test]
fn questions_are_asked_about_test_pages_alone() {
    let demo = Demo::open();
    let (examples, _) = demo.examples();
    let test: Vec<_> = examples.into_iter().filter(|e| e.split == Split::Test).collect();
    let eval = &demo.recipe.eval;
    let contexts =
        fact_contexts(&test, &WordLists::built_in(), eval, &demo.tokenizer, demo.recipe.seed).unwrap();
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
                sentence.ends_with(&format!("{}.", q.answer_text)) && text.contains(&sentence),
                "{sentence}"
            );
            assert_eq!(demo.tokenizer.decode(&q.question).unwrap(), format!("\n\n{}", q.question_text));
            assert_eq!(demo.tokenizer.decode(&q.answer).unwrap(), q.answer_text);
        }
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
