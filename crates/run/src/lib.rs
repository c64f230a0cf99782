//! The stages of a run in its folder: what each reads, the settings that its output depends on, and the work
//! between the crates that compute and those that store.
//!
//! Every stage checks its inputs by their fingerprints, continues what was stopped, and skips what is
//! complete. Nothing is printed here: progress goes to a `Progress`, messages to `tracing`.

pub mod feature_workers;
pub mod mapper_source;
pub mod pair;
mod run_folder;
pub mod session;
pub mod stages;
pub mod sweep;
mod variants;
pub mod workers;

pub use run_folder::RunFolder;
pub use variants::{Variant, Variants};
