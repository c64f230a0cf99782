//! KVzip labels: how much attention each KV pair gets while a model repeats its context.
//!
//! The model prefills `prefix + context` once, then repeats the context chunk by chunk; the score of a KV
//! pair is its largest softmax weight over all rows of its chunk's repeat (KVzip, arXiv 2505.23416).
//! A model and its tokenizer are [`ModelFiles`] before that; [`Requests`] knows which tokens are fed,
//! [`pkv_gpu::chunk_scores`] holds the maths on tensors alone, [`Scorer`] runs a model through them.
//!
//! Log-odds, span pooling and keep masks belong to `prune`; storing labels belongs to `shard`.

mod model_files;
mod pieces;
mod request;
mod scorer;
mod scorers;

pub use model_files::ModelFiles;
pub use request::Requests;
pub use scorer::{ContextScores, Scorer};
pub use scorers::{WINDOW, check, kvzip_plus, scorers, value_output_norms, window_scores, work};
