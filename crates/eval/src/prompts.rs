//! The exact prompts of an evaluation, to check them before any work.

use anyhow::Result;
use pkv_shard::Example;
use pkv_text::TextTokenizer;

use crate::asked::Asked;
use crate::task::{Asks, Texts};
use crate::tasks;

/// One context of a task, and what follows it.
pub struct ShownContext {
    /// The task's name, and the context's number in it.
    pub title: String,
    /// Tokens, the chat template's left out.
    pub tokens: Vec<u32>,
    /// Tokens read after the context, and the texts that are right.
    pub asked: Vec<(Vec<u32>, Vec<String>)>,
}

/// The first `n` contexts of every task; `test` are the examples of the test split.
///
/// # Errors
/// A task lacks what it needs.
pub fn prompts(
    asked: &Asked,
    tokenizer: &TextTokenizer,
    test: &[Example],
    n: usize,
) -> Result<Vec<ShownContext>> {
    let test_example = |index: usize| Ok((index as u64, test[index].clone()));
    let texts = Texts { tokenizer, test_example: &test_example };
    let mut shown = Vec::new();
    for task in tasks::open(asked)? {
        let info = task.info();
        for index in 0..info.contexts.min(n) {
            let Some(context) = task.context(index, &texts)? else { continue };
            let follows = match context.asks {
                Asks::Questions(questions) => {
                    questions.into_iter().map(|q| (q.prompt, q.asked.wanted)).collect()
                }
                Asks::Continuation(tokens) => vec![(Vec::new(), vec![tokenizer.decode(&tokens)?])],
            };
            let title = format!("{}, context {index}", info.about.name().replace('.', "/"));
            shown.push(ShownContext { title, tokens: context.tokens, asked: follows });
        }
    }
    Ok(shown)
}
