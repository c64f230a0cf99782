//! Times of forward and backward on this machine; no assertion, so ignored by default. The loss and the
//! optimizer: `crates/train/examples/step_time.rs`.

use std::time::Instant;

use pkv_core::Seed;
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::{MapperSection, Variant};

use crate::fixtures::{device, random};

#[test]
#[ignore = "measures, does not judge"]
fn speed_of_a_training_step() {
    let device = device();
    let dims = MapperDims { proxy_heads: 12, channels: 8, globals: 4, outputs: 36 };
    let (heads, globals) = (random(1, &[16, 12, 8, 1000]), random(2, &[16, 4, 1000]));
    let (heads, globals) = (heads.to_device(device), globals.to_device(device));
    println!("{} threads, {device:?}, 16 contexts of 1000 positions, best of 5", tch::get_num_threads());
    for variant in [Variant::HybridAxial, Variant::Conv, Variant::Mlp, Variant::Linear] {
        let section = MapperSection { variant, ..MapperSection::default() };
        let stats = Standardization::identity(&dims);
        let mapper = Mapper::new(&section, dims, stats, Seed(1), device).unwrap();
        let mut best = [f64::INFINITY; 2];
        for _ in 0..5 {
            let mut start = Instant::now();
            let mut lap = |slot: &mut f64| {
                pkv_gpu::synchronize(device).unwrap();
                *slot = slot.min(start.elapsed().as_secs_f64() * 1e3);
                start = Instant::now();
            };
            let scores = mapper.forward(&heads, &globals);
            lap(&mut best[0]);
            scores.square().mean(None).backward();
            lap(&mut best[1]);
            mapper.parameters().iter().for_each(|(_, x)| x.shallow_clone().zero_grad());
        }
        let [forward, backward] = best;
        println!(
            "{variant:?}: {} parameters, forward {forward:.0} ms, backward {backward:.0} ms",
            mapper.parameter_count()
        );
    }
}
