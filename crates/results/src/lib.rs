//! What an evaluation stores, as plain values: the outcome of each context, their sum, and tables of them.
//!
//! [`store`] keeps the outcomes of single contexts, which several processes may add to; [`Results`] is
//! `results.json`, [`table`] its tables as text, [`brief`] what a command ends in, [`answers`] every single
//! answer as a Parquet table, and [`compare`] sets several evaluations side by side. Measuring is left to
//! `eval`, showing to `report`; nothing here needs a tensor.

pub mod answered;
pub mod answers;
pub mod bootstrap;
pub mod brief;
pub mod cell;
pub mod columns;
pub mod compare;
mod fact_answers;
mod method;
mod results;
pub mod share;
pub mod store;
pub mod table;
pub mod timings;

pub use columns::Columns;
pub use fact_answers::{FactAnswer, fact_answers};
pub use method::{MethodInfo, Needs};
pub use results::{
    AnswerCell, AnswerResults, FactSpan, HeadRecall, Interval, KeptCounts, LABEL_METRICS, LabelCell,
    LabelResults, Made, MethodHeads, MethodNote, ModelName, PerplexityCell, PerplexityResults,
    RESULTS_VERSION, RankCell, Results, Timing, WorkedExample,
};

/// File of the results in the evaluation's folder.
pub const RESULTS_FILE: &str = "results.json";
/// File of every answer in the evaluation's folder.
pub const ANSWERS_FILE: &str = "answers.parquet";
/// File of the agreement with labels in the evaluation's folder.
pub const AGREEMENT_FILE: &str = "agreement.parquet";
/// Folder of all outcomes, in the evaluation's folder.
pub const CONTEXTS_FOLDER: &str = "contexts";
