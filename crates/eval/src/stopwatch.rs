//! Wall-clock times of kinds of work on a device.

use std::time::Instant;

use anyhow::Result;
use pkv_results::{Timing, timings};
use tch::Device;

/// Times work on one device; what is queued there counts until it is done.
pub struct Stopwatch {
    device: Device,
    timings: Vec<Timing>,
}

impl Stopwatch {
    pub fn new(device: Device) -> Self {
        Self { device, timings: Vec::new() }
    }

    /// Do `work` and count its time under `what`.
    pub fn time<T>(&mut self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        pkv_gpu::synchronize(self.device)?;
        let begun = Instant::now();
        let out = work()?;
        pkv_gpu::synchronize(self.device)?;
        self.add(&Timing { what: what.to_owned(), secs: begun.elapsed().as_secs_f64(), times: 1 });
        Ok(out)
    }

    pub fn add(&mut self, timing: &Timing) {
        timings::add(&mut self.timings, timing);
    }

    pub fn into_timings(self) -> Vec<Timing> {
        self.timings
    }
}
