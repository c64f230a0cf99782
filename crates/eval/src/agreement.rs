//! Agreement with KVzip's labels, context by context: `eval/agreement.parquet`.
//!
//! `results.json` has the means; two evaluations are compared over the contexts that both measured.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{Float64Array, StringArray};
use pkv_results::cell::Cell;
use pkv_results::columns::write_columns;

use crate::labels::LabelOutcome;

/// Write one row per context and cell.
///
/// # Errors
/// The folder cannot be written to.
pub fn write(path: &Path, outcomes: &[(usize, LabelOutcome)]) -> Result<()> {
    let cells = Cell::union(outcomes.iter().flat_map(|(_, o)| o.cells.cells()));
    let (mut context, mut method, mut policy) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ratio, mut recall, mut mass) = (Vec::new(), Vec::new(), Vec::new());
    for (_, outcome) in outcomes {
        for cell in &cells {
            let Some(found) = outcome.cells.get(cell) else { continue };
            context.push(outcome.context_id.as_str());
            method.push(cell.method.name());
            policy.push(cell.policy.name());
            ratio.push(cell.ratio.get());
            recall.push(found.recall);
            mass.push(found.mass);
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
