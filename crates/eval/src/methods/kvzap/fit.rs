//! Fitting KVzap-style scorers while the target prefills training contexts.
//!
//! Hidden states of all training positions are never held: the linear scorers need sums of products alone
//! ([`HiddenFit`]), the networks a [`SampledPositions`] of positions.
//!
//! Dimension key: as in [`super`].

use anyhow::Result;
use pkv_core::Seed;
use pkv_extract::{HiddenFit, of_context};
use pkv_lm::{LanguageModel, LayerView, Tap};
use tch::{Device, Kind, Tensor};

use super::super::method::{Fit, Ready};
use super::super::training::TrainingContext;
use super::sample::SampledPositions;
use super::store::KvzapStore;
use super::{Scorer, network};

/// A scorer in the making.
pub struct KvzapFit {
    learner: Learner,
    contexts: usize,
    tokens: usize,
}

enum Learner {
    Linear(HiddenFit),
    Mlp { sample: SampledPositions, seed: Seed, device: Device },
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
        Self { learner: Learner::Linear(HiddenFit::new(target)), contexts: 0, tokens: 0 }
    }

    /// Of the network, to be trained on `device`.
    pub fn mlp(sample: SampledPositions, seed: Seed, device: Device) -> Self {
        Self { learner: Learner::Mlp { sample, seed, device }, contexts: 0, tokens: 0 }
    }

    /// Put the fitted scorer into `store`; contexts come after `prefix` tokens.
    pub fn stored(self, store: KvzapStore, prefix: usize) -> StoredFit {
        StoredFit { fit: self, store, prefix }
    }
}

impl<'a> Fit<'a> for StoredFit {
    fn tap<'t>(&'t mut self, context: &'t TrainingContext) -> Option<Box<dyn Tap + 't>> {
        Some(match &mut self.fit.learner {
            Learner::Linear(fit) => Box::new(fit.tap(self.prefix, &context.y_ot)),
            Learner::Mlp { sample, .. } => {
                Box::new(SampleTap { sample, prefix: self.prefix, y_ot: &context.y_ot })
            }
        })
    }

    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        self.fit.contexts += 1;
        self.fit.tokens += context.tokens.len();
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Ready<'a>> {
        let (prefix, cost) = (self.prefix, [self.fit.contexts, self.fit.tokens]);
        let scorer = match self.fit.learner {
            Learner::Linear(fit) => Scorer::Linear(fit.solve()?),
            Learner::Mlp { sample, seed, device } => network::train(&sample, seed, device)?,
        };
        self.store.save(&scorer, cost)?;
        Ok(scorer.ready(prefix, cost))
    }
}

struct SampleTap<'t> {
    sample: &'t mut SampledPositions,
    prefix: usize,
    /// Layers times KV heads.
    y_ot: &'t Tensor,
}

impl Tap for SampleTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        let n = x_sm.size()[0];
        let first = view.start.max(self.prefix) - self.prefix;
        let heads = view.k_hkd.size()[0];
        let y_ht = self.y_ot.narrow(0, view.layer as i64 * heads, heads);
        let y_sh = y_ht.narrow(1, first as i64, n).transpose(0, 1);
        let of = first..first + n as usize;
        self.sample.add(view.layer, of, self.y_ot.size()[1] as usize, &x_sm.to_kind(Kind::Float), &y_sh)
    }
}
