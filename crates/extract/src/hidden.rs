//! The channel `hidden_linear`: a linear map of the input of a layer's attention, fitted to KVzip's scores of
//! that layer.
//!
//! It is KVzap's linear scorer (arXiv 2601.07891) as a feature: a number per KV head in place of the layer's
//! whole hidden state. It is fitted to the labels of training contexts before features are extracted. A
//! context of the fit then sees a prediction of labels it was fitted to; with a million positions for a few
//! thousand weights per head, this overfitting is negligible.
//!
//! Dimension key: l layer, h KV head of a layer, m hidden, s new tokens of a forward, t context position.

use std::cell::RefCell;

use anyhow::{Context, Result, ensure};
use pkv_core::ModelShape;
use pkv_gpu::FullWeights;
use pkv_lm::{LanguageModel, LayerView, Placement, Tap};
use tch::{Device, Kind, Tensor};

/// Penalty of the ridge regression, in units of one position: KVzap's.
const PENALTY: f64 = 1.0;
const NAMES: [&str; 2] = ["hidden.weight_lmh", "hidden.bias_lh"];

/// y = x W + b of every layer.
#[derive(Debug)]
pub struct HiddenProjection {
    /// `[layers, hidden, KV heads]`
    weight_lmh: FullWeights,
    /// f32 `[layers, KV heads]`
    bias_lh: Tensor,
    /// The same on other devices, where layers of a split model are.
    copies: RefCell<Vec<Self>>,
}

impl HiddenProjection {
    /// # Shapes
    /// - `weight_lmh`: f32 `[layers, hidden, KV heads]`; `bias_lh`: f32 `[layers, KV heads]`, same device
    pub fn new(weight_lmh: Tensor, bias_lh: Tensor) -> Self {
        Self { weight_lmh: FullWeights::new(weight_lmh), bias_lh, copies: RefCell::default() }
    }

    /// Weight and bias, as in [`Self::new`].
    pub fn parts(&self) -> [&Tensor; 2] {
        [self.weight_lmh.weight_lmn(), &self.bias_lh]
    }

    /// Log-odds of one layer's new context tokens, f32 `[h, s]`.
    ///
    /// `x_sm`: `[s, hidden]`, what the layer's attention reads ([`of_context`]); any device, which the result
    /// is on too.
    pub fn layer(&self, layer: usize, x_sm: &Tensor) -> Tensor {
        let (layer, device) = (layer as i64, x_sm.device());
        if device == self.bias_lh.device() {
            return (self.weight_lmh.product(layer, x_sm) + self.bias_lh.get(layer)).transpose(0, 1);
        }
        // A copy from another device would wait for all that is queued there, so it is made once.
        let mut copies = self.copies.borrow_mut();
        let at = copies.iter().position(|copy| copy.bias_lh.device() == device).unwrap_or_else(|| {
            copies.push(self.to_device(device));
            copies.len() - 1
        });
        copies[at].layer(layer as usize, x_sm)
    }

    /// Random numbers of a model's sizes, for timing.
    pub fn random(shape: &ModelShape, device: Device) -> Self {
        let [l, m, h] = [shape.layers, shape.hidden, shape.kv_heads].map(|n| n as i64);
        let on = (Kind::Float, device);
        Self::new(Tensor::randn([l, m, h], on) / (m as f64).sqrt(), Tensor::randn([l, h], on))
    }

    /// By name, for a file.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let both = NAMES.iter().zip(self.parts());
        both.map(|(name, x)| ((*name).to_owned(), x.to_device(Device::Cpu).contiguous())).collect()
    }

    /// From a file's tensors, those of other names aside; nothing if they hold none.
    ///
    /// # Errors
    /// The shapes are not those of the model's layers.
    pub fn from_tensors(tensors: &[(String, Tensor)], device: Device) -> Result<Option<Self>> {
        let find = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, x)| x.to_device(device));
        let [Some(weight_lmh), Some(bias_lh)] = NAMES.map(find) else { return Ok(None) };
        let (w, b) = (weight_lmh.size(), bias_lh.size());
        ensure!(
            w.len() == 3 && b == [w[0], w[2]],
            "`{}` of shape {w:?} and `{}` of shape {b:?} are no projection of hidden states",
            NAMES[0],
            NAMES[1]
        );
        Ok(Some(Self::new(weight_lmh, bias_lh)))
    }

    /// A copy on `device`.
    pub fn to_device(&self, device: Device) -> Self {
        let [weight_lmh, bias_lh] = self.parts().map(|x| x.to_device(device));
        Self::new(weight_lmh, bias_lh)
    }

    /// # Errors
    /// The projection is of a model of other sizes.
    pub(crate) fn check(&self, model: &LanguageModel) -> Result<()> {
        let shape = model.shape();
        let expected = [shape.layers, shape.hidden, shape.kv_heads].map(|n| n as i64);
        ensure!(
            self.parts()[0].size() == expected,
            "the projection of hidden states has shape {:?}, the model's is {expected:?}",
            self.parts()[0].size()
        );
        Ok(())
    }
}

