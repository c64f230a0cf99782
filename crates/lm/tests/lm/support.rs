//! Checkpoints, folders and comparisons that the tests share.

use std::path::{Path, PathBuf};

use pkv_lm::LanguageModel;
use tch::{Device, Kind, Tensor};

/// The random-weight checkpoints that lie beside their goldens.
pub const ARCHITECTURES: [&str; 5] = [
    "arch-llama3-rope-untied",
    "arch-qwen2-bias",
    "arch-qwen2-yarn",
    "arch-qwen3-qknorm",
    "arch-granite-multipliers",
];

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

pub fn nano(which: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/nano-llama").join(which)
}

/// Trained models that goldens exist for; `scripts/real_models.py` makes their folders.
pub const TRAINED: [&str; 2] = ["smollm2-135m", "qwen2.5-coder-0.5b"];

/// The folder of a checkpoint that goldens exist for.
///
/// The tiny pair and the trained models are too large for the project: `PKV_FAMILY` names the folder that
/// holds them.
pub fn checkpoint(name: &str) -> Option<PathBuf> {
    match name {
        "nano-llama-target" => Some(nano("target")),
        "nano-llama-proxy" => Some(nano("proxy")),
        _ if name.starts_with("arch-") => Some(goldens().join(name)),
        _ => {
            let folder = PathBuf::from(std::env::var_os("PKV_FAMILY")?).join(name);
            folder.is_dir().then_some(folder)
        }
    }
}

/// Where models run: the CPU, or what `PKV_TEST_DEVICE` names (`cuda`).
pub fn device() -> Device {
    let choice = std::env::var("PKV_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    pkv_gpu::device(choice.parse().unwrap()).unwrap()
}

/// Load in f32.
pub fn load(folder: &Path) -> LanguageModel {
    // Models this small gain nothing from a second thread, and lose much where cores are shared.
    tch::set_num_threads(1);
    LanguageModel::load(folder, device(), Kind::Float).unwrap()
}

/// A golden file's tensors by name.
pub fn golden(name: &str) -> impl Fn(&str) -> Tensor {
    let path = goldens().join(format!("{name}.safetensors"));
    let tensors = Tensor::read_safetensors(&path).unwrap();
    move |key| tensors.iter().find(|(name, _)| name == key).unwrap().1.shallow_clone()
}

pub fn golden_ids(name: &str) -> Vec<u32> {
    Vec::<i64>::try_from(golden(name)("input_ids")).unwrap().into_iter().map(|id| id as u32).collect()
}

/// Largest absolute difference; NaN anywhere counts as infinite.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double);
    let worst = (exact(a) - exact(b)).abs().max().double_value(&[]);
    if worst.is_nan() { f64::INFINITY } else { worst }
}

#[track_caller]
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let worst = difference(a, b);
    assert!(worst <= tolerance, "{what}: largest difference {worst:.3e}, tolerance {tolerance:.0e}");
}

/// The chain of an error must hold all of `parts`, and a hint.
#[track_caller]
pub fn assert_error<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("expected an error with {parts:?}") };
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    let hint = error.chain().find_map(|e| e.downcast_ref::<pkv_core::Hinted>());
    let hinted = hint.is_some() || error.downcast_ref::<pkv_core::Hinted>().is_some();
    assert!(hinted, "no hint with: {text}");
}

/// The chain of an error must hold `part`.
#[track_caller]
pub fn assert_error_text<T>(result: anyhow::Result<T>, part: &str) {
    let Err(error) = result else { panic!("expected an error with `{part}`") };
    let text = format!("{error:#}");
    assert!(text.contains(part), "`{part}` is not in: {text}");
}
