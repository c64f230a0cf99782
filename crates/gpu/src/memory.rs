//! GPU memory: how much is in use, as libtorch's allocator counts it, and small tensors on their way there.

use anyhow::Result;
use tch::{Device, Tensor};

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

/// A host tensor on `device`, without the host waiting for the GPU: plain copies wait until all work
/// queued before is done. For small ones: the data goes through pinned memory.
///
/// # Errors
/// The GPU does not exist or has no room.
pub fn upload(host: &Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(gpu) = device else { return Ok(host.to_device(device)) };
    if host.device().is_cuda() {
        return Ok(host.to_device(device));
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` receives one that we own.
    shim::check(unsafe { shim::pkv_upload(host.as_ptr().cast_mut(), gpu as i32, &mut out) })?;
    // SAFETY: the shim returned 0, so `out` is a tensor on the heap that only this code frees.
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_uploaded_arrives() {
        let host = Tensor::from_slice(&[3i64, -1, 4]);
        let device = if crate::cuda_count() > 0 { Device::Cuda(0) } else { Device::Cpu };
        let there = upload(&host, device).unwrap();
        assert_eq!(there.device(), device);
        assert_eq!(Vec::<i64>::try_from(there.to_device(Device::Cpu)).unwrap(), [3, -1, 4]);
        if device == Device::Cpu {
            assert!(upload(&host, Device::Cuda(0)).is_err());
        }
    }
}
