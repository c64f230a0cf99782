//! Where the head budgets of the policy `pair-budget` come from: an export, or the training labels.
//!
//! What budgets are is `pkv_prune`'s. Evaluation and export read the same rows, so that what was measured is
//! what is handed over.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{Split, hinted};
use pkv_prune::{BudgetFit, HeadBudgets};
use pkv_shard::{Example, LabelRow, StageReader};
use tch::Device;

use crate::evaluate::{EvalInputs, rows_of};
use crate::methods::label_tensor;

/// Head budgets that an evaluation uses.
#[derive(Clone, Copy, Debug)]
pub enum Budgets<'a> {
    /// Those of an export.
    Given(&'a HeadBudgets),
    /// Of this many training contexts.
    Learned(u64),
}

/// The mean shares of `contexts` training contexts, evenly spread over the split; of all if there are fewer.
///
/// # Errors
/// The shards are absent, damaged or not of each other, or there is no training example.
pub fn learn_budgets(examples: &Path, labels: &Path, contexts: u64, device: Device) -> Result<HeadBudgets> {
    let _no_grad = tch::no_grad_guard();
    let examples = StageReader::<Example>::open(examples)?;
    let labels = StageReader::<LabelRow>::open(labels)?;
    let splits = examples.iter().map(|e| Ok(e?.split)).collect::<Result<Vec<_>>>()?;
    let train = rows_of(&splits, Split::Train)?;
    let (all, n) = (train.end - train.start, contexts.min(train.end - train.start));
    ensure!(
        n > 0,
        hinted(
            "there is no training example to learn head budgets from",
            "raise `data.train`, or leave `pair-budget` out of `eval.policies` and `eval.answer_policies`"
        )
    );
    let mut fit: Option<BudgetFit> = None;
    for row in (0..n).map(|i| train.start + i * all / n) {
        let (example, label) = (examples.get(row)?, labels.get(row)?);
        label.check_example(row, &example)?;
        let scores_ot = label_tensor(&label, device).flatten(0, 1);
        fit.get_or_insert_with(|| BudgetFit::new(scores_ot.size()[0] as usize))
            .add(&scores_ot)
            .with_context(|| format!("learning head budgets from the labels of `{}`", label.id))?;
    }
    fit.context("no training example was read")?.finish()
}

impl EvalInputs<'_> {
    /// # Errors
    /// As [`learn_budgets`].
    pub fn head_budgets(&self) -> Result<HeadBudgets> {
        match self.budgets {
            Budgets::Given(budgets) => Ok(budgets.clone()),
            Budgets::Learned(contexts) => {
                learn_budgets(self.examples, self.labels, contexts, self.target.device())
            }
        }
    }
}
