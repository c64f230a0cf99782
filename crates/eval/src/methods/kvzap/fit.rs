//! Fitting KVzap-style scorers while the target prefills training contexts.
//!
//! Hidden states of all training positions are never held: the linear scorers need sums of products alone, the networks a
//! [`Sample`] of positions. The sums are f64 on the device: 8 layers (hidden + 1)^2 bytes, 4.3 GB of an 8B target.
//!
//! Dimension key: as in [`super`].

use anyhow::{Context, Result};
use pkv_core::Seed;
use pkv_lm::{LanguageModel, LayerView, Tap};
use tch::{Device, Kind, Tensor};

use super::super::method::{Fit, Ready};
use super::super::training::TrainingContext;
use super::sample::Sample;
use super::store::KvzapStore;
use super::{Scorer, network, of_context};

/// Penalty of the ridge regression, in units of one position.
const PENALTY: f64 = 1.0;

/// A scorer in the making.
pub struct KvzapFit {
    learner: Learner,
    contexts: usize,
    tokens: usize,
}

enum Learner {
    /// Sums over positions of x x^T and x y^T, x with a one appended, f64; one pair per layer.
    Linear(Vec<(Tensor, Tensor)>),
    Mlp {
        sample: Sample,
        seed: Seed,
        device: Device,
    },
}

/// A scorer in the making, and where it goes.
pub struct StoredFit {
    fit: KvzapFit,
    store: KvzapStore,
    prefix: usize,
}

impl KvzapFit {
    /// Of the linear scorer.
    pub fn linear(target: &LanguageModel) -> Self {
        let shape = target.shape();
        let (wide, heads) = (shape.hidden as i64 + 1, shape.kv_heads as i64);
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Double, target.device()));
        let sums = (0..shape.layers).map(|_| (zeros([wide, wide]), zeros([wide, heads]))).collect();
        Self { learner: Learner::Linear(sums), contexts: 0, tokens: 0 }
    }

    /// Of the network, to be trained on `device`.
    pub fn mlp(sample: Sample, seed: Seed, device: Device) -> Self {
        Self { learner: Learner::Mlp { sample, seed, device }, contexts: 0, tokens: 0 }
    }

    /// Put the fitted scorer into `store`; contexts come after `prefix` tokens.
    pub fn stored(self, store: KvzapStore, prefix: usize) -> StoredFit {
        StoredFit { fit: self, store, prefix }
    }
}

impl<'a> Fit<'a> for StoredFit {
    fn tap<'t>(&'t mut self, context: &'t TrainingContext) -> Option<Box<dyn Tap + 't>> {
        Some(Box::new(FitTap { learner: &mut self.fit.learner, prefix: self.prefix, y_ot: &context.y_ot }))
    }

    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        self.fit.contexts += 1;
        self.fit.tokens += context.tokens.len();
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Ready<'a>> {
        let (prefix, cost) = (self.prefix, [self.fit.contexts, self.fit.tokens]);
        let scorer = match &self.fit.learner {
            Learner::Linear(sums) => solve(sums)?,
            Learner::Mlp { sample, seed, device } => network::train(sample, *seed, *device)?,
        };
        self.store.save(&scorer, cost)?;
        Ok(scorer.ready(prefix, cost))
    }
}

struct FitTap<'t> {
    learner: &'t mut Learner,
    prefix: usize,
    /// Layers times KV heads.
    y_ot: &'t Tensor,
}

impl Tap for FitTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        let n = x_sm.size()[0];
        let first = view.start.max(self.prefix) - self.prefix;
        let heads = view.k_hkd.size()[0];
        let y_ht = self.y_ot.narrow(0, view.layer as i64 * heads, heads);
        let y_sh = y_ht.narrow(1, first as i64, n).transpose(0, 1);
        match self.learner {
            Learner::Linear(sums) => {
                let (xx, xy) = sums.get_mut(view.layer).context("a layer that the target does not have")?;
                let ones = Tensor::ones([n, 1], (Kind::Float, x_sm.device()));
                let x = Tensor::cat(&[&x_sm, &ones], 1).to_kind(Kind::Double);
                *xx += x.transpose(0, 1).matmul(&x);
                *xy += x.transpose(0, 1).matmul(&y_sh.to_kind(Kind::Double));
                Ok(())
            }
            Learner::Mlp { sample, .. } => {
                let of = first..first + n as usize;
                sample.add(view.layer, of, self.y_ot.size()[1] as usize, &x_sm, &y_sh)
            }
        }
    }
}

/// Ridge regression of every layer; the intercept is not penalized.
fn solve(sums: &[(Tensor, Tensor)]) -> Result<Scorer> {
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
    Ok(Scorer::Linear { weight_lmh: Tensor::stack(&weights, 0), bias_lh: Tensor::stack(&biases, 0) })
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
        let Scorer::Linear { weight_lmh, bias_lh } = solve(&[(xx.copy(), xy.copy())]).unwrap() else {
            panic!("not the linear scorer")
        };
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
                    4 => bias_lh.double_value(&[0, h]),
                    _ => weight_lmh.double_value(&[0, i as i64, h]),
                };
                assert!((got - row[5 + h as usize]).abs() < 1e-5, "{i} {h}: {got}, {}", row[5 + h as usize]);
            }
        }
    }
}
