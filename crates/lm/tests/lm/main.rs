//! Tests of the crate's public face, in one binary.

/// Masking equals eviction; batches equal single sequences.
mod branches;
/// Heads and ties in the files of a folder, against transformers.
mod folders;
/// Chunks, taps, generation, refusals of the forward pass.
mod forward;
/// Logits of transformers' models: every branch of the configuration.
mod goldens;
/// Whole, sharded, damaged and unsupported checkpoint folders.
mod loading;
/// Layers over several devices: the same model.
mod placement;
/// Compaction equals masking; nothing pruned equals the full cache; batches equal single sequences.
mod ragged;
/// Packed continuations of one cache, and the log-sum-exps that taps may ask for.
mod repeats;
/// Checkpoints, folders and comparisons that the other files share.
mod support;
