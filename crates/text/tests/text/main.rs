//! Tests of the crate's public face, in one binary.

/// Tokens and templates in every file of a folder, against transformers.
mod folders;
/// Text to tokens, chat templates, vocabularies.
mod tokenizer;
