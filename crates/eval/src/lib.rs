//! Evaluation of a mapper: agreement with KVzip's labels, and answers from pruned caches.
//!
//! [`evaluate`] measures the mapper beside its oracle and the baselines, with the same cache and the
//! same budgets: recall of KVzip's kept set over the test split, planted facts and standard benchmarks
//! asked of pruned caches, and the document's own continuation. It reads shards, never documents: contexts
//! with facts come as values. Nothing is printed; [`table`] gives strings, and [`Results`] is what the report
//! reads.
//!
//! Dimension key: l layer, h KV head, o target KV head (layers x heads), p proxy KV head, c channel,
//! t context position, k cached position, n keep mask, q continuation, s token, w wanted token,
//! v vocabulary.

mod agreement;
mod answered;
mod answers;
mod asked;
mod asking;
mod bootstrap;
mod budgets;
mod cell;
mod clock;
mod columns;
pub mod compare;
mod context;
mod evaluate;
mod forced;
mod gather;
mod groups;
mod kept;
mod known;
mod labels;
pub mod methods;
mod perplexity;
mod prompts;
mod results;
mod samples;
mod share;
mod store;
pub mod table;
mod task;
pub mod tasks;
mod worked;

pub use agreement::AGREEMENT_FILE;
pub use asked::{Asked, CONTEXTS_FOLDER};
pub use budgets::{Budgets, learn_budgets};
pub use columns::Columns;
pub use evaluate::{ANSWERS_FILE, EvalInputs, RESULTS_FILE, evaluate};
pub use kept::kept_sets;
pub use prompts::{ShownContext, prompts};
pub use results::{
    AnswerCell, AnswerResults, FactSpan, HeadRecall, Interval, KeptCounts, LabelCell, LabelResults, Made,
    MethodHeads, MethodNote, ModelName, PerplexityCell, PerplexityResults, RESULTS_VERSION, RankCell,
    Results, Timing, WorkedExample,
};
pub use samples::{Sample, fact_samples};
