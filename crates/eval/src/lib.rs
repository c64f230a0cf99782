//! What a mapper is worth: agreement with the labels, and answers with a pruned cache.

mod results;

pub use results::{
    FactSpan, FactsCell, FactsResults, HeadRecall, Interval, KeptCounts, LabelCell, LabelResults,
    MethodHeads, MethodNote, ModelName, PerplexityCell, PerplexityResults, RESULTS_VERSION, RankCell,
    Results, Timing, WorkedExample,
};
