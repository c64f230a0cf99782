//! Standard long-context benchmarks as plain text: contexts, questions, wanted answers, and scores.
//!
//! [`ruler`] generates its examples; [`longbench`] and [`scbench`] read the data sets' own files. All
//! give [`Example`]s: one context, read before any question is known, and the turns that are asked of
//! it. [`Metric`] says what an answer is worth. Nothing here knows models or tensors: lengths come from
//! a function that counts a text's tokens, and asking is left to `eval`.

mod draw;
mod example;
mod fit;
pub mod longbench;
mod metric;
mod middle;
mod rows;
pub mod ruler;
pub mod scbench;
mod sentences;
mod words;

pub use example::{Example, Turn};
pub use metric::{Metric, Squad};
pub use middle::cut_middle;
