//! States and folders that the other files use.

use std::fs;
use std::path::Path;

use pkv_checkpoint::{NamedTensors, TrainingState};
use pkv_core::Fingerprint;
use serde_json::json;
use tch::{Kind, Tensor};

pub use pkv_test_support::errors::text_and_hint;
pub use pkv_test_support::files::files;

/// libtorch is linked only into a binary that calls `pkv-gpu`.
pub fn cpu() -> tch::Device {
    pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap()
}

/// Numbers that a lossy format would change: a negative zero, a subnormal, the largest, and some of each
/// step.
pub fn numbers(step: u64, n: i64) -> Tensor {
    let special = [-0.0f32, 1e-42, f32::MAX, 0.1];
    let own = (0..n - 4).map(|i| (step as f32 + 1.0) / (i as f32 + 3.0));
    Tensor::from_slice(&special.into_iter().chain(own).collect::<Vec<_>>())
}

pub fn state(step: u64, validation: Option<f64>, ema: bool) -> TrainingState {
    // Not in alphabetical order: the mapper's order must survive.
    let network: NamedTensors = vec![
        ("skip.weight".into(), numbers(step, 12).reshape([3, 4])),
        ("context.bias".into(), numbers(step + 1, 5)),
    ];
    let loss: NamedTensors = vec![("loss.scale".into(), Tensor::from(step as f32 / 7.0))];
    let like = |k: f64| network.iter().chain(&loss).map(|(_, t)| t * k).collect::<Vec<_>>();
    TrainingState {
        step,
        buffers: vec![
            ("standardize.mean".into(), numbers(9, 6)),
            ("none".into(), Tensor::zeros([0, 3], (Kind::Float, cpu()))),
        ],
        first_moments: like(0.5),
        second_moments: like(0.25),
        ema: if ema { like(-1.0) } else { Vec::new() },
        validation,
        extra: json!({"window": [step, u64::MAX]}),
        network,
        loss,
    }
}

pub fn choices() -> Fingerprint {
    Fingerprint::new().with("train", json!({"lr": 2e-3, "steps": 1500}))
}

/// Bit patterns, so that zeros and their signs count.
pub fn bits(t: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = Vec::try_from(t.detach().reshape([-1])).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[track_caller]
pub fn same_tensors(a: &[Tensor], b: &[Tensor]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!((a.size(), bits(a)), (b.size(), bits(b)));
    }
}

#[track_caller]
pub fn same_named(a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    let split = |x: &[(String, Tensor)]| -> (Vec<String>, Vec<Tensor>) {
        x.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).unzip()
    };
    let ((a_names, a), (b_names, b)) = (split(a), split(b));
    assert_eq!(a_names, b_names);
    same_tensors(&a, &b);
}

#[track_caller]
pub fn same_state(a: &TrainingState, b: &TrainingState) {
    assert_eq!((a.step, a.validation, &a.extra), (b.step, b.validation, &b.extra));
    same_named(&a.network, &b.network);
    same_named(&a.loss, &b.loss);
    same_named(&a.buffers, &b.buffers);
    same_tensors(&a.first_moments, &b.first_moments);
    same_tensors(&a.second_moments, &b.second_moments);
    same_tensors(&a.ema, &b.ema);
}

/// Names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut out: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    out.sort();
    out
}
