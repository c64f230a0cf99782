//! Training KVzap-style networks: one per layer, several layers in a step, whose gradients are independent.
//!
//! Dimension key: as in [`super`]; n sampled position, b batch.

use anyhow::{Result, ensure};
use pkv_core::Seed;
use pkv_gpu::{AdamW, AdamWOptions, drop_gradients};
use tch::{Device, Kind, Tensor};

use super::Scorer;
use super::sample::SampledPositions;

/// Hidden units.
const WIDTH: i64 = 512;
const EPOCHS: i64 = 15;
const BATCH: i64 = 512;
const PEAK_RATE: f64 = 5e-3;
const MOST_NORM: f64 = 1.0;
/// Of what layers in one step read, on the device.
const GROUP_BYTES: i64 = 4 << 30;

/// A network per layer.
///
/// # Errors
/// Nothing was sampled, or a hidden state is not finite.
pub fn train(sample: &SampledPositions, seed: Seed, device: Device) -> Result<Scorer> {
    ensure!(sample.rows() > 0, "no position was sampled");
    let width = sample.tensors(0..1, Device::Cpu).0.size()[2];
    let group = (GROUP_BYTES / (4 * sample.rows() * width)).clamp(1, sample.layers() as i64) as usize;
    let mut parts: [Vec<Tensor>; 4] = Default::default();
    for first in (0..sample.layers()).step_by(group) {
        let range = first..(first + group).min(sample.layers());
        let (x_lnm, y_lnh) = sample.tensors(range, device);
        for (all, part) in parts.iter_mut().zip(train_group(&x_lnm, &y_lnh, first, seed)?) {
            all.push(part);
        }
    }
    let [up_lmw, up_bias_l1w, down_lwh, down_bias_l1h] = parts.map(|layers| Tensor::cat(&layers, 0));
    Ok(Scorer::Mlp { up_lmw, up_bias_l1w, down_lwh, down_bias_l1h })
}

