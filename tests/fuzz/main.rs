//! Damaged files of every kind of untrusted origin: reading them ends soon, within a bound
//! of memory, with a value or with an error that says something.
//!
//! Each target tries damaged files for 5 seconds; for an hour each:
//!
//! ```text
//! FUZZ_SECONDS=3600 cargo test --release -p pkv-cli --test fuzz
//! ```
//!
//! `FUZZ_SEED` (default 1) draws others; processes with different seeds may run at once. What was found is in
//! `findings/`, and tried first.
//!
//! - `settings`: recipe, manifest, lock file
//! - `documents`: text, JSON lines, Parquet, compressed or not
//! - `models`: config.json, tokenizer, chat template, weights of a language model
//! - `runs`: index, shards, checkpoint, export, results, tables and stored outcomes of an evaluation,
//!   record and metrics for the report
//! - `rows`: files of RULER, LongBench and SCBench
//! - `hub`: what a hub answers to `fetch` and `push`
//! - `mutate`: how files are damaged; `harness`: how targets are tried

mod documents;
mod harness;
mod hub;
mod models;
mod mutate;
mod rows;
mod runs;
#[allow(dead_code, reason = "the end-to-end tests use all of it")]
#[path = "../sandbox.rs"]
mod sandbox;
mod settings;

use std::fs;
use std::path::{Path, PathBuf};

/// An empty folder of this name.
fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", harness::seed())).join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("folders can be made");
    dir
}
