//! CUDA streams and events, as libtorch's own kernels use them.
//!
//! On a CPU there is one order of work: streams and events exist, and all they do is nothing.

use std::ffi::c_void;
use std::marker::PhantomData;

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use crate::shim;

/// A queue of work on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// GPU and libtorch's number of the stream; `None` on a CPU.
    cuda: Option<(i32, i64)>,
}

impl Stream {
    /// The stream that this thread's kernels go to.
    ///
    /// # Errors
    /// The GPU does not exist.
    pub fn current(device: Device) -> Result<Self> {
        Self::of(device, |gpu, id| {
            // SAFETY: `id` receives a number.
            unsafe { shim::pkv_stream_current(gpu, id) }
        })
    }

    /// A stream beside the default one, from libtorch's pool of 32, which are handed out in turn.
    ///
    /// # Errors
    /// The GPU does not exist.
    pub fn pool(device: Device, high_priority: bool) -> Result<Self> {
        Self::of(device, |gpu, id| {
            // SAFETY: `id` receives a number.
            unsafe { shim::pkv_stream_pool(gpu, high_priority.into(), id) }
        })
    }

    fn of(device: Device, get: impl FnOnce(i32, *mut i64) -> i32) -> Result<Self> {
        let cuda = match device {
            Device::Cuda(gpu) => {
                let mut id = 0;
                shim::check(get(gpu as i32, &mut id)).with_context(|| format!("a stream of GPU {gpu}"))?;
                Some((gpu as i32, id))
            }
            _ => None,
        };
        Ok(Self { cuda })
    }

    /// Make this the stream of this thread's kernels until the guard is dropped.
    ///
    /// # Errors
    /// The driver fails.
    pub fn enter(&self) -> Result<StreamGuard> {
        let Some((gpu, id)) = self.cuda else {
            return Ok(StreamGuard { previous: None, thread: PhantomData });
        };
        let mut previous = 0;
        // SAFETY: numbers that libtorch gave; `previous` receives one.
        shim::check(unsafe { shim::pkv_stream_exchange(gpu, id, &mut previous) })?;
        Ok(StreamGuard { previous: Some((gpu, previous)), thread: PhantomData })
    }

    /// The `cudaStream_t`, for kernels launched by hand; null on a CPU, and for CUDA's default stream.
    ///
    /// # Errors
    /// The driver fails.
    pub fn handle(&self) -> Result<*mut c_void> {
        let mut handle = std::ptr::null_mut();
        if let Some((gpu, id)) = self.cuda {
            // SAFETY: numbers that libtorch gave; `handle` receives a pointer.
            shim::check(unsafe { shim::pkv_stream_handle(gpu, id, &mut handle) })?;
        }
        Ok(handle)
    }

    /// Let work queued here from now on wait for `event`; nothing if it was never recorded.
    ///
    /// # Errors
    /// The driver fails.
    pub fn wait(&self, event: &Event) -> Result<()> {
        match (self.cuda, event.raw) {
            // SAFETY: a live event, and numbers that libtorch gave.
            (Some((gpu, id)), Some(raw)) => shim::check(unsafe { shim::pkv_event_block(raw, gpu, id) }),
            _ => Ok(()),
        }
    }

    /// Wait on the host until all work queued here is done.
    ///
    /// # Errors
    /// A kernel queued before failed.
    pub fn synchronize(&self) -> Result<()> {
        match self.cuda {
            // SAFETY: numbers that libtorch gave.
            Some((gpu, id)) => shim::check(unsafe { shim::pkv_stream_sync(gpu, id) }),
            None => Ok(()),
        }
    }

    /// Tell the allocator that this stream uses a tensor made on another one: its memory is not
    /// given away before the work queued here by then is done.
    ///
    /// # Errors
    /// The tensor is not on this stream's GPU.
    pub fn uses(&self, tensor: &Tensor) -> Result<()> {
        match self.cuda {
            // SAFETY: a live tensor, and numbers that libtorch gave.
            Some((gpu, id)) => {
                shim::check(unsafe { shim::pkv_record_stream(tensor.as_ptr().cast_mut(), gpu, id) })
            }
            None => Ok(()),
        }
    }
}

/// Puts the stream that was current before back when it is dropped. It belongs to its thread.
#[must_use = "the stream is current only while the guard lives"]
pub struct StreamGuard {
    previous: Option<(i32, i64)>,
    thread: PhantomData<*const ()>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        if let Some((gpu, id)) = self.previous {
            let mut ours = 0;
            // SAFETY: numbers that libtorch gave. It cannot fail: the stream was current before.
            let _ = unsafe { shim::pkv_stream_exchange(gpu, id, &mut ours) };
        }
    }
}

/// A mark in a stream's queue.
#[derive(Debug)]
pub struct Event {
    /// `None` where there is no CUDA.
    raw: Option<*mut shim::RawEvent>,
}

