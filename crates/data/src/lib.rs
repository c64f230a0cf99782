//! From a data manifest to tokenized examples, and from test examples to contexts with questions.
//!
//! [`prepare`] streams the documents of a mixture, drops exact duplicates, gives every document to
//! one split by a hash of its text, cuts windows, plants facts and hands over one example after
//! another: training, then validation, then test. Text is never held beyond a small batch of
//! documents; of the others only hashes and window counts stay in memory. The same seed, manifest
//! and tokenizer give the same examples. Writing them to shards, and models, are left to others.

mod contexts;
mod documents;
pub mod facts;
mod few;
mod files;
mod identity;
mod places;
mod planting;
mod prepare;
mod scan;
mod summary;
mod tokens;
mod window;

pub use contexts::{FactContext, FactQuestion, fact_contexts};
pub use facts::fact_kind;
pub use files::{files, inputs};
pub use prepare::{prepare, word_lists};
pub use summary::{PrepareSummary, SourceSummary, SplitSummary};
