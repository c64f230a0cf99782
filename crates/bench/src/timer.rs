//! Timing: one warm-up run, then the median of the others.

use std::time::Instant;

use anyhow::Result;
use pkv_gpu::{Event, Stream, unless_exhausted};
use tch::Device;

use crate::Setting;
use crate::row::{Measured, Row};

/// Times work by the setting's number of runs and time limit.
pub struct Timer<'a> {
    setting: Setting<'a>,
    /// Of a matrix product.
    flops_per_s: f64,
}

impl<'a> Timer<'a> {
    pub fn new(setting: Setting<'a>, flops_per_s: f64) -> Self {
        Self { setting, flops_per_s }
    }

    /// Fill in `row` with the times of `work`; its result is dropped within the measured time.
    ///
    /// # Errors
    /// Those of `work`, except running out of memory; and [`pkv_core::Interrupted`].
    pub fn time<T>(&self, row: Row, mut work: impl FnMut() -> Result<T>) -> Result<Row> {
        let _no_grad = tch::no_grad_guard();
        let Some(times) = unless_exhausted(|| self.times(&mut work))? else {
            tracing::info!("{}{} at {}: out of memory", row.what, row.apart, row.context);
            return Ok(row.out_of_memory());
        };
        let peaks: Vec<u64> = self.gpus().map(peak).collect::<Result<_>>()?;
        let device_peak_bytes = if peaks.len() > 1 { peaks.clone() } else { Vec::new() };
        let peak_bytes = peaks.into_iter().max();
        let median_s = median(&times);
        let measured = Measured {
            repeats: times.len(),
            median_s,
            min_s: times.iter().copied().fold(f64::INFINITY, f64::min),
            tokens_per_s: row.context as f64 / median_s,
            roofline_share: row.flops / median_s / self.flops_per_s,
            peak_bytes,
            device_peak_bytes,
        };
        let (what, runs) = (format!("{}{}", row.what, row.apart), times.len());
        let s = if runs == 1 { "" } else { "s" };
        tracing::info!("{what} at {}: {median_s:.4} s ({runs} run{s})", row.context);
        Ok(Row { measured: Some(measured), ..row })
    }

    /// Seconds that the device spends on `work`, by events around it: the median of the repeats. On a CPU
    /// seconds of the host; `None` where there is no memory.
    ///
    /// # Errors
    /// As [`Timer::time`].
    pub fn device_seconds<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<Option<f64>> {
        let _no_grad = tch::no_grad_guard();
        let mut measured = Vec::new();
        let times = unless_exhausted(|| {
            self.times(&mut || {
                if !self.setting.device.is_cuda() {
                    return work().map(drop);
                }
                let stream = Stream::current(self.setting.device)?;
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
        self.gpus().try_for_each(pkv_gpu::reset_peak)?;
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < self.setting.repeats && (times.len() < 2 || begin.elapsed() < self.setting.most) {
            times.push(self.once(work)?);
        }
        Ok(times)
    }

    /// Wait until all devices are idle.
    fn settle(&self) -> Result<()> {
        self.setting.target_devices.iter().try_for_each(|&device| pkv_gpu::synchronize(device))
    }

    fn gpus(&self) -> impl Iterator<Item = usize> {
        self.setting.target_devices.iter().filter_map(|device| match *device {
            Device::Cuda(gpu) => Some(gpu),
            _ => None,
        })
    }

    /// Seconds of one run, from an idle device to an idle device.
    fn once<T>(&self, work: &mut impl FnMut() -> Result<T>) -> Result<f64> {
        self.setting.stop.check()?;
        self.settle()?;
        let begin = Instant::now();
        drop(work()?);
        self.settle()?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// Most bytes of tensors on a GPU since the last reset.
fn peak(gpu: usize) -> Result<u64> {
    Ok(pkv_gpu::cuda_memory(gpu)?.allocated_peak.max(0) as u64)
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
    use std::path::Path;
    use std::time::Duration;

    use anyhow::bail;
    use pkv_core::{Interrupted, Stop};

    use super::*;

    /// Runs `test` with a timer of these limits on a CPU, and its cancellation flag.
    fn with_timer(repeats: usize, most: f64, test: impl FnOnce(&Timer, &Stop)) {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/demo-nano.toml");
        let (recipe, stop) = (pkv_recipe::load(&recipe, &[]).unwrap(), Stop::default());
        let most = Duration::from_secs_f64(most);
        let setting = Setting {
            recipe: &recipe,
            contexts: &[],
            device: Device::Cpu,
            target_devices: &[Device::Cpu],
            repeats,
            most,
            stop: &stop,
        };
        test(&Timer::new(setting, 1e9), &stop);
    }

    #[test]
    fn one_run_warms_up_and_slow_work_is_repeated_twice() {
        let mut runs = 0;
        let mut count = |ms| {
            runs += 1;
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        };
        with_timer(4, 10.0, |timer, _| {
            let m = timer.time(Row::new("a", 10, 1e6), || count(2)).unwrap().measured.unwrap();
            assert_eq!(m.repeats, 4);
            assert!(m.min_s >= 0.002 && m.median_s >= m.min_s && m.tokens_per_s <= 5000.0, "{m:?}");
            assert!((m.roofline_share * m.median_s - 1e-3).abs() < 1e-9);
        });
        with_timer(9, 0.001, |timer, _| {
            let row = timer.time(Row::new("a", 10, 1e6), || count(2)).unwrap();
            assert_eq!(row.measured.unwrap().repeats, 2);
        });
        assert_eq!(runs, 5 + 3);
    }

    #[test]
    fn short_memory_is_a_row_and_other_failures_are_errors() {
        with_timer(1, 1.0, |timer, stop| {
            let large = || Ok(tch::Tensor::empty([1 << 50, 1 << 10], (tch::Kind::Float, Device::Cpu)));
            let row = timer.time(Row::new("a", 1, 1.0), large).unwrap();
            assert_eq!((row.error, row.measured.is_none()), (Some(Row::OUT_OF_MEMORY), true));
            let fails = || -> Result<()> { bail!("a bad file") };
            assert_eq!(timer.time(Row::new("a", 1, 1.0), fails).unwrap_err().to_string(), "a bad file");
            stop.request();
            let e = timer.time(Row::new("a", 1, 1.0), || Ok(())).unwrap_err();
            assert!(e.downcast_ref::<Interrupted>().is_some());
        });
    }

    #[test]
    fn medians() {
        assert_eq!([median(&[3.0]), median(&[1.0, 9.0]), median(&[5.0, 1.0, 2.0])], [3.0, 5.0, 2.0]);
    }
}
