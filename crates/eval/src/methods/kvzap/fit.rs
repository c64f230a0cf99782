//! Fitting KVzap-style scorers while the target prefills training contexts.
//!
//! Hidden states of all training positions are never held: the linear scorers need sums of products alone, the networks a
//! sample of positions that a few GB of host memory bound.
//!
//! Dimension key: as in [`super`]; n sampled position, b batch.

use anyhow::{Context, Result, ensure};
use pkv_core::Seed;
use pkv_gpu::{AdamW, AdamWOptions, clip_global_norm, drop_gradients};
use pkv_lm::{LanguageModel, LayerView, Tap};
use pkv_recipe::Method;
use tch::{Device, Kind, Tensor};

use super::{Kvzap, Linear, Mlp, check, of_context};

/// Penalty of the ridge regression, in units of one position.
const PENALTY: f64 = 1.0;
/// Hidden units of a network.
const WIDTH: i64 = 512;
/// Sampled positions of a layer, and the bytes that those of all layers may take: what the spacing aims at, of each prefill
/// chunk. It is rounded down, so that up to twice as many are taken of a context of one chunk.
const MOST_ROWS: i64 = 65_536;
const MOST_BYTES: i64 = 2 << 30;
const EPOCHS: i64 = 15;
const BATCH: i64 = 512;
const PEAK_RATE: f64 = 5e-3;

/// Scorers in the making.
pub struct KvzapFit {
    /// Sums over positions of x x^T and x y^T, x with a one behind it, f64; one pair per layer.
    sums: Option<Vec<(Tensor, Tensor)>>,
    sample: Option<Sample>,
    seed: Seed,
    contexts: usize,
    tokens: usize,
}

/// Evenly spaced positions of every context, on the host.
struct Sample {
    per_context: i64,
    /// Per layer: f32 `[n, m]` and `[n, h]` of each context.
    x: Vec<Vec<Tensor>>,
    y: Vec<Vec<Tensor>>,
}

impl KvzapFit {
    /// For those of `methods` that are KVzap's, from `contexts` contexts; nothing if none is.
    pub fn new(methods: &[Method], target: &LanguageModel, contexts: u64, seed: Seed) -> Option<Self> {
        let wants = |m: Method| methods.contains(&m);
        if !wants(Method::KvzapLinear) && !wants(Method::KvzapMlp) {
            return None;
        }
        let shape = target.shape();
        let (wide, heads) = (shape.hidden as i64 + 1, shape.kv_heads as i64);
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Double, target.device()));
        let sums = wants(Method::KvzapLinear)
            .then(|| (0..shape.layers).map(|_| (zeros([wide, wide]), zeros([wide, heads]))).collect());
        let row_bytes = (shape.layers * (shape.hidden + shape.kv_heads) * 4) as i64;
        let rows = MOST_ROWS.min(MOST_BYTES / row_bytes.max(1));
        let none = || (0..shape.layers).map(|_| Vec::new()).collect();
        let sample = wants(Method::KvzapMlp).then(|| Sample {
            per_context: (rows / contexts.max(1) as i64).max(1),
            x: none(),
            y: none(),
        });
        Some(Self { sums, sample, seed, contexts: 0, tokens: 0 })
    }

    /// Prefill a context behind `prefix` and learn from it.
    ///
    /// `y_lht`: log-odds of its labels, pooled or not, f32 `[layers, KV heads, positions]`.
    ///
    /// # Errors
    /// The target cannot read it, or the labels are of another shape.
    pub fn add(
        &mut self,
        target: &LanguageModel,
        prefix: &[u32],
        context: &[u32],
        chunk_tokens: usize,
        y_lht: &Tensor,
    ) -> Result<()> {
        check(y_lht, target.shape().layers, context.len())?;
        let ids = [prefix, context].concat();
        let mut cache = target.new_cache(ids.len());
        let mut tap = FitTap { fit: self, prefix: prefix.len(), y_lht };
        target.prefill_for_tap(&ids, &mut cache, chunk_tokens, &mut tap)?;
        self.contexts += 1;
        self.tokens += context.len();
        Ok(())
    }

    /// The scorers, and what they cost in words.
    ///
    /// # Errors
    /// Nothing was added, or a hidden state is not finite.
    pub fn solve(self, device: Device) -> Result<(Kvzap, String)> {
        ensure!(self.contexts > 0, "no training context to fit KVzap-style scorers on");
        let cost = format!(
            "from the target's hidden states; fitted by prefilling {} training contexts, {} tokens",
            self.contexts, self.tokens
        );
        let linear = self.sums.as_deref().map(solve).transpose()?;
        let mlp = self.sample.map(|sample| sample.train(self.seed, device)).transpose()?;
        Ok((Kvzap { linear, mlp }, cost))
    }
}

