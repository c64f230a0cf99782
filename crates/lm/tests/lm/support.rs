//! Checkpoints, folders and comparisons that the tests share.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pkv_lm::LanguageModel;
use pkv_test_support::files;
use tch::{Device, Kind, Tensor};

pub use pkv_test_support::errors::{assert_error, assert_error_text};
pub use pkv_test_support::files::{architectures, lm_goldens as goldens, nano};
pub use pkv_test_support::tensors::{assert_close, difference};

/// Held by a test while it draws from libtorch's generator, which is that of all threads.
pub fn drawing() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
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
    files::golden_ids(name, "input_ids").unwrap()
}
