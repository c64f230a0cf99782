//! Wall-clock times of kinds of work, summed.

use std::time::Instant;

use anyhow::Result;
use tch::Device;

use crate::results::Timing;

/// Times work on one device; what is queued there counts until it is done.
pub struct Clock {
    device: Device,
    timings: Vec<Timing>,
}

impl Clock {
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
        add(&mut self.timings, timing);
    }

    pub fn into_timings(self) -> Vec<Timing> {
        self.timings
    }
}

/// Count `timing` among others of its kind.
pub fn add(timings: &mut Vec<Timing>, timing: &Timing) {
    match timings.iter_mut().find(|t| t.what == timing.what) {
        Some(t) => {
            t.secs += timing.secs;
            t.times += timing.times;
        }
        None => timings.push(timing.clone()),
    }
}

/// Count all of `others`.
pub fn add_all(timings: &mut Vec<Timing>, others: &[Timing]) {
    others.iter().for_each(|t| add(timings, t));
}
