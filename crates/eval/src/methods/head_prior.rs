//! The head prior: KV heads in order of their mean label, positions of a head at random.
//!
//! A lower bound for every method: it uses nothing of the context. A head's strength is its mean training
//! label. The means are of the raw log-odds, since pooling along positions does not change the order of
//! heads.
//!
//! Dimension key: o target KV head, t position.

use anyhow::{Context, Result};
use pkv_core::Rng;
use pkv_recipe::MethodName;
use tch::{Kind, Tensor};

use super::method::{Fit, Method, Needs, Ready, Start};
use super::random::random;
use super::training::TrainingContext;

pub const METHOD: Method = Method {
    name: MethodName::HEAD_PRIOR,
    meaning: "each KV head's mean training score, positions at random: a lower bound for any method",
    needs: Needs::NOTHING,
    #[cfg(test)]
    held_by: ("src/methods/head_prior.rs", "fn the_strongest_heads_are_filled_first"),
    start: |_| Start::fit(Means::default()),
};

/// Sums of training labels.
#[derive(Default)]
struct Means {
    /// f64 `[o]`.
    sum_o: Option<Tensor>,
    positions: i64,
}

impl<'a> Fit<'a> for Means {
    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        let sum_o = context.raw_ot.sum_dim_intlist(-1, false, Kind::Double);
        self.positions += context.raw_ot.size()[1];
        self.sum_o = Some(match self.sum_o.take() {
            Some(total) => total + sum_o,
            None => sum_o,
        });
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Ready<'a>> {
        let sum_o = self.sum_o.context("no training label was added")?;
        let mean_o = (sum_o / self.positions as f64).to_kind(Kind::Float);
        Ok(Ready::scores(move |view| {
            Ok(head_prior(&mean_o, view.positions(), &mut view.random(MethodName::HEAD_PRIOR)))
        }))
    }
}

/// Stronger heads before weaker ones, positions of a head at random; f32 `[heads, positions]`.
///
/// Heads are ordered by `mean_o`, f32 `[heads]`.
fn head_prior(mean_o: &Tensor, positions: i64, rng: &mut Rng) -> Tensor {
    let heads = mean_o.size()[0];
    let place_o = mean_o.argsort(0, false).argsort(0, false).to_kind(Kind::Float);
    // Half the distance between two heads, so that rounding cannot mix them up.
    place_o.unsqueeze(1) + random(heads, positions, rng, mean_o.device()) * 0.5
}

#[cfg(test)]
mod tests {
    use super::super::tests::kept;
    use super::*;
    use pkv_core::Seed;

    #[test]
    fn the_strongest_heads_are_filled_first() {
        let mean = Tensor::from_slice(&[0.1f32, 3.0, -2.0]);
        let of = |index| head_prior(&mean, 10, &mut Seed(1).stream("test", index));
        // 15 of 30 pairs: all of head 1, five of head 0.
        let sets = kept(&of(0), 0.5);
        assert_eq!((sets[0].len(), sets[1].len(), sets[2].len()), (5, 10, 0));
        assert_ne!(kept(&of(1), 0.5)[0], sets[0], "another context draws other positions");
        assert_eq!(kept(&of(0), 0.5), sets);
    }
}
