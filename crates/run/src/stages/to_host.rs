//! Asynchronous copies of results from the device to the thread that writes them.

use anyhow::{Context, Result};
use pkv_gpu::Event;
use tch::{Device, Kind, Tensor};

/// A tensor of f32 on its way to the host.
///
/// [`ToHost::begin`] queues the copy after the work at hand and returns at once: the host side is pinned
/// memory, which libtorch keeps for the next copy. [`ToHost::wait`], on any thread, has the numbers.
pub struct ToHost {
    host: Tensor,
    copied: Event,
}

impl ToHost {
    /// # Errors
    /// The GPU has failed, or the host has no memory left.
    pub fn begin(t: &Tensor) -> Result<Self> {
        let host = t.contiguous().f_to_device_(Device::Cpu, Kind::Float, true, false);
        let host = host.context("cannot copy a tensor to the host")?;
        Ok(Self { host, copied: Event::now(t.device())? })
    }

    /// The numbers, row by row.
    ///
    /// # Errors
    /// The work that the tensor comes from failed on the GPU.
    pub fn wait(self) -> Result<Vec<f32>> {
        self.copied.synchronize().context("cannot copy a tensor to the host")?;
        Vec::try_from(&self.host.view([-1])).context("cannot copy a tensor to the host")
    }
}
