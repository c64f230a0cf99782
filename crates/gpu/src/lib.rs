//! Operators that choose their kernel by themselves, and parts of libtorch that tch does not wrap.
//!
//! `ops` holds the operators: each is one function with a portable form and, where it pays, a fused one.
//! Crates above never ask which kernels a device has. The fused forms are libtorch's own kernels (`flash`)
//! and ours (`kernels`, compiled when first used).
//!
//! Beside them devices: CUDA loading, memory, streams, uploads; and the list-wise operations of
//! an optimizer. The C++ files of the project are in `csrc/`; only this crate calls them.
//!
//! Every crate that makes a binary or a test links this one, and calls [`device`] to choose where
//! to compute: that call is also what keeps the shim's constructor, which loads CUDA, in the binary.

mod device;
mod exhausted;
mod flash;
mod host;
mod kernels;
mod memory;
mod ops;
mod optim;
mod shim;
mod stream;
mod transfer;

/// The libtorch that this crate is built against; another one may crash.
pub const LIBTORCH: &str = env!("PKV_LIBTORCH");

pub use device::{
    DeviceChoice, DeviceGroup, MathMode, cpu_in_words, cuda_absence, cuda_count, device, device_in_words,
    device_name, devices_name, kind_on, model_name, next_gpu, set_tf32, synchronize,
};
pub use exhausted::unless_exhausted;
pub use host::{HostMemory, host_memory, process_secs};
pub use kernels::{
    DecodeSpace, PackedKv, PackedSlots, Products, QueryStatistics, ScoreOutput, ScoreRows, StatisticChannels,
};
pub use memory::{CudaMemory, cuda_memory, empty_cache, reset_peak, upload};
pub use ops::{
    Attention, AttentionPolicy, FullWeights, Movement, Part, Projected, RaggedAttention, RaggedShape,
    Rectangle, Repeats, ReplayScores, Rotation, Segments, Weighting, WeightingOf, add_attention, arranged,
    attend, attend_heads, attend_segments, chunk_scores, gated_silu, log_norms, logits, mean_cosines, nats,
    packs, query_statistics, replay_scores, rotate, time_conv, wants_lse,
};
pub use optim::{AdamW, AdamWOptions, clip_global_norm, drop_gradients, lerp};
pub use stream::{Event, Stream, StreamGuard};
pub use transfer::{HostBuffer, upload_beside};
