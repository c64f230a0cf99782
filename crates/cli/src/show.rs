//! `prepare --show` and `eval --show`: examples and prompts as text, to check them before a long run.
//!
//! Control characters in documents are escaped (`output::print`).

use std::fmt::Write;

use anyhow::{Result, ensure};
use pkv_core::{Fingerprint, hinted};
use pkv_eval::Asked;
use pkv_run::pair;
use pkv_run::session::Session;
use pkv_run::stages::{self, eval, prepare};
use pkv_shard::{Example, Stage, StageReader};
use pkv_text::TextTokenizer;
use serde_json::{Value, json};

use crate::args::Cli;
use crate::output;

/// The first `n` examples.
///
/// # Errors
/// The examples are absent or damaged.
pub fn examples(cli: &Cli, s: &Session, n: usize) -> Result<()> {
    some(n)?;
    let target = pair::find_target(s)?;
    let mut shown = Vec::new();
    for (i, example) in StageReader::<Example>::open(&s.run.examples())?.iter().take(n).enumerate() {
        let example = example?;
        let facts: Vec<Value> = example
            .facts
            .iter()
            .map(|f| json!({"fact": f.sentence, "first_token": f.start, "question": f.question, "answer": f.answer}))
            .collect();
        shown.push(json!({
            "title": format!("example {i}: {}, source {}, {} tokens", example.split.name(), example.source, example.tokens.len()),
            "text": target.tokenizer.decode(&example.tokens)?,
            "facts": facts,
        }));
    }
    print(cli, &shown)
}

/// The first `n` contexts of every task that the recipe asks, with their prompts.
///
/// # Errors
/// The examples are absent, or a task lacks its files.
pub fn prompts(cli: &Cli, s: &Session, n: usize) -> Result<()> {
    some(n)?;
    let target = pair::find_target(s)?;
    let tokenizer = &target.tokenizer;
    stages::require(&s.run.examples(), Stage::Prepare, &prepare::fingerprint(s, &target)?)?;
    let test = eval::test_examples(s)?;
    let contexts = eval::contexts(s, tokenizer, &test)?;
    let files = eval::benchmark_files(s)?;
    let count = |text: &str| Ok(tokenizer.encode(text)?.len());
    let asked = Asked {
        section: &s.recipe.eval,
        base: &Fingerprint::new(),
        test_examples: test.len(),
        fact_contexts: &contexts,
        benchmarks: &eval::benchmarks(s, &files, tokenizer, &count)?,
    };
    let mut shown = Vec::new();
    for context in pkv_eval::prompts(&asked, tokenizer, &test, n)? {
        let turns = context
            .asked
            .iter()
            .map(|(prompt, wanted)| Ok(json!({"prompt": tokenizer.decode(prompt)?, "wanted": wanted})));
        let turns: Vec<Value> = turns.collect::<Result<_>>()?;
        shown.push(context_of(tokenizer, &context.title, &context.tokens, &turns)?);
    }
    print(cli, &shown)
}

fn some(n: usize) -> Result<()> {
    ensure!(n > 0, hinted("`--show 0` shows nothing", "ask for 1 or more"));
    Ok(())
}

fn context_of(tokenizer: &TextTokenizer, title: &str, tokens: &[u32], turns: &[Value]) -> Result<Value> {
    let read: Vec<u32> = tokenizer.prefix().iter().chain(tokens).copied().collect();
    let title =
        format!("{title}: {} tokens, {} of them the chat template's", read.len(), tokenizer.prefix().len());
    Ok(json!({"title": title, "text": tokenizer.decode(&read)?, "asked": turns}))
}

fn print(cli: &Cli, shown: &[Value]) -> Result<()> {
    output::print_either(cli.json, &shown, || shown.iter().map(as_text).collect())
}

/// One entry: its title, the text between two lines, then facts or questions.
fn as_text(entry: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut out = format!("=== {}\n{}\n", text(&entry["title"]), text(&entry["text"]));
    for fact in entry["facts"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "--- fact at token {}: {}", fact["first_token"], text(&fact["fact"]));
    }
    for asked in entry["asked"].as_array().into_iter().flatten() {
        // Quoted as JSON, so that line breaks and spaces at the ends are seen.
        let wanted: Vec<String> =
            asked["wanted"].as_array().into_iter().flatten().map(Value::to_string).collect();
        let _ = writeln!(out, "--- then: {}\n    wanted: {}", asked["prompt"], wanted.join(" or "));
    }
    out.push('\n');
    out
}
