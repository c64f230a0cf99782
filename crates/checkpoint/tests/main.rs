//! Checkpoint folders and exports from the outside: written, broken, continued, read.

mod common;
mod export;
mod store;
mod versions;
