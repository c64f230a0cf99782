//! Fitting KVzap-style scorers while the target prefills training contexts.
//!
//! Hidden states of all training positions are never held: the linear scorers need sums of products alone, the networks a
//! [`Sample`] of positions. The sums are f64 on the device: 8 layers (hidden + 1)^2 bytes, 4.3 GB of an 8B target.
//!
//! Dimension key: as in [`super`].

use anyhow::{Context, Result, ensure};
use pkv_core::Seed;
use pkv_lm::{LanguageModel, LayerView, Tap};
use pkv_recipe::Method;
use tch::{Device, Kind, Tensor};

use super::sample::Sample;
use super::{Kvzap, Linear, check, network, of_context};

/// Penalty of the ridge regression, in units of one position.
const PENALTY: f64 = 1.0;

/// Scorers in the making.
pub struct KvzapFit {
    /// Sums over positions of x x^T and x y^T, x with a one behind it, f64; one pair per layer.
    sums: Option<Vec<(Tensor, Tensor)>>,
    sample: Option<Sample>,
    seed: Seed,
    contexts: usize,
    tokens: usize,
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
        let sample = wants(Method::KvzapMlp).then(|| Sample::new(shape, contexts));
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

    /// The scorers, and on how many contexts and tokens they were fitted.
    ///
    /// # Errors
    /// Nothing was added, or a hidden state is not finite.
    pub fn solve(self, device: Device) -> Result<(Kvzap, [usize; 2])> {
        ensure!(self.contexts > 0, "no training context to fit KVzap-style scorers on");
        let linear = self.sums.as_deref().map(solve).transpose()?;
        let mlp = self.sample.map(|sample| network::train(&sample, self.seed, device)).transpose()?;
        Ok((Kvzap { linear, mlp }, [self.contexts, self.tokens]))
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
            let of = first..first + n as usize;
            sample.add(view.layer, of, self.y_lht.size()[2] as usize, &x_sm, &y_sh)?;
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
}
