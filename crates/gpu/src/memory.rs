//! How much of a GPU's memory is in use, as libtorch's allocator counts it.

use anyhow::Result;

use crate::shim;

/// Memory of one GPU, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaMemory {
    /// In tensors now.
    pub allocated: i64,
    /// Most in tensors since the last [`reset_peak`].
    pub allocated_peak: i64,
    /// Held by libtorch's allocator now.
    pub reserved: i64,
    pub reserved_peak: i64,
    /// Free on the device.
    pub free: i64,
    pub total: i64,
}

/// # Errors
/// CUDA is absent or `device` does not exist.
pub fn cuda_memory(device: usize) -> Result<CudaMemory> {
    let mut out = [0i64; 6];
    // SAFETY: `out` holds the six numbers that the shim writes.
    shim::check(unsafe { shim::pkv_cuda_memory(device as i32, out.as_mut_ptr()) })?;
    let [allocated, allocated_peak, reserved, reserved_peak, free, total] = out;
    Ok(CudaMemory { allocated, allocated_peak, reserved, reserved_peak, free, total })
}

/// Start counting peaks from now.
///
/// # Errors
/// CUDA is absent or `device` does not exist.
pub fn reset_peak(device: usize) -> Result<()> {
    // SAFETY: a plain index.
    shim::check(unsafe { shim::pkv_cuda_reset_peak(device as i32) })
}

/// Give memory that no tensor uses back to the driver.
///
/// # Errors
/// CUDA is absent.
pub fn empty_cache() -> Result<()> {
    // SAFETY: no arguments.
    shim::check(unsafe { shim::pkv_cuda_empty_cache() })
}
