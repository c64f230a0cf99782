//! Parts of libtorch that tch does not wrap: CUDA loading, memory, streams, fused attention, determinism,
//! fused AdamW.
//!
//! The C++ files of the project, in `csrc/`, and a safe interface to them. Models, losses
//! and training loops are left to the crates above; they never call the shim's functions directly.
//!
//! Our own kernels are in `kernels/`, compiled when first used.
//!
//! Every crate that makes a binary or a test links this one, and calls [`device`] to choose where
//! to compute: that call is also what keeps the shim's constructor, which loads CUDA, in the binary.

mod attention;
mod device;
mod exhausted;
mod host;
mod kernels;
mod layer;
mod memory;
mod optim;
mod shim;
mod stream;
mod transfer;

pub use attention::{
    Attended, Mask, Softmax, cudnn, flash, flash_segments, flash_used_segments, has_fused_attention,
};
pub use device::{
    DeviceChoice, MathMode, cuda_absence, cuda_count, device, set_deterministic, set_tf32, synchronize,
};
pub use exhausted::unless_exhausted;
pub use host::{HostMemory, host_memory};
pub use kernels::{
    CacheSlot, DecodeSpace, Products, QueryStatistics, ScoreOutput, ScoreRows, Segments, StatisticChannels,
    decode, fused_chunk_scores, fused_query_statistics, gated_silu, has_decode, has_elementwise,
    has_fused_scores, log_norms, merge_attended, rotate, row_nats, turn,
};
pub use layer::{attend_heads, time_conv};
pub use memory::{CudaMemory, cuda_memory, empty_cache, reset_peak, upload};
pub use optim::{AdamW, AdamWOptions, clip_global_norm, drop_gradients, lerp};
pub use stream::{Event, Stream, StreamGuard};
pub use transfer::{HostBuffer, upload_beside};
