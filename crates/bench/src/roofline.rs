//! Peak rates of the device: a large matrix product and a large copy, measured in this run.

use std::time::Instant;

use anyhow::Result;
use pkv_recipe::plan::{human_bytes, human_flops};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::timer::median;

/// Ceilings of one device in one dtype.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Roofline {
    /// Of a square matrix product, random numbers, a multiply-add being two operations.
    pub flops_per_s: f64,
    /// Of a copy within device memory, bytes read and bytes written.
    pub copy_bytes_per_s: f64,
    /// Rows of the matrices.
    pub matrix: i64,
}

impl Roofline {
    /// On one line.
    pub fn text(&self) -> String {
        format!(
            "ceilings measured in this run: matrix product {}/s ({n} x {n} x {n}), copy {}/s",
            human_flops(self.flops_per_s),
            human_bytes(self.copy_bytes_per_s as u64),
            n = self.matrix
        )
    }
}

/// Measure a matrix product in `kind` (8192 cubed on a GPU) and a copy (2 GiB each way there).
///
/// # Errors
/// The device fails or has no room for it: 2 GiB each for source and copy.
pub fn measure(device: Device, kind: Kind) -> Result<Roofline> {
    let _no_grad = tch::no_grad_guard();
    let (n, bytes) = if device.is_cuda() { (8192, 2i64 << 30) } else { (1024, 64 << 20) };
    let matrix = || Tensor::f_randn([n, n], (kind, device));
    let (a, b, out) = (matrix()?, matrix()?, matrix()?);
    let secs = seconds(device, || {
        let _ = a.f_matmul_out(&out, &b)?;
        Ok(())
    })?;
    let flops_per_s = 2.0 * (n as f64).powi(3) / secs;
    let (source, mut copy) =
        (Tensor::f_zeros([bytes], (Kind::Uint8, device))?, Tensor::f_empty([bytes], (Kind::Uint8, device))?);
    let secs = seconds(device, || {
        copy.f_copy_(&source)?;
        Ok(())
    })?;
    let roofline = Roofline { flops_per_s, copy_bytes_per_s: 2.0 * bytes as f64 / secs, matrix: n };
    drop((a, b, out, source, copy));
    if device.is_cuda() {
        pkv_gpu::empty_cache()?;
    }
    tracing::info!(
        "matrix product of {n} x {n} in {}: {}/s; copy: {}/s",
        crate::dtype_name(kind),
        human_flops(roofline.flops_per_s),
        human_bytes(roofline.copy_bytes_per_s as u64)
    );
    Ok(roofline)
}

/// Seconds of one run of `work`: the median of five rounds of ten (three on a CPU) without a pause between.
fn seconds(device: Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let runs = if device.is_cuda() { 10 } else { 3 };
    let mut round = || -> Result<f64> {
        pkv_gpu::synchronize(device)?;
        let begin = Instant::now();
        for _ in 0..runs {
            work()?;
        }
        pkv_gpu::synchronize(device)?;
        Ok(begin.elapsed().as_secs_f64() / f64::from(runs))
    };
    round()?;
    let times = (0..5).map(|_| round()).collect::<Result<Vec<f64>>>()?;
    Ok(median(&times))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_ceilings_too() {
        let found = measure(Device::Cpu, Kind::Float).unwrap();
        // Between a very slow and an impossibly fast core.
        assert!((1e8..1e13).contains(&found.flops_per_s), "{found:?}");
        assert!((1e8..1e13).contains(&found.copy_bytes_per_s), "{found:?}");
    }
}
