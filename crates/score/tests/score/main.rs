//! Tests of the crate's public face, in one binary.

/// The fused kernels against the plain maths, where there is a GPU for them.
mod fused;
/// Scores and request ids of transformers and kvpress.
mod goldens;
/// Scoring through a model: odd sizes, other chunk sizes, what cannot be scored.
mod model;
/// The maths on random tensors against loops in f64.
mod naive;
/// Where the tests compute.
mod support;
