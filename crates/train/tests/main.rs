//! Training from the outside: shards in, checkpoints and metrics out.

mod common;
mod goldens;
mod input;
mod learn;
mod loss;
mod resume;
mod validate;
