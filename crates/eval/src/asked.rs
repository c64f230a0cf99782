//! What one evaluation asks for, known before a model is loaded: its tasks, how many contexts of each, and which cells.

use std::path::Path;

use anyhow::{Result, ensure};
use pkv_core::{Fingerprint, hinted};
use pkv_data::{FactContext, FactQuestion};
use pkv_recipe::{EvalSection, Task};
use serde_json::json;

use crate::bench::Benchmark;
use crate::cell::Cell;
use crate::evaluate::RESULTS_FILE;
use crate::labels::Plan;
use crate::results::Results;
use crate::store::{About, Identity, TaskStore};
use crate::{facts, worked};

/// Folder of all outcomes, in the evaluation's folder.
pub const CONTEXTS_FOLDER: &str = "contexts";

/// What decides about the work of one evaluation.
pub struct Asked<'a> {
    pub section: &'a EvalSection,
    /// What the numbers of every task depend on, nothing of `section` among it.
    pub base: &'a Fingerprint,
    /// Examples of the test split.
    pub test_examples: usize,
    /// Contexts of the `facts` task; none without it.
    pub fact_contexts: &'a [FactContext],
    pub benchmarks: &'a [Benchmark<'a>],
}

/// One task.
pub struct AskedTask {
    pub identity: Identity,
    pub contexts: usize,
    pub cells: Vec<Cell>,
}

impl Asked<'_> {
    /// Every task, in the order of the work.
    ///
    /// # Errors
    /// A ratio is out of range, or there is no context for the `facts` task.
    pub fn tasks(&self) -> Result<Vec<AskedTask>> {
        let section = self.section;
        let has = |task| section.tasks.contains(&task);
        let cells = facts::cells(section)?;
        let task = |about, settings, contexts, cells: &[Cell]| AskedTask {
            identity: Identity::new(self.base, about, settings),
            contexts,
            cells: cells.to_vec(),
        };
        let planted = json!({
            "context_tokens": section.context_tokens,
            "facts_per_context": section.facts_per_context,
            "first": self.fact_contexts.first().map(content),
        });
        let mut all = vec![task(About::Labels, json!({}), self.test_examples, &Plan::new(section)?.cells)];
        if has(Task::Facts) {
            ensure!(
                !self.fact_contexts.is_empty(),
                hinted(
                    "there is no context for the `facts` task",
                    "raise `eval.contexts`, or leave `facts` out of `eval.tasks`"
                )
            );
            let settings = json!({ "planted": planted, "max_answer_tokens": section.max_answer_tokens });
            let about = About::Facts { answer_match: section.answer_match };
            all.push(task(about, settings, self.fact_contexts.len(), &cells));
        }
        if has(Task::Perplexity) {
            let about = About::Perplexity { continuation_tokens: section.continuation_tokens };
            all.push(task(about, json!({}), self.test_examples.min(section.contexts), &cells));
        }
        for b in self.benchmarks {
            let about = About::Benchmark { suite: b.suite.to_owned(), name: b.task.clone() };
            all.push(task(about, json!(b.identity), b.examples, &cells));
        }
        let example = worked::cells(section)?;
        if !self.fact_contexts.is_empty() {
            all.push(task(About::Example { of_facts: true }, planted, 1, &example));
        } else if self.test_examples > 0 {
            all.push(task(About::Example { of_facts: false }, json!({}), 1, &example));
        }
        Ok(all)
    }

    /// Whether `out` holds results of everything that is asked for.
    ///
    /// # Errors
    /// As [`Asked::tasks`].
    pub fn is_complete(&self, out: &Path, fingerprint: &Fingerprint) -> Result<bool> {
        let Ok(results) = Results::read(&out.join(RESULTS_FILE)) else { return Ok(false) };
        let made = results.made();
        if made.iter().all(|(_, made)| made.fingerprint.is_empty()) {
            // Of an earlier version, which knows its own choices only.
            return Ok(results.fingerprint == fingerprint.hash());
        }
        if results.bootstrap != Some(self.section.bootstrap) {
            // The same outcomes with other intervals.
            return Ok(false);
        }
        let contexts = out.join(CONTEXTS_FOLDER);
        Ok(self.tasks()?.into_iter().all(|asked| {
            let store = TaskStore::at(&contexts, asked.identity);
            let identity = store.identity();
            let is_summed_up = match identity.about {
                About::Example { .. } => results.worked_example.is_some(),
                _ => made.iter().any(|(name, made)| {
                    *name == identity.about.name()
                        && made.fingerprint == identity.fingerprint
                        && made.outcomes == store.count()
                }),
            };
            is_summed_up && (0..asked.contexts).all(|index| store.missing(index, &asked.cells).is_empty())
        }))
    }
}

/// A hash of all that is in a context. How many there are changes none of them, so the first one stands for all: it
/// changes with the documents, the lists of words and the places of facts.
fn content(context: &FactContext) -> String {
    let asked = |q: &FactQuestion| format!("{:?} {} {}", q.fact, q.question_text, q.answer_text);
    let questions: Vec<String> = context.questions.iter().map(asked).collect();
    Fingerprint::new().with("tokens", &context.tokens).with("questions", questions).hash()
}

impl AskedTask {
    /// For the progress bar.
    pub fn what(&self) -> String {
        match &self.identity.about {
            About::Methods => "methods".to_owned(),
            About::Labels => "test examples against their labels".to_owned(),
            About::Facts { .. } => "contexts asked for planted facts".to_owned(),
            About::Perplexity { .. } => "continuations of test examples".to_owned(),
            About::Benchmark { .. } => format!("contexts of {}", self.identity.about.name()),
            About::Example { .. } => "worked example".to_owned(),
        }
    }
}
