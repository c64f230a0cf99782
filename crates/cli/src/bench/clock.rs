//! Timing: one warm-up run, then the median of the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use pkv_gpu::{Event, Stream, unless_exhausted};
use serde::Serialize;
use tch::Device;

use super::peer::PeerCell;
use super::roofline::Roofline;
use crate::args::BenchArgs;
use pkv_core::Interrupted;

/// A measurement at one length: its time, or that it did not fit.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub what: &'static str,
    /// Tokens.
    pub context: usize,
    /// Operations of one run, a multiply-add being two; counted, not measured.
    pub flops: f64,
    #[serde(flatten)]
    pub measured: Option<Measured>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    /// Time over that of the bare prefill at the same length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_prefill: Option<f64>,
    /// The peer's time for the same work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<PeerCell>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    pub repeats: usize,
    pub median_s: f64,
    pub min_s: f64,
    pub tokens_per_s: f64,
    /// `flops` per second of the median, over those of the matrix product.
    pub roofline_share: f64,
    /// Peak GPU memory of tensors, including the model; absent on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

impl Row {
    pub const OUT_OF_MEMORY: &'static str = "out of memory";

    pub fn new(what: &'static str, context: usize, flops: f64) -> Self {
        Self { what, context, flops, measured: None, error: None, over_prefill: None, peer: None }
    }

    pub fn out_of_memory(self) -> Self {
        Self { error: Some(Self::OUT_OF_MEMORY), ..self }
    }

    /// Compare with the bare prefill at the same length.
    pub fn compared_with(mut self, prefill: &Row) -> Self {
        if let (Some(own), Some(bare)) = (&self.measured, &prefill.measured) {
            self.over_prefill = Some(own.median_s / bare.median_s);
        }
        self
    }
}

/// Number of runs and time limit of a measurement.
pub struct Clock<'a> {
    device: Device,
    repeats: usize,
    most: Duration,
    roofline: &'a Roofline,
    stop: &'a AtomicBool,
}

impl<'a> Clock<'a> {
    pub fn new(device: Device, args: &BenchArgs, roofline: &'a Roofline, stop: &'a AtomicBool) -> Self {
        let most = Duration::try_from_secs_f64(args.max_seconds).unwrap_or(Duration::MAX);
        Self { device, repeats: args.repeats, most, roofline, stop }
    }

    /// Fill in `row` with the times of `work`; its result is dropped within the measured time.
    ///
    /// # Errors
    /// Those of `work`, except running out of memory; and [`Interrupted`].
    pub fn time<T>(&self, row: Row, mut work: impl FnMut() -> Result<T>) -> Result<Row> {
        let _no_grad = tch::no_grad_guard();
        let Some(times) = unless_exhausted(|| self.times(&mut work))? else {
            tracing::info!("{} at {}: out of memory", row.what, row.context);
            return Ok(row.out_of_memory());
        };
        let peak_bytes = match self.device {
            Device::Cuda(i) => Some(pkv_gpu::cuda_memory(i)?.allocated_peak.max(0) as u64),
            _ => None,
        };
        let median_s = median(&times);
        let measured = Measured {
            repeats: times.len(),
            median_s,
            min_s: times.iter().copied().fold(f64::INFINITY, f64::min),
            tokens_per_s: row.context as f64 / median_s,
            roofline_share: row.flops / median_s / self.roofline.flops_per_s,
            peak_bytes,
        };
        tracing::info!("{} at {}: {median_s:.4} s ({} runs)", row.what, row.context, times.len());
        Ok(Row { measured: Some(measured), ..row })
    }

