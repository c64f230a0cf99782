//! Named parameters and how they start.
//!
//! Every parameter draws from a stream of its own name, so adding one leaves the others as they
//! were. Uniform draws only: they are exact in f32, while a normal's logarithm and cosine differ
//! between machines in the last bit.

use pkv_core::Seed;
use rand::Rng;
use tch::{Device, Kind, Tensor};

/// Collects parameters in the order in which the network is built.
pub(crate) struct ParamStore {
    seed: Seed,
    device: Device,
    entries: Vec<(String, Tensor)>,
}

impl ParamStore {
    pub fn new(seed: Seed, device: Device) -> Self {
        Self { seed, device, entries: Vec::new() }
    }

    /// Uniform in (-bound, bound), f32, trainable.
    pub fn uniform(&mut self, name: String, shape: &[usize], bound: f64) -> Tensor {
        let mut rng = self.seed.stream(&format!("mapper/{name}"), 0);
        // 24 random bits are what f32 holds; the half keeps zero out and the mean at 0.
        let mut draw =
            || f64::from(rng.random::<u32>() >> 8) / f64::from(1 << 23) + 0.5 / f64::from(1 << 23) - 1.0;
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| (draw() * bound) as f32).collect();
        self.add(name, Tensor::from_slice(&values).reshape(signed(shape)))
    }

    /// Uniform with the bound 1/sqrt(fan_in), which keeps the variance of what goes through.
    pub fn weight(&mut self, name: String, shape: &[usize], fan_in: usize) -> Tensor {
        self.uniform(name, shape, (fan_in.max(1) as f64).sqrt().recip())
    }

    /// All elements `value`, f32, trainable.
    pub fn constant(&mut self, name: String, shape: &[usize], value: f64) -> Tensor {
        let values = Tensor::full(signed(shape), value, (Kind::Float, Device::Cpu));
        self.add(name, values)
    }

    pub fn into_entries(self) -> Vec<(String, Tensor)> {
        self.entries
    }

    fn add(&mut self, name: String, values: Tensor) -> Tensor {
        let parameter = values.to_device(self.device).set_requires_grad(true);
        self.entries.push((name, parameter.shallow_clone()));
        parameter
    }
}

fn signed(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&n| n as i64).collect()
}
