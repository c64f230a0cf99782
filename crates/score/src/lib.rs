//! KVzip labels: how strongly a model looks at each KV pair while it repeats its context.
//!
//! The model prefills `prefix + context` once, then repeats the context chunk by chunk; the score
//! of a KV pair is the strongest softmax weight that any row of its chunk's repeat pays it
//! (KVzip, arXiv 2505.23416). [`Requests`] knows which tokens are fed, [`chunk_scores`] holds the
//! maths on tensors alone, [`Scorer`] runs a model through them.
//!
//! Log-odds, span pooling and keep masks belong to `prune`; storing labels belongs to `shard`.

mod chunk;
mod pieces;
mod request;
mod scorer;
mod weighting;

pub use chunk::{ChunkAttention, ChunkScores, block_elements, chunk_scores};
pub use request::Requests;
pub use scorer::{ContextScores, Scorer};
pub use weighting::{Weighting, value_output_norms};