struct FitTap<'a> {
    fit: &'a mut KvzapFit,
    prefix: usize,
    y_lht: &'a Tensor,
}

impl Tap for FitTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        let n = x_sm.size()[0];
        let first = view.start.max(self.prefix) - self.prefix;
        let y_sh = self.y_lht.get(view.layer as i64).narrow(1, first as i64, n).transpose(0, 1);
        if let Some(sums) = &mut self.fit.sums {
            let (xx, xy) = sums.get_mut(view.layer).context("a layer that the target does not have")?;
            let ones = Tensor::ones([n, 1], (Kind::Float, x_sm.device()));
            let x = Tensor::cat(&[&x_sm, &ones], 1).to_kind(Kind::Double);
            *xx += x.transpose(0, 1).matmul(&x);
            *xy += x.transpose(0, 1).matmul(&y_sh.to_kind(Kind::Double));
        }
        if let Some(sample) = &mut self.fit.sample {
            let step = (n / sample.per_context).max(1);
            let pick =
                |rows: &Tensor| rows.slice(0, 0, n, step).to_kind(Kind::Float).to_device(Device::Cpu).copy();
            sample.x.get_mut(view.layer).context("a layer that the target does not have")?.push(pick(&x_sm));
            sample.y[view.layer].push(pick(&y_sh));
        }
        Ok(())
    }
}

/// Ridge regression of every layer; the intercept is not penalized.
fn solve(sums: &[(Tensor, Tensor)]) -> Result<Linear> {
    let (mut weights, mut biases) = (Vec::new(), Vec::new());
    for (layer, (xx, xy)) in sums.iter().enumerate() {
        let m = xx.size()[0] - 1;
        let penalty = Tensor::cat(
            &[
                Tensor::full([m], PENALTY, (Kind::Double, xx.device())),
                Tensor::zeros([1], (Kind::Double, xx.device())),
            ],
            0,
        );
        let factor = (xx + penalty.diag(0)).f_linalg_cholesky(false).with_context(|| {
            format!("the hidden states of layer {layer} have no ridge solution: is one of them not finite?")
        })?;
        let solution = xy.cholesky_solve(&factor, false).to_kind(Kind::Float);
        weights.push(solution.narrow(0, 0, m));
        biases.push(solution.get(m));
    }
    Ok(Linear { weight_lmh: Tensor::stack(&weights, 0), bias_lh: Tensor::stack(&biases, 0) })
}