/// Input of a layer's attention at the context's new tokens, `[s, hidden]` in the model's kind; nothing if
/// there are none.
pub fn of_context(view: &LayerView, prefix: usize) -> Option<Tensor> {
    let skipped = prefix.saturating_sub(view.start) as i64;
    let n = view.normed_sm.size()[0] - skipped;
    (n > 0).then(|| view.normed_sm.narrow(0, skipped, n))
}

/// A projection in the making. Hidden states are not held: a layer needs two sums of products, f64 on the
/// device, 8 layers (hidden + 1)^2 bytes in all.
pub struct HiddenFit {
    /// Sums over positions of x x^T and x y^T, x extended by a one; a pair per layer, on its device.
    sums: Vec<(Tensor, Tensor)>,
    /// Where the layers are.
    placement: Placement,
    contexts: usize,
}

impl HiddenFit {
    pub fn new(model: &LanguageModel) -> Self {
        let shape = model.shape();
        let (wide, heads) = (shape.hidden as i64 + 1, shape.kv_heads as i64);
        let placement = model.placement().clone();
        let zeros = |l: usize, size: [i64; 2]| Tensor::zeros(size, (Kind::Double, placement.of(l)));
        Self {
            sums: (0..shape.layers).map(|l| (zeros(l, [wide, wide]), zeros(l, [wide, heads]))).collect(),
            placement: placement.clone(),
            contexts: 0,
        }
    }

    /// Prefill a context after `prefix` and learn from it.
    ///
    /// `y_lht`: log-odds of its labels, f32 `[layers, KV heads, positions]`, on the model's device.
    ///
    /// # Errors
    /// The model cannot read it, or the labels are of another shape.
    pub fn add(
        &mut self,
        model: &LanguageModel,
        prefix: &[u32],
        context: &[u32],
        chunk_tokens: usize,
        y_lht: &Tensor,
    ) -> Result<()> {
        let shape = model.shape();
        let expected = [shape.layers, shape.kv_heads, context.len()].map(|n| n as i64);
        ensure!(y_lht.size() == expected, "labels of shape {:?}, expected {expected:?}", y_lht.size());
        let _no_grad = tch::no_grad_guard();
        let ids = [prefix, context].concat();
        let mut cache = model.new_cache(ids.len());
        model.prefill_for_tap(&ids, &mut cache, chunk_tokens, &mut self.tap(prefix.len(), y_lht))
    }

    /// Learns from a context while the model prefills it after `prefix` tokens; `y` as in [`Self::add`],
    /// layers and KV heads as two axes or as one.
    pub fn tap(&mut self, prefix: usize, y: &Tensor) -> HiddenFitTap<'_> {
        self.contexts += 1;
        let positions = y.size().last().copied().unwrap_or(0);
        let y_lht = y.view([self.sums.len() as i64, -1, positions]);
        HiddenFitTap { sums: &mut self.sums, prefix, y_lht }
    }

    /// The ridge regression of every layer; the intercept is not penalized.
    ///
    /// # Errors
    /// Nothing was added, or a hidden state is not finite.
    pub fn solve(self) -> Result<HiddenProjection> {
        ensure!(self.contexts > 0, "there is no training context to fit the projection of hidden states on");
        let _no_grad = tch::no_grad_guard();
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (layer, (xx, xy)) in self.sums.iter().enumerate() {
            let m = xx.size()[0] - 1;
            let on = (Kind::Double, xx.device());
            let penalty = Tensor::cat(&[Tensor::full([m], PENALTY, on), Tensor::zeros([1], on)], 0);
            let factor = (xx + penalty.diag(0)).f_linalg_cholesky(false).with_context(|| {
                format!(
                    "the hidden states of layer {layer} have no ridge solution: is one of them not finite?"
                )
            })?;
            let solution = xy.cholesky_solve(&factor, false).to_kind(Kind::Float);
            weights.push(solution.narrow(0, 0, m));
            biases.push(solution.get(m));
        }
        Ok(HiddenProjection::new(self.placement.stack(&weights), self.placement.stack(&biases)))
    }
}

/// A context that a [`HiddenFit`] learns from.
pub struct HiddenFitTap<'a> {
    sums: &'a mut [(Tensor, Tensor)],
    prefix: usize,
    y_lht: Tensor,
}

impl Tap for HiddenFitTap<'_> {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let Some(x_sm) = of_context(view, self.prefix) else { return Ok(()) };
        let n = x_sm.size()[0];
        let first = view.start.max(self.prefix) - self.prefix;
        let y_ht = self.y_lht.get(view.layer as i64).narrow(1, first as i64, n).to_device(x_sm.device());
        let y_sh = y_ht.transpose(0, 1);
        let (xx, xy) = self.sums.get_mut(view.layer).context("a layer that the model does not have")?;
        let ones = Tensor::ones([n, 1], (Kind::Double, x_sm.device()));
        let x = Tensor::cat(&[&x_sm.to_kind(Kind::Double), &ones], 1);
        *xx += x.transpose(0, 1).matmul(&x);
        *xy += x.transpose(0, 1).matmul(&y_sh.to_kind(Kind::Double));
        Ok(())
    }
}