// SAFETY: CUDA events may be used from any thread; `&mut` keeps two threads from recording at once.
unsafe impl Send for Event {}

impl Event {
    /// `timed` events can be asked for the time between them, and cost a little more.
    ///
    /// # Errors
    /// CUDA is there and fails.
    pub fn new(timed: bool) -> Result<Self> {
        if crate::cuda_count() == 0 {
            return Ok(Self { raw: None });
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` receives an event that we own.
        shim::check(unsafe { shim::pkv_event_new(timed.into(), &mut raw) })?;
        Ok(Self { raw: Some(raw) })
    }

    /// A mark after everything that this thread has queued on `device` so far.
    ///
    /// # Errors
    /// The driver fails.
    pub fn now(device: Device) -> Result<Self> {
        let mut event = Self::new(false)?;
        event.record(&Stream::current(device)?)?;
        Ok(event)
    }

    /// Mark what is queued on `stream` so far; an earlier mark is forgotten.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record(&mut self, stream: &Stream) -> Result<()> {
        match (self.raw, stream.cuda) {
            // SAFETY: a live event, and numbers that libtorch gave.
            (Some(raw), Some((gpu, id))) => shim::check(unsafe { shim::pkv_event_record(raw, gpu, id) }),
            _ => Ok(()),
        }
    }

    /// Wait on the host until the mark is reached.
    ///
    /// # Errors
    /// A kernel queued before failed.
    pub fn synchronize(&self) -> Result<()> {
        match self.raw {
            // SAFETY: a live event.
            Some(raw) => shim::check(unsafe { shim::pkv_event_sync(raw) }),
            None => Ok(()),
        }
    }

    /// Is the mark reached? True if it was never recorded.
    ///
    /// # Errors
    /// A kernel queued before failed.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = 1;
        if let Some(raw) = self.raw {
            // SAFETY: a live event; `done` receives a flag.
            shim::check(unsafe { shim::pkv_event_query(raw, &mut done) })?;
        }
        Ok(done != 0)
    }

    /// GPU time from this mark to a later one, milliseconds; waits for the later one.
    ///
    /// # Errors
    /// There is no CUDA, an event was made without timing, or was not recorded.
    pub fn elapsed_ms(&self, later: &Self) -> Result<f64> {
        let (Some(from), Some(to)) = (self.raw, later.raw) else {
            bail!("events measure the time of a GPU; there is none");
        };
        later.synchronize()?;
        let mut ms = 0.0;
        // SAFETY: two live events; `ms` receives a number.
        shim::check(unsafe { shim::pkv_event_elapsed(from, to, &mut ms) })?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(raw) = self.raw {
            // SAFETY: ours, and freed once.
            unsafe { shim::pkv_event_free(raw) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn on_a_cpu_all_is_in_order() {
        let stream = Stream::current(Device::Cpu).unwrap();
        assert_eq!(stream, Stream::pool(Device::Cpu, true).unwrap());
        let _guard = stream.enter().unwrap();
        assert!(stream.handle().unwrap().is_null());
        let mut event = Event::new(true).unwrap();
        event.record(&stream).unwrap();
        stream.wait(&event).unwrap();
        stream.uses(&Tensor::zeros([2], (Kind::Float, Device::Cpu))).unwrap();
        assert!(event.is_done().unwrap());
        event.synchronize().unwrap();
        stream.synchronize().unwrap();
        if crate::cuda_count() == 0 {
            assert!(event.elapsed_ms(&event).unwrap_err().to_string().contains("there is none"));
            assert!(Stream::current(Device::Cuda(0)).is_err());
        }
    }

    #[test]
    fn two_streams_meet_at_an_event() {
        if crate::cuda_count() == 0 {
            return;
        }
        let gpu = Device::Cuda(0);
        let main = Stream::current(gpu).unwrap();
        let side = Stream::pool(gpu, true).unwrap();
        assert_ne!(main, side);
        assert!(!side.handle().unwrap().is_null());
        let a = Tensor::ones([2048, 2048], (Kind::Float, gpu));
        let (mut begun, mut made) = (Event::new(true).unwrap(), Event::new(true).unwrap());
        begun.record(&main).unwrap();
        side.wait(&begun).unwrap();
        let product = {
            let _guard = side.enter().unwrap();
            assert_eq!(Stream::current(gpu).unwrap(), side);
            side.uses(&a).unwrap();
            let product = a.matmul(&a);
            made.record(&side).unwrap();
            product
        };
        assert_eq!(Stream::current(gpu).unwrap(), main);
        main.wait(&made).unwrap();
        main.uses(&product).unwrap();
        assert_eq!(product.max().double_value(&[]), 2048.0);
        let ms = begun.elapsed_ms(&made).unwrap();
        assert!(ms > 0.0 && ms < 10_000.0, "{ms} ms");
        assert!(made.is_done().unwrap());
        let plain = Event::new(false).unwrap();
        assert!(plain.elapsed_ms(&made).is_err(), "made without timing");
    }
}
