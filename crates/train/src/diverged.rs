//! Error for a diverged training: step, batch, examples, and how to continue.
//!
//! `run` detects divergence and saves nothing of it.

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
    /// Weights after this many steps or more are of no use: what went wrong was computed from them.
    pub bad_from: u64,
    /// Steps of the checkpoints, ascending.
    pub saved: Vec<u64>,
}

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The log counts steps that were done.
        write!(f, "training diverged at step {}", self.step + 1)
    }
}

/// `error` with its batch, its examples and its repair, if it is [`Diverged`]; any other as it is.
pub fn explain(error: Error, inputs: &TrainInputs, batches: &Batches, dataset: &Dataset) -> Error {
    let Some(Diverged { step, bad_from, saved }) = error.downcast_ref::<Diverged>() else { return error };
    let (step, good) = (*step, saved.partition_point(|s| s < bad_from));
    let (good, bad) = saved.split_at(good);
    let (batch, epoch) = (step % batches.per_epoch() + 1, step / batches.per_epoch() + 1);
    let mut rows: Vec<u64> =
        batches.from_step(step).next().map_or_else(Vec::new, |b| b.windows.iter().map(|w| w.0).collect());
    rows.sort_unstable();
    rows.dedup();
    let lower = format!(
        "lower `train.lr` (it is {:e}), raise `train.warmup_steps` or lower `train.clip_norm`",
        inputs.train.lr
    );
    let hint = match good.last() {
        Some(last) => {
            let cuts = cuts(&inputs.train.lr_cuts, *last);
            let remove: String = bad
                .iter()
                .map(|s| format!("remove `checkpoints/step-{s:06}`, which gives this loss; "))
                .collect();
            format!(
                "{remove}the checkpoint of step {last} is whole: to go on from it at a tenth of the rate, add `--set \
                 'train.lr_cuts={cuts}'` to this and later commands, or write `lr_cuts` into the recipe; to begin anew, \
                 {lower}, and train with `--redo train`, or set another `name` to keep it"
            )
        }
        None if bad.is_empty() => format!("{lower}, and train again"),
        None => format!(
            "{lower}, and train with `--redo train`: the weights of the only checkpoints give this loss"
        ),
    };
    error.context(hinted(format!("batch {batch} of epoch {epoch} holds {}", names(dataset, &rows)), hint))
}

/// `before`, and from `step` on a tenth of the rate.
fn cuts(before: &[(u64, f64)], step: u64) -> String {
    let here = before.iter().filter(|cut| cut.0 == step).fold(0.1, |factor, cut| factor * cut.1);
    let mut all: Vec<(u64, f64)> = before.iter().copied().filter(|cut| cut.0 != step).collect();
    all.push((step, here));
    all.sort_by_key(|cut| cut.0);
    // Three digits: 0.1 of 0.1 is not 0.01 to the last bit.
    let short = |x: f64| format!("{x:.2e}").parse().unwrap_or(x);
    let all: Vec<String> = all.iter().map(|(step, factor)| format!("[{step}, {}]", short(*factor))).collect();
    format!("[{}]", all.join(", "))
}

fn names(dataset: &Dataset, rows: &[u64]) -> String {
    let named: Vec<String> = rows.iter().take(NAMED).map(|&row| format!("`{}`", dataset.id(row))).collect();
    let more = rows.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("example{} {}{more}", if rows.len() == 1 { "" } else { "s" }, named.join(", "))
}
