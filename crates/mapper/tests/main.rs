//! The mapper's tests: one binary, so that libtorch is linked once.

/// Tensors and small mappers that the others share.
mod fixtures;
/// Against PyTorch in f64: forward, loss terms, gradients, ten steps.
mod goldens;
/// The loss treats contexts on their own and refuses what it cannot mean.
mod loss;
/// Batches, lengths, windows, starts, seeds.
mod network;
/// The closed form against naive normal equations.
mod ridge;
/// Times, when asked for: `cargo test -p pkv-mapper speed -- --ignored --nocapture`.
mod speed;
