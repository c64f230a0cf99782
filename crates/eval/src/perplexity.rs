//! Perplexity task: nats per token of the document's own continuation after a pruned context.
//!
//! The last tokens of a test example are held out; the tokens before them are prefilled, scored and
//! pruned, and then they are read. The first of them is predicted before anything is pruned, so it
//! is read but not counted.

use anyhow::Result;
use pkv_lm::{Branches, LanguageModel};
use pkv_recipe::plan::{Answers, TaskWork};
use pkv_recipe::{EvalSection, Recipe};
use pkv_results::bootstrap::Draws;
use pkv_results::cell::{Cell, Cells};
use pkv_results::store::{About, Outcome};
use pkv_results::timings;
use pkv_results::{Made, PerplexityCell, PerplexityResults, Timing};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::context::PrunedContext;
use crate::forced::{Batch, Continuation};
use crate::groups::Groups;
use crate::task::{Asks, Task, TaskContext, TaskInfo, Texts};

/// The `perplexity` task.
pub struct Perplexity<'a> {
    section: &'a EvalSection,
    test_examples: usize,
}

impl<'a> Perplexity<'a> {
    pub fn new(section: &'a EvalSection, test_examples: usize) -> Self {
        Self { section, test_examples }
    }

    pub fn work(recipe: &Recipe) -> TaskWork {
        let (section, data) = (&recipe.eval, &recipe.data);
        TaskWork {
            task: "perplexity".to_owned(),
            contexts: section.contexts.min(data.test),
            context_tokens: data.test_window_tokens.unwrap_or(data.longest_window()),
            questions: 1,
            question_tokens: 0,
            answer_tokens: section.continuation_tokens,
            answers: Answers::Given,
        }
    }
}

impl Task for Perplexity<'_> {
    fn info(&self) -> TaskInfo {
        TaskInfo {
            about: About::Perplexity { continuation_tokens: self.section.continuation_tokens },
            settings: json!({}),
            contexts: self.test_examples.min(self.section.contexts),
            what: "continuations of test examples".to_owned(),
            timed: "perplexity: continuations".to_owned(),
        }
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

/// Outcome of one test example: nats per token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityOutcome {
    pub full: f64,
    pub cells: Cells<f64>,
    pub timings: Vec<Timing>,
}

impl Outcome for PerplexityOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
        timings::add_all(&mut self.timings, &new.timings);
    }
}

/// The context and the continuation of an example; `None` if it is too short to have both.
///
/// A continuation has at least two tokens, and at most as many as its context.
fn split(tokens: &[u32], continuation_tokens: usize) -> Option<(&[u32], &[u32])> {
    let held_out = continuation_tokens.max(2);
    (tokens.len() >= 2 * held_out).then(|| tokens.split_at(tokens.len() - held_out))
}

/// Nats per token of `continuation` after the full cache and after each cell's pruned one; times are left
/// to the caller.
///
/// # Errors
/// A forward pass fails.
pub fn read(
    target: &LanguageModel,
    continuation: &[u32],
    pruned: &PrunedContext,
    cells: &[Cell],
) -> Result<PerplexityOutcome> {
    let (first, rest) = continuation.split_at(1);
    let continuation = Continuation { prompt: first.to_vec(), wanted: rest.to_vec() };
    let batch = Batch::new(&[continuation], target.device())?;
    let mean = |nll: &Vec<f64>| nll.iter().sum::<f64>() / nll.len() as f64;
    let capacity = batch.tokens();
    let nll = |keep_nlhk: Option<&tch::Tensor>| -> Result<Vec<f64>> {
        let mut branches = Branches::new(&pruned.cache, keep_nlhk, 1, capacity)?;
        let hidden_nwm = batch.read(target, &mut branches)?;
        Ok(batch.surprisal(target, &hidden_nwm)?.iter().map(mean).collect())
    };
    let full = nll(None)?[0];
    let groups = Groups { model: target, batch: &batch, cached: pruned.cache.len(), capacity };
    let out = groups.run(cells, |group| nll(Some(&pruned.keep_masks(group)?)))?;
    let cells = cells.iter().copied().zip(out).collect();
    Ok(PerplexityOutcome { full, cells, timings: Vec::new() })
}

/// All examples together; each cell over those that have it.
pub fn summarize(
    made: Made,
    continuation_tokens: usize,
    outcomes: &[PerplexityOutcome],
    draws: &Draws,
) -> PerplexityResults {
    let cell = |cell: Cell| {
        let mine: Vec<(f64, f64)> =
            outcomes.iter().filter_map(|o| Some((*o.cells.get(&cell)?, o.full))).collect();
        let over = |f: fn(&(f64, f64)) -> f64| mine.iter().map(f).collect::<Vec<f64>>();
        let draws = draws.of(mine.len());
        PerplexityCell {
            method: cell.method,
            policy: cell.policy,
            ratio: cell.ratio.get(),
            contexts: (mine.len() < outcomes.len()).then_some(mine.len()),
            nll: draws.mean(&over(|(nll, _)| *nll)),
            excess: draws.mean(&over(|(nll, full)| nll - full)),
        }
    };
    let full: Vec<f64> = outcomes.iter().map(|o| o.full).collect();
    PerplexityResults {
        made,
        contexts: outcomes.len(),
        continuation_tokens: continuation_tokens.max(2) - 1,
        full: draws.of(full.len()).mean(&full),
        cells: Cell::union(outcomes.iter().flat_map(|o| o.cells.cells())).into_iter().map(cell).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_held_out_and_short_examples_are_left_out() {
        let tokens: Vec<u32> = (0..10).collect();
        assert_eq!(split(&tokens, 3), Some((&tokens[..7], &tokens[7..])));
        assert_eq!(split(&tokens, 1).unwrap().1.len(), 2);
        assert_eq!(split(&tokens, 6), None);
    }
}
