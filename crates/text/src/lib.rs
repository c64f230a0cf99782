//! Text to tokens and back, as a model's folder says: `tokenizer.json` and the chat template.
//!
//! Nothing here needs a tensor, so that what only reads text builds without libtorch.

mod template;
mod tokenizer;

pub use tokenizer::TextTokenizer;
