//! Batches to the device while it computes.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use crate::shim;

/// f32 numbers in host memory, page-locked where the device is a GPU: only such memory is copied
/// without the host waiting.
///
/// libtorch's allocator takes a buffer back when it is dropped and reuses it after the copies from it.
pub struct HostBuffer(Tensor);

impl HostBuffer {
    /// `n` numbers, of any value.
    ///
    /// # Errors
    /// The memory cannot be allocated.
    pub fn new(n: usize, device: Device) -> Result<Self> {
        if !device.is_cuda() {
            return Ok(Self(Tensor::f_empty([n as i64], (Kind::Float, Device::Cpu))?));
        }
        let mut out = std::ptr::null_mut();
        // SAFETY: a count; `out` receives a tensor that we own.
        shim::check(unsafe { shim::pkv_pinned(n as i64, &mut out) })
            .with_context(|| format!("cannot pin {} MB of host memory", n >> 18))?;
        // SAFETY: the shim returned 0, so `out` is a tensor on the heap that only this code frees.
        Ok(Self(unsafe { Tensor::from_ptr(out) }))
    }

    /// The numbers, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let n = self.0.numel();
        if n == 0 {
            return &mut [];
        }
        // SAFETY: a contiguous f32 tensor of n numbers in host memory, borrowed for as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast(), n) }
    }

    /// As a tensor of one dimension.
    pub fn into_tensor(self) -> Tensor {
        self.0
    }
}

/// `host`, a [`HostBuffer`]'s tensor, on `device`: itself on a CPU; on a GPU a copy on a stream of its
/// own, which work queued from now on waits for, and work queued before does not.
///
/// # Errors
/// No device memory is left.
pub fn upload_beside(host: Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(i) = device else { return Ok(host) };
    let mut out = std::ptr::null_mut();
    // SAFETY: a tensor and an index; `out` receives a tensor that we own.
    shim::check(unsafe { shim::pkv_upload_beside(host.as_ptr().cast_mut(), i as i32, &mut out) })
        .context("cannot copy a batch to the GPU")?;
    // SAFETY: the shim returned 0, so `out` is a tensor on the heap that only this code frees.
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceChoice, Event, device, synchronize};

    /// Uploads beside queued work arrive whole, and the work queued after them sees them.
    #[test]
    fn what_is_written_arrives() {
        let on = device(DeviceChoice::Auto).unwrap();
        let mut sums = Vec::new();
        let busy = Tensor::ones([512, 512], (Kind::Float, on));
        for round in 0..20 {
            let mut buffer = HostBuffer::new(100_000, on).unwrap();
            buffer.as_mut_slice().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 7 + round) as f32);
            let _ = busy.matmul(&busy);
            let there = upload_beside(buffer.into_tensor(), on).unwrap();
            assert_eq!((there.device(), there.size()), (on, vec![100_000]));
            sums.push(there.sum(Kind::Double));
            Event::now(on).unwrap().synchronize().unwrap();
        }
        synchronize(on).unwrap();
        for (round, sum) in sums.iter().enumerate() {
            let expected: usize = (0..100_000).map(|i| i % 7 + round).sum();
            assert_eq!(sum.double_value(&[]), expected as f64);
        }
        assert!(HostBuffer::new(0, on).unwrap().as_mut_slice().is_empty());
    }
}
