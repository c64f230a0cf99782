//! The binary, run as a user runs it.
//!
//! - `pipeline`: a recipe in, a trained, evaluated and exported mapper out; stages are skipped when complete
//! - `kill`: a run killed at random moments ends with the same bytes as an unbroken one
//! - `bad_input`: what is wrong is said, with a hint, without a panic, and nothing written before is lost
//! - `bench`: a benchmark needs no files, and says what it needs where it does
//! - `sandbox`: the folder, the small recipe and the command that the others share

mod bad_input;
mod bench;
mod kill;
mod pipeline;
mod sandbox;
