//! A training that ran away: which step, which batch, which examples, and how to go on.
//!
//! What counts as such, and that nothing of it is saved, is `run`'s.

use std::fmt;

use anyhow::Error;
use pkv_core::hinted;

use crate::batches::Batches;
use crate::dataset::Dataset;
use crate::run::TrainInputs;

/// Examples that a message names; a batch may have hundreds.
const NAMED: usize = 8;

/// Loss, gradient or weights were not finite after a step.
#[derive(Debug)]
pub struct Diverged {
    /// From 0.
    pub step: u64,
    /// The step of the last checkpoint, if there is one.
    pub saved: Option<u64>,
}

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The log counts steps that were done.
        write!(f, "training diverged at step {}", self.step + 1)
    }
}

/// `error` with its batch, its examples and its repair, if it is [`Diverged`]; any other as it is.
pub fn explain(error: Error, inputs: &TrainInputs, batches: &Batches, dataset: &Dataset) -> Error {
    let Some(&Diverged { step, saved }) = error.downcast_ref::<Diverged>() else { return error };
    let (batch, epoch) = (step % batches.per_epoch() + 1, step / batches.per_epoch() + 1);
    let mut rows: Vec<u64> =
        batches.from_step(step).next().map_or_else(Vec::new, |b| b.windows.iter().map(|w| w.0).collect());
    rows.sort_unstable();
    rows.dedup();
    let kept = match saved {
        Some(step) => {
            format!("the checkpoint of step {step} is whole and stays: set another `name` to keep it, or ")
        }
        None => String::new(),
    };
    error.context(hinted(
        format!("batch {batch} of epoch {epoch} holds {}", names(dataset, &rows)),
        format!(
            "lower `train.lr` (it is {:e}), raise `train.warmup_steps` or lower `train.clip_norm`; {kept}train anew with \
             `--redo train`, since checkpoints go on with the choices that they were made with alone",
            inputs.train.lr
        ),
    ))
}

fn names(dataset: &Dataset, rows: &[u64]) -> String {
    let named: Vec<String> = rows.iter().take(NAMED).map(|&row| format!("`{}`", dataset.id(row))).collect();
    let more = rows.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("example{} {}{more}", if rows.len() == 1 { "" } else { "s" }, named.join(", "))
}
