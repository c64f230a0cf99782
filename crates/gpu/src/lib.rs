//! What tch cannot reach of libtorch: CUDA loading, memory figures, determinism, fused AdamW.
//!
//! The C++ files of the project, in `csrc/`, and a safe interface to them. Models, losses
//! and training loops are left to the crates above; they never call the shim's functions directly.
//!
//! Every crate that makes a binary or a test links this one, and calls [`device`] to choose where
//! to compute: that call is also what keeps the shim's constructor, which loads CUDA, in the binary.

mod device;
mod layer;
mod memory;
mod optim;
mod shim;
mod transfer;

pub use device::{DeviceChoice, cuda_absence, cuda_count, device, set_deterministic, set_tf32, synchronize};
pub use layer::{attend_heads, time_conv};
pub use memory::{CudaMemory, cuda_memory, empty_cache, reset_peak};
pub use optim::{AdamW, AdamWOptions, clip_global_norm, drop_gradients, lerp};
pub use transfer::{HostBuffer, Mark, upload};
