//! A device and a stream on it, on which one model runs.

use anyhow::Result;
use pkv_gpu::{Stream, StreamGuard};
use tch::Device;

/// One of the activities that may run at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    name: &'static str,
    device: Device,
    stream: Stream,
}

impl Lane {
    /// The stream that this thread works on anyway.
    ///
    /// # Errors
    /// The GPU does not exist.
    pub fn here(name: &'static str, device: Device) -> Result<Self> {
        Ok(Self { name, device, stream: Stream::current(device)? })
    }

    /// A stream beside it whose kernels go first. The proxy's side has it: its kernels are small and
    /// leave most of a GPU to the target's, and the sooner its scores are there the sooner is pruned.
    ///
    /// # Errors
    /// The GPU does not exist.
    pub fn beside(name: &'static str, device: Device) -> Result<Self> {
        Ok(Self { name, device, stream: Stream::pool(device, true)? })
    }

    /// Work of this thread goes here until the guard is dropped.
    ///
    /// # Errors
    /// The driver fails.
    pub fn enter(&self) -> Result<StreamGuard> {
        self.stream.enter()
    }

    /// Wait until all work queued here is done.
    ///
    /// # Errors
    /// A kernel queued before failed.
    pub fn settle(&self) -> Result<()> {
        self.stream.synchronize()
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub const fn device(&self) -> Device {
        self.device
    }
}
