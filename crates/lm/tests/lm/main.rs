//! Tests of the crate's public face, in one binary.

/// Logits of transformers' models: every branch of the configuration.
mod goldens;
/// Checkpoints, folders and comparisons that the other files share.
mod support;
/// Text to tokens, chat templates, vocabularies.
mod tokenizer;
