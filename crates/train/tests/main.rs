//! Training from the outside: shards in, checkpoints and metrics out.

/// Stage folders of a small made-up pair whose labels can be learnt from its features.
mod common;
/// Loss, and ten steps of both, against PyTorch in f64.
mod goldens;
/// What is wrong with the input is said, with the way out.
mod input;
/// A run that learns, in every variant.
mod learn;
/// The loss treats contexts on their own and refuses what it cannot mean.
mod loss;
/// Stopped, killed, damaged: the same bits in the end.
mod resume;
/// Validation, ranked on the host and on the device.
mod validate;