/// Weights and biases of the layers from `first` on.
fn train_group(x_lnm: &Tensor, y_lnh: &Tensor, first: usize, seed: Seed) -> Result<[Tensor; 4]> {
    let device = x_lnm.device();
    let ((layers, rows, m), heads) = (x_lnm.size3()?, y_lnh.size()[2]);
    // Standardized, layer by layer; the last weights take it back.
    let mean_l11 = y_lnh.mean_dim([1, 2].as_slice(), true, Kind::Float);
    let std_l11 =
        (y_lnh - &mean_l11).square().mean_dim([1, 2].as_slice(), true, Kind::Float).sqrt().clamp_min(1e-6);
    let y_lnh = (y_lnh - &mean_l11) / &std_l11;
    let uniform = |name: &str, size: [i64; 2]| {
        let layer = |l: i64| {
            tch::manual_seed(seed.derive(name, first as u64 + l as u64) as i64);
            let x = Tensor::rand(size, (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
            (x / (size[0] as f64).sqrt()).to_device(device)
        };
        Tensor::stack(&(0..layers).map(layer).collect::<Vec<_>>(), 0).set_requires_grad(true)
    };
    let zeros = |n: i64| Tensor::zeros([layers, 1, n], (Kind::Float, device)).set_requires_grad(true);
    let (up_lmw, down_lwh) = (uniform("kvzap.up", [m, WIDTH]), uniform("kvzap.down", [WIDTH, heads]));
    let (up_bias_l1w, down_bias_l1h) = (zeros(WIDTH), zeros(heads));
    let params: Vec<Tensor> =
        [&up_lmw, &up_bias_l1w, &down_lwh, &down_bias_l1h].map(Tensor::shallow_clone).into();
    let mut optimizer = AdamW::new(params.iter().map(Tensor::shallow_clone).collect())?;
    let per_epoch = (rows / BATCH).max(1);
    for epoch in 0..EPOCHS {
        tch::manual_seed(seed.derive("kvzap.order", epoch as u64) as i64);
        let order_n = Tensor::randperm(rows, (Kind::Int64, Device::Cpu)).to_device(device);
        for batch in 0..per_epoch {
            let rows_b = order_n.narrow(0, batch * BATCH, BATCH.min(rows - batch * BATCH));
            let (x_lbm, y_lbh) = (x_lnm.index_select(1, &rows_b), y_lnh.index_select(1, &rows_b));
            drop_gradients(&params)?;
            tch::with_grad(|| {
                let hidden = (x_lbm.matmul(&up_lmw) + &up_bias_l1w).gelu("none");
                let off = hidden.matmul(&down_lwh) + &down_bias_l1h - &y_lbh;
                // A sum over layers: the gradient of each is that of its own mean.
                off.square().mean_dim([1, 2].as_slice(), false, Kind::Float).sum(Kind::Float).backward();
            });
            clip_by_layer(&params);
            let done = (epoch * per_epoch + batch) as f64 / (EPOCHS * per_epoch) as f64;
            optimizer.step(AdamWOptions {
                lr: PEAK_RATE * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.01,
            })?;
        }
    }
    let finite = down_lwh.isfinite().all().int64_value(&[]) != 0;
    ensure!(finite, "the networks from layer {first} on diverged: is one of the hidden states not finite?");
    let (down_lwh, down_bias_l1h) =
        (down_lwh.detach() * &std_l11, down_bias_l1h.detach() * &std_l11 + &mean_l11);
    Ok([up_lmw.detach(), up_bias_l1w.detach(), down_lwh, down_bias_l1h])
}

/// Scale each layer's gradients to a norm of [`MOST_NORM`] at most; `params` have layers first.
fn clip_by_layer(params: &[Tensor]) {
    let grads: Vec<Tensor> = params.iter().map(Tensor::grad).collect();
    let squares = |g: &Tensor| g.square().sum_dim_intlist([1, 2].as_slice(), true, Kind::Float);
    let norm_l11 = grads.iter().map(squares).reduce(|a, b| a + b).map(|sum| sum.sqrt());
    let Some(norm_l11) = norm_l11 else { return };
    let by_l11 = (MOST_NORM / (norm_l11 + 1e-6)).clamp_max(1.0);
    for mut grad in grads {
        grad *= &by_l11;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::rand(size, (Kind::Float, Device::Cpu)) * 4.0 - 2.0
    }

    fn truth(x: &Tensor, l: usize) -> Tensor {
        // On a scale of its own, which standardization must take back.
        (x.select(1, l as i64).abs() - x.select(1, 3) * x.select(1, 4)).unsqueeze(1) * (1 + 9 * l) as f64
            - 7.0
    }

    fn sample(rows: i64, m: i64, layers: usize) -> SampledPositions {
        let mut sample = SampledPositions::of(layers, rows as u64);
        for l in 0..layers {
            let x = random(&[rows, m]);
            sample.add(l, 0..rows as usize, rows as usize, &x, &truth(&x, l)).unwrap();
        }
        sample
    }

    /// A score that no linear map has: the networks of both layers find it.
    #[test]
    fn the_network_learns_what_the_linear_scorer_cannot() {
        let _no_grad = tch::no_grad_guard();
        tch::manual_seed(2);
        let mlp = train(&sample(4096, 6, 2), Seed(3), Device::Cpu).unwrap();
        for l in 0..2 {
            let x = random(&[500, 6]);
            let y = truth(&x, l).squeeze_dim(1);
            let got = mlp.layer(l as i64, &x).squeeze_dim(0);
            let unexplained = ((got - &y).square().mean(None) / y.var(false)).double_value(&[]);
            assert!(unexplained < 0.1, "layer {l}: {unexplained}");
        }
    }

    /// The number of layers per step depends on the device alone.
    #[test]
    fn layers_do_not_feel_each_other() {
        let _no_grad = tch::no_grad_guard();
        tch::manual_seed(4);
        let sample = sample(700, 6, 2);
        let (x_lnm, y_lnh) = sample.tensors(0..2, Device::Cpu);
        let together = train_group(&x_lnm, &y_lnh, 0, Seed(5)).unwrap();
        for l in 0..2 {
            let alone =
                train_group(&x_lnm.narrow(0, l, 1), &y_lnh.narrow(0, l, 1), l as usize, Seed(5)).unwrap();
            for (a, b) in alone.iter().zip(&together) {
                let off = (a.get(0) - b.get(l)).abs().max().double_value(&[]);
                assert!(off < 1e-3, "layer {l}: {off:e}");
            }
        }
    }
}
