//! Evaluation of a mapper: agreement with KVzip's labels, and answers from pruned caches.
//!
//! [`evaluate`] measures the mapper beside its oracle and the baselines, with the same cache and the
//! same budgets: recall of KVzip's kept set over the test split, planted facts and standard benchmarks
//! asked of pruned caches, and the document's own continuation. It reads shards, never documents: contexts
//! with facts come as values. What is measured goes to `pkv-results`, which tables and the report read.
//!
//! Dimension key: l layer, h KV head, o target KV head (layers x heads), p proxy KV head, c channel,
//! t context position, k cached position, n keep mask, q continuation, s token, w wanted token,
//! v vocabulary.

mod agreement;
mod asked;
mod asking;
mod budgets;
mod context;
mod evaluate;
mod forced;
mod gather;
mod groups;
mod kept;
mod labels;
pub mod methods;
mod perplexity;
mod prompts;
mod stopwatch;
mod task;
pub mod tasks;
mod worked;

pub use asked::Asked;
pub use budgets::{Budgets, learn_budgets};
pub use evaluate::{EvalInputs, Evaluated, evaluate, evaluate_part};
pub use kept::kept_sets;
pub use prompts::{ShownContext, prompts};

/// What `plan` counts of a recipe's scorer and tasks.
pub fn work(recipe: &pkv_recipe::Recipe) -> pkv_recipe::plan::Work {
    pkv_recipe::plan::Work { scorer: pkv_score::work(&recipe.label), tasks: tasks::work(recipe) }
}
