//! Agreement with KVzip's labels, context by context: `eval/agreement.parquet`.
//!
//! `results.json` has the means; two evaluations are compared over the contexts that both saw.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{Float64Array, StringArray};

use crate::columns::write_columns;
use crate::labels::{LabelOutcome, Plan};

/// File of the agreement in the evaluation's folder.
pub const AGREEMENT_FILE: &str = "agreement.parquet";

/// Write one row per context and cell; `ids` name the contexts of `outcomes`.
///
/// # Errors
/// The folder cannot be written to.
pub fn write(path: &Path, plan: &Plan, ids: &[String], outcomes: &[LabelOutcome]) -> Result<()> {
    let cells = plan.cells();
    let (mut context, mut method, mut policy) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ratio, mut recall, mut mass) = (Vec::new(), Vec::new(), Vec::new());
    for (id, outcome) in ids.iter().zip(outcomes) {
        for (cell, (found, kept_mass)) in cells.iter().zip(outcome.agreement()) {
            context.push(id.as_str());
            method.push(cell.method.name());
            policy.push(cell.policy.name());
            ratio.push(cell.ratio.get());
            recall.push(found);
            mass.push(kept_mass);
        }
    }
    write_columns(
        path,
        vec![
            ("context_id", false, Arc::new(StringArray::from(context))),
            ("method", false, Arc::new(StringArray::from(method))),
            ("policy", false, Arc::new(StringArray::from(policy))),
            ("ratio", false, Arc::new(Float64Array::from(ratio))),
            ("recall", false, Arc::new(Float64Array::from(recall))),
            ("mass", false, Arc::new(Float64Array::from(mass))),
        ],
    )
}
