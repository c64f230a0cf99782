//! Our own CUDA kernels: compiled by NVRTC when first used, kept on disk, launched on libtorch's streams.
//!
//! `kernels/*.cu` hold the code, [`scores`], [`elementwise`], [`cross`] and [`mod@decode`] their safe
//! interfaces. They come with the project as text: nothing is built for a GPU on machines that have none, and
//! what a GPU runs was compiled for exactly that one.

mod cross;
mod decode;
mod elementwise;
mod module;
mod scores;
mod source;

pub(crate) use cross::cross_kernels;
pub use decode::{DecodeSpace, PackedKv};
pub(crate) use decode::{decode, has_decode};
pub use elementwise::PackedSlots;
pub(crate) use elementwise::{
    cosines, gated_silu, has_elementwise, log_norms, merge_attended, rotate, row_nats, turn, unit_sums,
};
pub use scores::{Products, QueryStatistics, ScoreOutput, ScoreRows, StatisticChannels};
pub(crate) use scores::{fused_chunk_scores, fused_query_statistics, has_fused_scores};
