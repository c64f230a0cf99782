//! Batches to the device while it computes, and weights while others are read.

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

    /// Their bytes, to be written.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        let numbers = self.as_mut_slice();
        // SAFETY: the same memory, borrowed for as long; every pattern of bytes is a valid f32.
        unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
    }

    /// Queue a copy of the first bytes into all of `into`, on the stream that is current on its device;
    /// converted there from `kind`, which is theirs. They must stay as they are until it is done.
    ///
    /// # Errors
    /// There are too few bytes, or no device memory is left for the conversion.
    pub fn copy_to(&self, into: &Tensor, kind: Kind) -> Result<()> {
        let from = self.0.f_view_dtype(kind)?.f_narrow(0, 0, into.numel() as i64)?;
        // SAFETY: two live tensors.
        shim::check(unsafe { shim::pkv_copy_queued(into.as_ptr().cast_mut(), from.as_ptr().cast_mut()) })
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

    #[test]
    fn bytes_arrive_as_the_kind_of_their_place() {
        let on = device(DeviceChoice::Auto).unwrap();
        let numbers = [1.0f64, -2.5, 1.0 / 3.0, 3e38, 1e-40];
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float, Kind::Double] {
            let stored = Tensor::from_slice(&numbers).to_kind(kind);
            let mut buffer = HostBuffer::new(12, on).unwrap();
            let n = numbers.len() * kind.elt_size_in_bytes();
            // SAFETY: a contiguous tensor of that many bytes on the CPU.
            let bytes = unsafe { std::slice::from_raw_parts(stored.data_ptr().cast::<u8>(), n) };
            buffer.as_mut_bytes()[..n].copy_from_slice(bytes);
            for place in [Kind::BFloat16, Kind::Float] {
                let into = Tensor::zeros([7], (place, on));
                buffer.copy_to(&into.narrow(0, 1, 5), kind).unwrap();
                let found = into.to_device(Device::Cpu);
                assert!(found.narrow(0, 1, 5).equal(&stored.to_kind(place)), "{kind:?} to {place:?}");
                assert_eq!(found.double_value(&[0]) + found.double_value(&[6]), 0.0);
            }
            assert!(buffer.copy_to(&Tensor::zeros([25], (kind, on)), kind).is_err(), "{kind:?}");
        }
    }
}
