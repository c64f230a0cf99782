//! Standard long-context benchmarks as plain text: contexts, questions, wanted answers, and scores.
//!
//! [`ruler`] generates its examples; the others read the data sets' own files. Each is a
//! [`Suite`] in [`REGISTRY`]. All give [`Example`]s: one context, read before any question is known, and the
//! turns that are asked of it. [`Metric`] scores an answer. Nothing here knows models or tensors: lengths
//! come from a function that counts a text's tokens, and asking is left to `eval`.

mod draw;
mod example;
mod files;
mod fit;
pub mod infinitebench;
pub mod longbench;
mod metric;
mod middle;
mod rows;
pub mod ruler;
pub mod scbench;
pub mod suite;
mod words;

pub use example::{Example, Turn};
pub use files::Files;
pub use metric::{Metric, Squad};
pub use middle::cut_middle;
pub use suite::{Benchmark, CountTokens, MakeExample, Opening, Suite};

/// All suites, in the order of results.
pub static REGISTRY: &[&dyn Suite] =
    &[&ruler::Ruler, &longbench::LongBench, &scbench::ScBench, &infinitebench::InfiniteBench];
