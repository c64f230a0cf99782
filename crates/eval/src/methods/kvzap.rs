//! KVzap-style scorers: the target's own hidden states tell its scores, layer by layer.
//!
//! The learned competitor of a mapper. A scorer per layer reads what the layer's attention reads, and predicts the log-odds of
//! KVzip's scores of the layer's KV heads: a linear map, or a network with one hidden layer. It needs no second model, only
//! the target's own prefill. How the scorers are fitted is [`fit`]'s business.
//!
//! # Source
//! KVzap (arXiv 2601.07891; NVIDIA/kvpress, `kvzap/train.py` and `data.py`): ridge regression with penalty 1, or one hidden
//! layer of 512 with GELU, AdamW at 5e-3 with a cosine, batches of 512, gradients clipped to 1, from the attention's input.
//! Differs: the targets are the recipe's labels, pooled as the mapper's are, on the log-odds scale, where KVzap takes the log of
//! KVzip+; a network sees at most 65,536 positions of a layer ([`sample`]), where KVzap samples up to 2.25 million; no part of
//! the sample is held out; the contexts are the mapper's training contexts, so that both learn from the same labels; pruning is
//! by the budgets of all methods here, where KVzap serves by a threshold. Its scoring is timed inside the target's prefill,
//! where it happens.
//!
//! Dimension key: l target layer, h target KV head, m hidden, w hidden units of the scorer, s new tokens, t context position.

mod fit;
mod network;
mod sample;
mod store;

use anyhow::{Context, Result, ensure};
use pkv_lm::{LayerView, Tap};
use pkv_recipe::Method;
use tch::{Kind, Tensor};

pub use fit::KvzapFit;
pub use store::KvzapStore;

/// Fitted scorers; those that were not asked for are absent.
pub struct Kvzap {
    linear: Option<Linear>,
    mlp: Option<Mlp>,
}

/// y = x W + b in every layer.
struct Linear {
    weight_lmh: Tensor,
    bias_lh: Tensor,
}

/// y = gelu(x U + a) D + b in every layer.
struct Mlp {
    up_lmw: Tensor,
    up_bias_l1w: Tensor,
    down_lwh: Tensor,
    down_bias_l1h: Tensor,
}

impl Kvzap {
    /// Scores by `method` of one layer's new tokens, f32 `[KV heads, s]`; nothing of a scorer that was not fitted.
    ///
    /// `x_sm`: f32 `[s, hidden]`, what the layer's attention reads.
    fn layer(&self, method: Method, layer: i64, x_sm: &Tensor) -> Option<Tensor> {
        let y_sh = match method {
            Method::KvzapLinear => {
                let linear = self.linear.as_ref()?;
                x_sm.matmul(&linear.weight_lmh.get(layer)) + linear.bias_lh.get(layer)
            }
            Method::KvzapMlp => {
                let mlp = self.mlp.as_ref()?;
                let hidden = (x_sm.matmul(&mlp.up_lmw.get(layer)) + mlp.up_bias_l1w.get(layer)).gelu("none");
                hidden.matmul(&mlp.down_lwh.get(layer)) + mlp.down_bias_l1h.get(layer)
            }
            _ => return None,
        };
        Some(y_sh.transpose(0, 1))
    }
}

/// Scores a context while the target prefills it.
pub struct KvzapTap<'a> {
    kvzap: &'a Kvzap,
    prefix: usize,
    /// Per layer the pieces of its scores, chunk by chunk.
    linear: Vec<Vec<Tensor>>,
    mlp: Vec<Vec<Tensor>>,
}

impl<'a> KvzapTap<'a> {
    /// `prefix`: tokens of the chat template before the context, which have no scores.
    pub fn new(kvzap: &'a Kvzap, prefix: usize) -> Self {
        Self { kvzap, prefix, linear: Vec::new(), mlp: Vec::new() }
    }

    /// Scores of the context by both scorers, f32 `[layers, KV heads, positions]`.
    pub fn scores(self) -> KvzapScores {
        let stack = |layers: Vec<Vec<Tensor>>| {
            let layers: Vec<Tensor> = layers.iter().map(|pieces| Tensor::cat(pieces, 1)).collect();
            (!layers.is_empty()).then(|| Tensor::stack(&layers, 0))
        };
        KvzapScores { linear_lht: stack(self.linear), mlp_lht: stack(self.mlp) }
    }
}

impl Tap for KvzapTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        for (method, into) in [(Method::KvzapLinear, &mut self.linear), (Method::KvzapMlp, &mut self.mlp)] {
            let Some(piece_hs) = self.kvzap.layer(method, view.layer as i64, &x_sm) else { continue };
            if into.len() <= view.layer {
                into.push(Vec::new());
            }
            into.get_mut(view.layer).context("a layer came out of order")?.push(piece_hs);
        }
        Ok(())
    }
}

/// What the attention of a layer reads of the context's new tokens, f32 `[s, hidden]`; nothing if there are none.
fn of_context(view: &LayerView, prefix: usize) -> Option<Tensor> {
    let skipped = prefix.saturating_sub(view.start) as i64;
    let n = view.normed_sm.size()[0] - skipped;
    (n > 0).then(|| view.normed_sm.narrow(0, skipped, n).to_kind(Kind::Float))
}

/// Scores of one context, f32 `[layers, KV heads, positions]`.
#[derive(Default)]
pub struct KvzapScores {
    linear_lht: Option<Tensor>,
    mlp_lht: Option<Tensor>,
}

impl KvzapScores {
    /// # Errors
    /// The scorer was not fitted, or the target's prefill was not looked at.
    pub fn by(&self, method: Method) -> Result<Tensor> {
        let scores = match method {
            Method::KvzapLinear => self.linear_lht.as_ref(),
            _ => self.mlp_lht.as_ref(),
        };
        Ok(scores.context("the target's hidden states were not looked at")?.shallow_clone())
    }
}

/// Several taps on one forward.
pub struct Several<'a>(pub Vec<&'a mut dyn Tap>);

impl Tap for Several<'_> {
    fn wants_lse(&self) -> bool {
        self.0.iter().any(|tap| tap.wants_lse())
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.0.iter_mut().try_for_each(|tap| tap.layer(view))
    }
}

/// Labels of a context must be of the layers and positions that the target has.
fn check(y_lht: &Tensor, layers: usize, positions: usize) -> Result<()> {
    let size = y_lht.size();
    ensure!(
        size.len() == 3 && size[0] == layers as i64 && size[2] == positions as i64,
        "labels are {size:?}, expected [{layers}, KV heads, {positions}]"
    );
    Ok(())
}
