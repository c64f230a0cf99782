//! KVzap-style scorers: scores from the target's own hidden states, layer by layer.
//!
//! A learned alternative to the mapper. One scorer per layer reads the input of the layer's attention and
//! predicts the log-odds of KVzip's scores of the layer's KV heads: a linear map, or a network with one
//! hidden layer. It needs no second model, only the target's own prefill. [`fit`] fits the scorers.
//!
//! # Source
//! KVzap (arXiv 2601.07891; NVIDIA/kvpress, `kvzap/train.py` and `data.py`): ridge regression with penalty 1,
//! or one hidden layer of 512 with GELU, AdamW at 5e-3 with a cosine, batches of 512, gradients clipped to 1,
//! from the attention's input. Differs: the targets are the recipe's labels, pooled as the mapper's are, on
//! the log-odds scale, where KVzap takes the log of KVzip+; a network sees at most 65,536 positions of a
//! layer ([`sample`]), where KVzap samples up to 2.25 million; no part of the sample is held out; the
//! contexts are the mapper's training contexts, so that both learn from the same labels; pruning is by the
//! budgets of all methods here, where KVzap serves by a threshold. Its scoring is timed inside the target's
//! prefill, where it happens.
//!
//! Dimension key: l target layer, h target KV head, m hidden, w hidden units of the scorer, s new tokens, t
//! context position.

mod fit;
mod network;
mod sample;
mod store;

use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use pkv_core::Fingerprint;
use pkv_extract::{HiddenProjection, of_context};
use pkv_lm::{LayerView, Tap};
use pkv_recipe::MethodName;
use tch::{Kind, Tensor};

use self::fit::KvzapFit;
use self::sample::SampledPositions;
use self::store::KvzapStore;
use super::method::{Method, Needs, Ready, Start, Watch};
use super::training::Setup;
use super::view::ContextView;

const LINEAR_NAME: MethodName = MethodName::of("kvzap-linear");
const MLP_NAME: MethodName = MethodName::of("kvzap-mlp");

pub const LINEAR: Method = Method {
    name: LINEAR_NAME,
    meaning: "ridge regression from the target's own hidden states, layer by layer; no proxy",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: (
        "../extract/tests/extract/hidden.rs",
        "fn the_map_is_the_ridge_solution_and_the_channel_its_values",
    ),
    start: |setup| start(setup, LINEAR_NAME, |setup, _| KvzapFit::linear(setup.target.model)),
};

/// The same by a network with one hidden layer.
pub const MLP: Method = Method {
    name: MLP_NAME,
    meaning: "the same by a network with one hidden layer per layer of the target",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: ("src/methods/kvzap/network.rs", "fn the_network_learns_what_the_linear_scorer_cannot"),
    start: |setup| {
        start(setup, MLP_NAME, |setup, n| {
            KvzapFit::mlp(
                SampledPositions::new(setup.target.model.shape(), n),
                setup.seed,
                setup.target.model.device(),
            )
        })
    },
};

/// The stored scorer, or one to be fitted and then stored.
fn start<'a>(
    setup: &Setup<'a>,
    method: MethodName,
    fit: impl Fn(&Setup<'a>, u64) -> KvzapFit,
) -> Result<Start<'a>> {
    let (contexts, prefix) = (setup.training.contexts(), setup.target.prefix.len());
    let store = KvzapStore::open(setup.scorers, method, |methods| {
        Fingerprint::new()
            .with("methods", methods)
            .with("labels", setup.training.examples.label_fingerprint())
            .with("contexts", contexts)
            .with("pool", setup.pool)
            .with("seed", setup.seed)
    })?;
    match store.load(setup.target.model.device()) {
        Some((scorer, cost)) => scorer.ready(prefix, cost).start(),
        None => Start::fit(fit(setup, contexts).stored(store, prefix)),
    }
}

/// A fitted scorer of every layer.
enum Scorer {
    /// y = x W + b.
    Linear(HiddenProjection),
    /// y = gelu(x U + a) D + b.
    Mlp { up_lmw: Tensor, up_bias_l1w: Tensor, down_lwh: Tensor, down_bias_l1h: Tensor },
}

impl Scorer {
    /// Scores of one layer's new tokens, f32 `[KV heads, s]`.
    ///
    /// `x_sm`: f32 `[s, hidden]`, what the layer's attention reads.
    fn layer(&self, layer: i64, x_sm: &Tensor) -> Tensor {
        let y_sh = match self {
            Self::Linear(projection) => return projection.layer(layer as usize, x_sm),
            Self::Mlp { up_lmw, up_bias_l1w, down_lwh, down_bias_l1h } => {
                let x_sm = x_sm.to_kind(Kind::Float);
                // Of a target over several devices, this layer may be on another one.
                let here = |all: &Tensor| all.get(layer).to_device(x_sm.device());
                let hidden = (x_sm.matmul(&here(up_lmw)) + here(up_bias_l1w)).gelu("none");
                hidden.matmul(&here(down_lwh)) + here(down_bias_l1h)
            }
        };
        y_sh.transpose(0, 1)
    }

    /// Ready to score contexts after `prefix` tokens; it was fitted on `contexts` and `tokens`.
    fn ready<'a>(self, prefix: usize, [contexts, tokens]: [usize; 2]) -> Ready<'a> {
        let scorer = Rc::new(self);
        let watch = move || KvzapWatch { scorer: scorer.clone(), prefix, layers: Vec::new() };
        Ready::watches(watch).noted(Some(format!(
            "from the target's hidden states; fitted by prefilling {contexts} training contexts, {tokens} tokens"
        )))
    }
}

/// Scores a context while the target prefills it.
struct KvzapWatch {
    scorer: Rc<Scorer>,
    /// Tokens of the chat template before the context, which have no scores.
    prefix: usize,
    /// Per layer the pieces of its scores, chunk by chunk.
    layers: Vec<Vec<Tensor>>,
}

impl Tap for KvzapWatch {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        if self.layers.len() <= view.layer {
            self.layers.push(Vec::new());
        }
        let pieces = self.layers.get_mut(view.layer).context("a layer came out of order")?;
        pieces.push(self.scorer.layer(view.layer as i64, &x_sm));
        Ok(())
    }
}

impl Watch for KvzapWatch {
    fn scores(self: Box<Self>, view: &ContextView) -> Result<Tensor> {
        ensure!(!self.layers.is_empty(), "the target's hidden states were not looked at");
        let of_layer = |pieces: &Vec<Tensor>| Tensor::cat(pieces, 1).to_device(view.device);
        let layers: Vec<Tensor> = self.layers.iter().map(of_layer).collect();
        Ok(Tensor::stack(&layers, 0))
    }
}
