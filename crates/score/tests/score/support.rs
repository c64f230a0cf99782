//! Where the tests compute.

use tch::Device;

/// The CPU, or what `PKV_TEST_DEVICE` names (`cuda`).
pub fn device() -> Device {
    let choice = std::env::var("PKV_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    // A model's f32 is exact f32 on a GPU too.
    pkv_gpu::set_tf32(false).unwrap();
    pkv_gpu::device(choice.parse().unwrap()).unwrap()
}
