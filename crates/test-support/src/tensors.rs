//! Comparisons of tensors.

use tch::{Device, Kind, Tensor};

/// Largest absolute difference; NaN anywhere counts as infinite.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let exact = |t: &Tensor| t.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let worst = (exact(a) - exact(b)).abs().max().double_value(&[]);
    if worst.is_nan() { f64::INFINITY } else { worst }
}

/// Devices over which tests lay a model's layers, and how far results may differ from those of one device: on
/// a CPU not at all, over two GPUs by `gpus`.
pub fn device_groups(gpus: f64) -> Vec<(Vec<Device>, f64)> {
    let mut groups = vec![(vec![Device::Cpu; 2], 0.0), (vec![Device::Cpu; 3], 0.0)];
    match tch::Cuda::device_count() {
        0 | 1 => println!("skipped on GPUs: there are not two of them"),
        _ => groups.push((vec![Device::Cuda(0), Device::Cuda(1)], gpus)),
    }
    groups
}

/// [`difference`] over the largest magnitude expected, or over `floor` if that is more.
pub fn relative(found: &Tensor, expected: &Tensor, floor: f64) -> f64 {
    difference(found, expected) / expected.abs().max().double_value(&[]).max(floor)
}

/// Two tensors must be as close as `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let worst = difference(a, b);
    assert!(worst <= tolerance, "{what}: largest difference {worst:.3e}, tolerance {tolerance:.0e}");
}

/// All numbers of a tensor in f64, last dimension innermost.
pub fn flat(x: &Tensor) -> Vec<f64> {
    let on_cpu = x.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1).contiguous();
    Vec::try_from(on_cpu).expect("a tensor of numbers")
}
