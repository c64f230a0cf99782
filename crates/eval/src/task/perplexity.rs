//! The end of test examples as a continuation of the rest: the `perplexity` task.

use anyhow::Result;
use pkv_recipe::EvalSection;
use serde_json::{Value, json};

use super::{Asks, Task, TaskContext, Texts};
use crate::perplexity::split;
use crate::store::About;

/// The `perplexity` task.
pub struct Perplexity<'a> {
    section: &'a EvalSection,
    test_examples: usize,
}

impl<'a> Perplexity<'a> {
    pub fn new(section: &'a EvalSection, test_examples: usize) -> Self {
        Self { section, test_examples }
    }
}

impl Task for Perplexity<'_> {
    fn about(&self) -> About {
        About::Perplexity { continuation_tokens: self.section.continuation_tokens }
    }

    fn settings(&self) -> Value {
        json!({})
    }

    fn contexts(&self) -> usize {
        self.test_examples.min(self.section.contexts)
    }

    fn what(&self) -> String {
        "continuations of test examples".to_owned()
    }

    fn timed(&self) -> String {
        "perplexity: continuations".to_owned()
    }

    /// `None` where an example is too short to have a continuation.
    fn context(&self, index: usize, texts: &Texts) -> Result<Option<TaskContext<'_>>> {
        let (row, example) = (texts.test_example)(index)?;
        let split = split(&example.tokens, self.section.continuation_tokens);
        Ok(split.map(|(context, continuation)| TaskContext {
            tokens: context.to_vec(),
            cut: false,
            draw: row,
            asks: Asks::Continuation(continuation.to_vec()),
        }))
    }
}