impl Sample {
    /// A network per layer, all layers in one step.
    fn train(self, seed: Seed, device: Device) -> Result<Mlp> {
        let whole = |layers: &[Vec<Tensor>]| {
            let layers: Vec<Tensor> = layers.iter().map(|rows| Tensor::cat(rows, 0)).collect();
            Tensor::stack(&layers, 0).to_device(device)
        };
        let (x_lnm, y_lnh) = (whole(&self.x), whole(&self.y));
        let (mean, std) = (y_lnh.mean(None), y_lnh.std(false).clamp_min(1e-6));
        let y_lnh = (&y_lnh - &mean) / &std;
        let ((layers, rows, m), heads) = (x_lnm.size3()?, y_lnh.size()[2]);
        tch::manual_seed(seed.derive("kvzap.start", 0) as i64);
        let uniform = |size: [i64; 3]| {
            let x = Tensor::rand(size, (Kind::Float, device)) * 2.0 - 1.0;
            (x / (size[1] as f64).sqrt()).set_requires_grad(true)
        };
        let zeros = |size: [i64; 3]| Tensor::zeros(size, (Kind::Float, device)).set_requires_grad(true);
        let (up_lmw, down_lwh) = (uniform([layers, m, WIDTH]), uniform([layers, WIDTH, heads]));
        let (up_bias_l1w, down_bias_l1h) = (zeros([layers, 1, WIDTH]), zeros([layers, 1, heads]));
        let params: Vec<Tensor> =
            [&up_lmw, &up_bias_l1w, &down_lwh, &down_bias_l1h].map(Tensor::shallow_clone).into();
        let mut optimizer = AdamW::new(params.iter().map(Tensor::shallow_clone).collect())?;
        let per_epoch = (rows / BATCH).max(1);
        for epoch in 0..EPOCHS {
            tch::manual_seed(seed.derive("kvzap.order", epoch as u64) as i64);
            let order_n = Tensor::randperm(rows, (Kind::Int64, device));
            for batch in 0..per_epoch {
                let rows_b = order_n.narrow(0, batch * BATCH, BATCH.min(rows - batch * BATCH));
                let (x_lbm, y_lbh) = (x_lnm.index_select(1, &rows_b), y_lnh.index_select(1, &rows_b));
                drop_gradients(&params)?;
                tch::with_grad(|| {
                    let hidden = (x_lbm.matmul(&up_lmw) + &up_bias_l1w).gelu("none");
                    let off = hidden.matmul(&down_lwh) + &down_bias_l1h - &y_lbh;
                    // A sum, so that a layer's gradient does not shrink with their number; only the clipping joins them.
                    (off.square().mean(None) * layers as f64).backward();
                });
                let _norm = clip_global_norm(&params, 1.0)?;
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
        let [up_lmw, up_bias_l1w, down_lwh, down_bias_l1h] =
            [up_lmw, up_bias_l1w, down_lwh, down_bias_l1h].map(|p| p.detach());
        let (mean, std) = (mean.double_value(&[]), std.double_value(&[]));
        Ok(Mlp { up_lmw, up_bias_l1w, down_lwh, down_bias_l1h, mean, std })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::rand(size, (Kind::Float, Device::Cpu)) * 4.0 - 2.0
    }

    /// Against the normal equations solved by elimination in f64.
    #[test]
    fn the_linear_scorer_is_the_ridge_solution() {
        tch::manual_seed(1);
        let (x, y) = (random(&[50, 4]), random(&[50, 2]));
        let with_one =
            Tensor::cat(&[&x, &Tensor::ones([50, 1], (Kind::Float, Device::Cpu))], 1).to_kind(Kind::Double);
        let xx = with_one.transpose(0, 1).matmul(&with_one);
        let xy = with_one.transpose(0, 1).matmul(&y.to_kind(Kind::Double));
        let linear = solve(&[(xx.copy(), xy.copy())]).unwrap();
        let mut a: Vec<Vec<f64>> = Vec::try_from(&Tensor::cat(&[xx, xy], 1)).unwrap();
        (0..4).for_each(|i| a[i][i] += PENALTY);
        for pivot in 0..5 {
            let row = a[pivot].clone();
            for (r, other) in a.iter_mut().enumerate() {
                let by = if r == pivot { 1.0 - 1.0 / row[pivot] } else { other[pivot] / row[pivot] };
                other.iter_mut().zip(&row).for_each(|(x, p)| *x -= by * p);
            }
        }
        for (i, row) in a.iter().enumerate() {
            for h in 0..2 {
                let got = match i {
                    4 => linear.bias_lh.double_value(&[0, h]),
                    _ => linear.weight_lmh.double_value(&[0, i as i64, h]),
                };
                assert!((got - row[5 + h as usize]).abs() < 1e-5, "{i} {h}: {got}, {}", row[5 + h as usize]);
            }
        }
    }

    /// A score that no linear map has: the networks of both layers find it.
    #[test]
    fn the_network_learns_what_the_linear_scorer_cannot() {
        tch::manual_seed(2);
        let (rows, m) = (4096, 6);
        let x: Vec<Tensor> = (0..2).map(|_| random(&[rows, m])).collect();
        let truth = |x: &Tensor, l: usize| {
            (x.select(1, l as i64).abs() - x.select(1, 3) * x.select(1, 4)).unsqueeze(1)
        };
        let sample = Sample {
            per_context: rows,
            x: x.iter().map(|x| vec![x.shallow_clone()]).collect(),
            y: x.iter().enumerate().map(|(l, x)| vec![truth(x, l)]).collect(),
        };
        let mlp = sample.train(Seed(3), Device::Cpu).unwrap();
        let kvzap = Kvzap { linear: None, mlp: Some(mlp) };
        for l in 0..2 {
            let x = random(&[500, m]);
            let y = truth(&x, l).squeeze_dim(1);
            let got = kvzap.layer(Method::KvzapMlp, l as i64, &x).unwrap().squeeze_dim(0);
            let unexplained = ((got - &y).square().mean(None) / y.var(false)).double_value(&[]);
            assert!(unexplained < 0.1, "layer {l}: {unexplained}");
            assert!(kvzap.layer(Method::KvzapLinear, l as i64, &x).is_none());
        }
    }
}
