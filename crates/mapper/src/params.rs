//! Named parameters, their initialization, and the dtype in which a forward pass uses them.
//!
//! Every parameter draws from a stream of its own name, so adding one leaves the others as they
//! were. Uniform draws only: they are exact in f32, while a normal's logarithm and cosine differ
//! between machines in the last bit.

use std::ops::Index;

use anyhow::{Context, Result, ensure};
use pkv_core::{Seed, hinted};
use rand::Rng;
use tch::{Device, Kind, Tensor};

/// A parameter's place in the mapper's list.
#[derive(Clone, Copy)]
pub(crate) struct Param(usize);

/// The parameters as one forward uses them.
pub(crate) struct Weights(Vec<Tensor>);

impl Weights {
    /// The parameters themselves for f32; for another kind a copy that hands its gradient on to them,
    /// made in two kernels for all of them together. Those of the skip stay f32.
    pub fn new(parameters: &[(String, Tensor)], kind: Kind) -> Self {
        let mut all: Vec<Tensor> = parameters.iter().map(|(_, x)| x.shallow_clone()).collect();
        if kind == Kind::Float {
            return Self(all);
        }
        let places: Vec<usize> = (0..all.len()).filter(|&i| !parameters[i].0.starts_with("skip.")).collect();
        if places.is_empty() {
            return Self(all);
        }
        let flat: Vec<Tensor> = places.iter().map(|&i| all[i].reshape([-1])).collect();
        let sizes: Vec<i64> = flat.iter().map(|x| x.size()[0]).collect();
        let cast = Tensor::cat(&flat, 0).to_kind(kind).split_with_sizes(sizes, 0);
        for (&i, x) in places.iter().zip(cast) {
            all[i] = x.view(all[i].size().as_slice());
        }
        Self(all)
    }
}

impl Index<Param> for Weights {
    type Output = Tensor;

    fn index(&self, at: Param) -> &Tensor {
        &self.0[at.0]
    }
}

/// One forward: its weights, and what training does to it.
pub(crate) struct Pass {
    pub weights: Weights,
    /// Share of the context encoder's hidden numbers that are zeroed; 0 outside of training.
    pub dropout: f64,
}

impl Pass {
    /// Inverted dropout of `x`, if there is any.
    pub fn drop(&self, x: Tensor) -> Tensor {
        if self.dropout > 0.0 { x.dropout(self.dropout, true) } else { x }
    }
}

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
    pub fn uniform(&mut self, name: String, shape: &[usize], bound: f64) -> Param {
        let mut rng = self.seed.stream(&format!("mapper/{name}"), 0);
        // 24 random bits are what f32 holds; the half keeps zero out and the mean at 0.
        let mut draw =
            || f64::from(rng.random::<u32>() >> 8) / f64::from(1 << 23) + 0.5 / f64::from(1 << 23) - 1.0;
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| (draw() * bound) as f32).collect();
        self.add(name, Tensor::from_slice(&values).reshape(signed(shape)))
    }

    /// Uniform with the bound 1/sqrt(fan_in), which keeps the variance of what goes through.
    pub fn weight(&mut self, name: String, shape: &[usize], fan_in: usize) -> Param {
        self.uniform(name, shape, (fan_in.max(1) as f64).sqrt().recip())
    }

    /// All elements `value`, f32, trainable.
    pub fn constant(&mut self, name: String, shape: &[usize], value: f64) -> Param {
        let values = Tensor::full(signed(shape), value, (Kind::Float, Device::Cpu));
        self.add(name, values)
    }

    pub fn into_entries(self) -> Vec<(String, Tensor)> {
        self.entries
    }

    fn add(&mut self, name: String, values: Tensor) -> Param {
        let parameter = values.to_device(self.device).set_requires_grad(true);
        self.entries.push((name, parameter));
        Param(self.entries.len() - 1)
    }
}

/// Overwrite `parameters` by those of the same names; other tensors of `named` are left alone.
///
/// # Errors
/// One is missing or has another shape; then none is changed.
pub fn load_parameters(parameters: &[(String, Tensor)], named: &[(String, Tensor)]) -> Result<()> {
    let found: Vec<&Tensor> = parameters
        .iter()
        .map(|(name, mine)| {
            let (_, theirs) = named.iter().find(|(n, _)| n == name).with_context(|| {
                hinted(
                    format!("parameter `{name}` is missing"),
                    "these weights are of another `[mapper]` or `[loss]` section; use the recipe they were trained with",
                )
            })?;
            ensure!(
                theirs.size() == mine.size(),
                "parameter `{name}` has shape {:?}, expected {:?}",
                theirs.size(),
                mine.size()
            );
            Ok(theirs)
        })
        .collect::<Result<_>>()?;
    let _guard = tch::no_grad_guard();
    for ((_, mine), theirs) in parameters.iter().zip(found) {
        mine.shallow_clone().copy_(theirs);
    }
    Ok(())
}

fn signed(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&n| n as i64).collect()
}
