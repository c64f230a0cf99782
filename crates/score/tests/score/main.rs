//! Tests of the crate's public face, in one binary.

/// Scores and request ids of transformers and kvpress.
mod goldens;
/// Scoring through a model: odd sizes, other chunk sizes, what cannot be scored.
mod model;
/// KVzip+'s factors against loops in f64.
mod naive;
/// A target over several devices: its scores, and its planned memory.
mod placement;
