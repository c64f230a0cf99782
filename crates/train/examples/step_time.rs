//! Time of a training step, part by part, on synthetic data of a given size.
//!
//! `cargo run --release -p pkv-train --example step_time -- hybrid-axial 16 1000 12 36`
//! (variant, contexts, positions, proxy KV heads, target KV heads; 8 channels, 4 globals).

use std::time::Instant;

use anyhow::{Context, Result};
use pkv_core::Seed;
use pkv_gpu::{AdamW, AdamWOptions, DeviceChoice, clip_global_norm};
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::{LossSection, MapperSection};
use pkv_train::HybridLoss;
use tch::{Kind, Tensor};

const STEPS: usize = 5;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: i64| args.get(i).map_or(Ok(default), |a| a.parse().context("a size"));
    let variant = args.first().map_or("hybrid-axial", String::as_str);
    let variant = serde_json::from_value(variant.into()).context("a variant")?;
    let (b, t, p, o) = (number(1, 16)?, number(2, 1000)?, number(3, 12)?, number(4, 36)?);
    let device = pkv_gpu::device(DeviceChoice::Auto)?;

    let dims = MapperDims { proxy_heads: p as usize, channels: 8, globals: 4, outputs: o as usize };
    let section = MapperSection { variant, ..MapperSection::default() };
    let mapper = Mapper::new(&section, dims, Standardization::identity(&dims), Seed(1), device)?;
    let loss = HybridLoss::new(&LossSection::default(), mapper.standardization())?;
    let named = mapper.parameters().iter().chain(loss.parameters());
    let mut parameters: Vec<Tensor> = named.map(|(_, x)| x.shallow_clone()).collect();
    let mut adamw = AdamW::new(parameters.iter().map(Tensor::shallow_clone).collect())?;
    let noise = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
    let (heads, globals, y) = (noise(&[b, p, 8, t]), noise(&[b, 4, t]), noise(&[b, o, t]) * 2.0 - 4.0);

    let names = ["forward", "loss", "backward", "clip and AdamW"];
    let mut secs = [0.0; 4];
    for step in 0..=STEPS {
        parameters.iter_mut().for_each(Tensor::zero_grad);
        let mut part = 0;
        let mut last = Instant::now();
        let mut lap = || {
            let _ = pkv_gpu::synchronize(device);
            // The first step warms up.
            if step > 0 {
                secs[part] += last.elapsed().as_secs_f64();
            }
            (part, last) = (part + 1, Instant::now());
        };
        let scores = mapper.forward(&heads, &globals);
        lap();
        let terms = loss.of(&scores, &y, 1)?;
        lap();
        terms.total.backward();
        lap();
        let _norm = clip_global_norm(&parameters, 1.0)?;
        adamw.step(AdamWOptions { lr: 1e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.02 })?;
        lap();
    }
    println!("{} parameters, {} threads, {device:?}", mapper.parameter_count(), tch::get_num_threads());
    for (name, s) in names.iter().zip(secs) {
        println!("{name:>16} {:8.1} ms", s * 1e3 / STEPS as f64);
    }
    let total: f64 = secs.iter().sum();
    println!("{:>16} {:8.1} ms", "step", total * 1e3 / STEPS as f64);
    Ok(())
}
