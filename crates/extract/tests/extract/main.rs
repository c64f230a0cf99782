//! Tests of the crate's public face, in one binary.

/// The fused kernel against the blocks, where there is a GPU for it.
mod fused;
/// The channel of hidden states.
mod hidden;
/// Features of a model: every channel, block and chunk sizes, windows, what has no features.
mod model;
/// The attention channels on random tensors of odd sizes.
mod naive;
/// A model over several devices.
mod placement;
/// The attention channels by their definition, for the other two.
mod reference;
/// The replay that is never run.
mod unrun;
