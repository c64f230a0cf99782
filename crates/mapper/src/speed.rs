//! Where `hybrid-axial`'s time goes: each stage by itself, forward and backward. No assertion, so ignored by
//! default:
//!
//!     cargo test --release -p pkv-mapper --lib -- --ignored --nocapture speed_of_each_stage

use std::time::Instant;

use pkv_core::Seed;
use pkv_gpu::DeviceChoice;
use pkv_recipe::MapperSection;
use tch::{Device, Kind, Tensor};

use crate::context::Context;
use crate::cross::Cross;
use crate::params::{ParamStore, Pass, Weights};
use crate::standardize::MapperDims;
use crate::temporal::Temporal;

/// KV heads of features and of the target: the real pair with its proxy, with the target's own features, with
/// both, and the largest pair of the recipes.
const HEADS: [(usize, usize); 4] = [(48, 56), (56, 56), (104, 56), (250, 250)];

/// Best of three, ms: forward, and forward with backward.
fn times(device: Device, f: impl Fn() -> Tensor) -> [f64; 2] {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..3 {
        let start = Instant::now();
        let y = f();
        pkv_gpu::synchronize(device).unwrap();
        best[0] = best[0].min(start.elapsed().as_secs_f64() * 1e3);
        y.sum(Kind::Float).backward();
        pkv_gpu::synchronize(device).unwrap();
        best[1] = best[1].min(start.elapsed().as_secs_f64() * 1e3);
    }
    best
}

#[test]
#[ignore = "measures, does not judge"]
fn speed_of_each_stage() {
    let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
    // A CPU has time for one context, a GPU is filled by a batch.
    let (b, t) = if device.is_cuda() { (4, 4096) } else { (1, 512) };
    let section = MapperSection::default();
    let (n, d, m) = (section.cross_heads, section.head_width, section.width);
    println!(
        "{b} x {t} positions, {device:?}, {} threads; multiply-adds per position",
        tch::get_num_threads()
    );
    println!("heads   stage      M madd   forward ms   with backward ms");
    for (p, o) in HEADS {
        let dims = MapperDims { proxy_heads: p, channels: 9, globals: 4, outputs: o };
        let mut params = ParamStore::new(Seed(1), device);
        let temporal = Temporal::new(&mut params, &section, &dims);
        let context = Context::new(&mut params, &section, p * d + dims.globals);
        let cross = Cross::new(&mut params, &section, &dims);
        let weights = Weights::new(&params.into_entries(), Kind::Float);
        let pass = Pass { weights, dropout: 0.0 };
        let random = |shape: &[usize]| {
            let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
            Tensor::randn(shape, (Kind::Float, device)).set_requires_grad(true)
        };
        let features = random(&[b, p, 9, t]);
        let (tokens, flat, vector) =
            (random(&[b, p, t, d]), random(&[b, t, p * d + dims.globals]), random(&[b, t, m]));
        let block = m * m * section.kernel + 2 * section.feed_forward * m * m;
        let rows = [
            (
                "1 temporal",
                p * (9 * d + 2 * section.kernel * d * d),
                times(device, || temporal.forward(&pass, &features)),
            ),
            (
                "2 context",
                (p * d + 4) * m + section.dilations.len() * block,
                times(device, || context.forward(&pass, &flat)),
            ),
            (
                "3 cross",
                (p + 1) * n * o * (2 * d + 1),
                times(device, || cross.forward(&pass, &tokens, &vector)),
            ),
        ];
        for (stage, work, [forward, both]) in rows {
            println!("{p:>3} to {o:<3} {stage:<10} {:>6.2} {forward:>12.1} {both:>12.1}", work as f64 / 1e6);
        }
    }
}
