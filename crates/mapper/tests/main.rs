//! The mapper's tests: one binary, so that libtorch is linked once.

/// Tensors and small mappers that the others share.
mod fixtures;
/// Against PyTorch in f64: forward and gradients.
mod goldens;
/// Batches, lengths, windows, starts, seeds.
mod network;
/// The closed form against naive normal equations.
mod ridge;
