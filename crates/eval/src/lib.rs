//! What a mapper is worth: agreement with the labels, and answers with a pruned cache.

mod answers;
mod bootstrap;
mod cell;
mod clock;
mod decode;
mod forced;
mod labels;
mod methods;
mod results;
mod store;
pub mod table;

pub use results::{
    FactSpan, FactsCell, FactsResults, HeadRecall, Interval, KeptCounts, LabelCell, LabelResults,
    MethodHeads, MethodNote, ModelName, PerplexityCell, PerplexityResults, RESULTS_VERSION, RankCell,
    Results, Timing, WorkedExample,
};
