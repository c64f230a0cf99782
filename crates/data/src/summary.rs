//! Summary of `prepare`, for `run.json` and the terminal.

use pkv_core::Split;
use serde::Serialize;

/// Counts of one `prepare`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrepareSummary {
    pub examples: usize,
    pub tokens: u64,
    /// Planted facts.
    pub facts: u64,
    pub sources: Vec<SourceSummary>,
}

/// Counts of one source. Of a large one only as much is read as examples are drawn from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceSummary {
    pub name: String,
    pub files: usize,
    /// Documents read, empty ones left out.
    pub documents: u64,
    /// Documents without text: skipped.
    pub empty: u64,
    /// Documents that stood somewhere before, word for word: skipped.
    pub duplicates: u64,
    /// Documents of fewer tokens than `data.min_tokens`: skipped.
    pub short: u64,
    /// Whether the source was read to its end.
    pub exhausted: bool,
    /// Training, validation, test.
    pub splits: [SplitSummary; 3],
}

/// Counts of one split of a source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SplitSummary {
    pub split: Split,
    /// Documents that windows were counted in.
    pub documents: u64,
    /// Windows that examples could be drawn from.
    pub possible: u64,
    pub examples: usize,
    pub tokens: u64,
}

impl SourceSummary {
    pub(crate) fn new(name: &str, files: usize) -> Self {
        let splits =
            Split::ALL.map(|split| SplitSummary { split, documents: 0, possible: 0, examples: 0, tokens: 0 });
        Self {
            name: name.to_owned(),
            files,
            documents: 0,
            empty: 0,
            duplicates: 0,
            short: 0,
            exhausted: false,
            splits,
        }
    }
}
