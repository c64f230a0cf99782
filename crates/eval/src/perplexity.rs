//! The document's own continuation after a pruned context: nats per token.
//!
//! The last tokens of a test example are held out; what stands before them is prefilled, scored and
//! pruned, and then they are read. The first of them is predicted before anything is pruned, so it
//! is read but not counted.

use anyhow::Result;
use pkv_lm::LanguageModel;
use pkv_recipe::EvalSection;
use serde::{Deserialize, Serialize};

use crate::bootstrap::Bootstrap;
use crate::cell::Cell;
use crate::context::{PrunedContext, forward_bytes};
use crate::forced::{Batch, Continuation, surprisal};
use crate::results::{PerplexityCell, PerplexityResults, Timing};

/// What one test example says: nats per token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityOutcome {
    pub full: f64,
    /// One per cell.
    pub cells: Vec<f64>,
    pub timings: Vec<Timing>,
}

/// The context and the continuation of an example; `None` if it is too short to have both.
///
/// A continuation has at least two tokens, and at most as many as its context.
pub fn split(tokens: &[u32], continuation_tokens: usize) -> Option<(&[u32], &[u32])> {
    let held_out = continuation_tokens.max(2);
    (tokens.len() >= 2 * held_out).then(|| tokens.split_at(tokens.len() - held_out))
}

/// Nats per token of `continuation` behind the full cache and behind each cell's pruned one.
///
/// # Errors
/// A forward pass fails.
pub fn read(
    target: &LanguageModel,
    continuation: &[u32],
    pruned: &PrunedContext,
    cells: &[Cell],
) -> Result<(f64, Vec<f64>)> {
    let (first, rest) = continuation.split_at(1);
    let continuation = Continuation { prompt: first.to_vec(), wanted: rest.to_vec() };
    let batch = Batch::new(&[continuation], target.device())?;
    let mean = |nll: &Vec<f64>| nll.iter().sum::<f64>() / nll.len() as f64;
    let full = surprisal(&batch.log_probs(target, &pruned.cache, None)?, batch.wanted())?;
    let per_forward = batch.masks_per_forward(target, forward_bytes(target.device()));
    let mut out = Vec::with_capacity(cells.len());
    for group in cells.chunks(per_forward) {
        let keep_nlhk = pruned.keep_masks(group)?;
        let log_probs = batch.log_probs(target, &pruned.cache, Some(&keep_nlhk))?;
        out.extend(surprisal(&log_probs, batch.wanted())?.iter().map(mean));
    }
    Ok((mean(&full[0]), out))
}

/// All examples together.
pub fn summarize(
    section: &EvalSection,
    cells: &[Cell],
    outcomes: &[PerplexityOutcome],
    bootstrap: &Bootstrap,
) -> PerplexityResults {
    let over = |f: &dyn Fn(&PerplexityOutcome) -> f64| outcomes.iter().map(f).collect::<Vec<f64>>();
    let cell = |(i, cell): (usize, &Cell)| PerplexityCell {
        method: cell.method,
        policy: cell.policy,
        ratio: cell.ratio.get(),
        nll: bootstrap.mean(&over(&|o| o.cells[i])),
        excess: bootstrap.mean(&over(&|o| o.cells[i] - o.full)),
    };
    PerplexityResults {
        contexts: outcomes.len(),
        continuation_tokens: section.continuation_tokens.max(2) - 1,
        full: bootstrap.mean(&over(&|o| o.full)),
        cells: cells.iter().enumerate().map(cell).collect(),
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