    /// Seconds that the device spends on `work`, by events around it: the median of the repeats. On a CPU
    /// seconds of the host; `None` where there is no memory.
    ///
    /// # Errors
    /// As [`Clock::time`].
    pub fn device_seconds<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<Option<f64>> {
        let _no_grad = tch::no_grad_guard();
        let mut measured = Vec::new();
        let times = unless_exhausted(|| {
            self.times(&mut || {
                if !self.device.is_cuda() {
                    return work().map(drop);
                }
                let stream = Stream::current(self.device)?;
                let (mut begun, mut done) = (Event::new(true)?, Event::new(true)?);
                begun.record(&stream)?;
                drop(work()?);
                done.record(&stream)?;
                measured.push(begun.elapsed_ms(&done)? / 1e3);
                Ok(())
            })
        })?;
        // The first run warms up.
        Ok(times.map(|host| if measured.len() > 1 { median(&measured[1..]) } else { median(&host) }))
    }

    fn times<T>(&self, work: &mut impl FnMut() -> Result<T>) -> Result<Vec<f64>> {
        self.once(work)?;
        if let Device::Cuda(i) = self.device {
            pkv_gpu::reset_peak(i)?;
        }
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < self.repeats && (times.len() < 2 || begin.elapsed() < self.most) {
            times.push(self.once(work)?);
        }
        Ok(times)
    }

    /// Seconds of one run, from an idle device to an idle device.
    fn once<T>(&self, work: &mut impl FnMut() -> Result<T>) -> Result<f64> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        pkv_gpu::synchronize(self.device)?;
        let begin = Instant::now();
        drop(work()?);
        pkv_gpu::synchronize(self.device)?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// The middle one, or the mean of the two in the middle; `times` is not empty.
pub fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    fn roofline() -> Roofline {
        Roofline { flops_per_s: 1e9, copy_bytes_per_s: 1e9, matrix: 1 }
    }

    fn clock<'a>(roofline: &'a Roofline, stop: &'a AtomicBool, repeats: usize, most: f64) -> Clock<'a> {
        let most = Duration::from_secs_f64(most);
        Clock { device: Device::Cpu, repeats, most, roofline, stop }
    }

    #[test]
    fn one_run_warms_up_and_slow_work_is_repeated_twice() {
        let (roofline, stop) = (roofline(), AtomicBool::new(false));
        let mut runs = 0;
        let mut count = |ms| {
            runs += 1;
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        };
        let row = clock(&roofline, &stop, 4, 10.0).time(Row::new("a", 10, 1e6), || count(2)).unwrap();
        let m = row.measured.unwrap();
        assert_eq!(m.repeats, 4);
        assert!(m.min_s >= 0.002 && m.median_s >= m.min_s && m.tokens_per_s <= 5000.0, "{m:?}");
        assert!((m.roofline_share * m.median_s - 1e-3).abs() < 1e-9);
        let row = clock(&roofline, &stop, 9, 0.001).time(Row::new("a", 10, 1e6), || count(2)).unwrap();
        assert_eq!((row.measured.unwrap().repeats, runs), (2, 5 + 3));
    }

    #[test]
    fn short_memory_is_a_row_and_other_failures_are_errors() {
        let (roofline, stop) = (roofline(), AtomicBool::new(false));
        let clock = clock(&roofline, &stop, 1, 1.0);
        let large = || Ok(tch::Tensor::empty([1 << 50, 1 << 10], (tch::Kind::Float, Device::Cpu)));
        let row = clock.time(Row::new("a", 1, 1.0), large).unwrap();
        assert_eq!((row.error, row.measured.is_none()), (Some(Row::OUT_OF_MEMORY), true));
        let fails = || -> Result<()> { bail!("a bad file") };
        assert_eq!(clock.time(Row::new("a", 1, 1.0), fails).unwrap_err().to_string(), "a bad file");
        stop.store(true, Ordering::Relaxed);
        let e = clock.time(Row::new("a", 1, 1.0), || Ok(())).unwrap_err();
        assert!(e.downcast_ref::<Interrupted>().is_some());
    }

    #[test]
    fn medians() {
        assert_eq!([median(&[3.0]), median(&[1.0, 9.0]), median(&[5.0, 1.0, 2.0])], [3.0, 5.0, 2.0]);
    }
}
