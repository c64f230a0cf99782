//! Channels per position that all proxy heads share: surprisal and the token's position.
//!
//! Dimension key: s new tokens of a forward, m hidden, v vocabulary, t context position, c channel.

use anyhow::Result;
use pkv_core::GlobalChannel;
use pkv_lm::LanguageModel;
use tch::{Device, Kind, Tensor};

/// Most logits held at once, twice that at the peak: 64 MiB of f32 on a CPU; 1 GiB on a GPU, whose matrix
/// products want rows.
fn logit_elements(device: Device) -> usize {
    if device.is_cuda() { 1 << 28 } else { 1 << 24 }
}

/// Negative log-likelihood (nats) of each context token, gathered as hidden states come.
pub(crate) struct Surprisal {
    prefix: usize,
    /// Prefix and context, i64, on the model's device.
    ids: Tensor,
    /// `[t]`, f32. The first token of a context without prefix has no prediction and keeps 0.
    pub(crate) nats_t: Tensor,
}

impl Surprisal {
    pub(crate) fn new(model: &LanguageModel, ids: &[u32], prefix: usize) -> Self {
        let context = (ids.len() - prefix) as i64;
        let ids: Vec<i64> = ids.iter().copied().map(i64::from).collect();
        Self {
            prefix,
            ids: Tensor::from_slice(&ids).to_device(model.device()),
            nats_t: Tensor::zeros([context], (Kind::Float, model.device())),
        }
    }

    /// Take the hidden states after the final norm of the positions from `start` on: `[s, hidden]`.
    ///
    /// The LM head is applied to blocks of them, so that logits of all positions are never held.
    ///
    /// # Errors
    /// The driver refuses.
    pub(crate) fn add(&mut self, model: &LanguageModel, hidden_sm: &Tensor, start: usize) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        // The state at position i predicts token i + 1; tokens of the prefix have no feature.
        let end = (start + hidden_sm.size()[0] as usize).min(self.ids.numel() - 1);
        let mut at = start.max(self.prefix.saturating_sub(1));
        let rows = (logit_elements(model.device()) / model.shape().vocab).max(1);
        while at < end {
            let n = rows.min(end - at) as i64;
            let next_s = self.ids.narrow(0, at as i64 + 1, n);
            let nats_s = model.nats(&hidden_sm.narrow(0, (at - start) as i64, n), &next_s)?;
            self.nats_t.narrow(0, (at + 1 - self.prefix) as i64, n).copy_(&nats_s);
            at += n as usize;
        }
        Ok(())
    }
}

/// The chosen global channels: f32 `[globals, positions]`, raw.
///
/// `surprisal` must be there if the channel is chosen.
pub(crate) fn globals(
    channels: &[GlobalChannel],
    surprisal: Option<&Surprisal>,
    positions: usize,
    device: Device,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let total = positions as f64;
    // In f64 first: f32 cannot tell neighbours apart in t / T of long contexts.
    let t = Tensor::arange(positions as i64, (Kind::Double, device));
    let one = |channel: &GlobalChannel| {
        let values_t = match channel {
            GlobalChannel::Surprisal => match surprisal {
                Some(surprisal) => surprisal.nats_t.shallow_clone(),
                None => anyhow::bail!("the surprisal channel is chosen but was not computed"),
            },
            GlobalChannel::Position => &t / total,
            GlobalChannel::LogPosition => t.log1p(),
            GlobalChannel::LogRemaining => (total - &t).log(),
        };
        Ok(values_t.to_kind(Kind::Float))
    };
    let rows = channels.iter().map(one).collect::<Result<Vec<_>>>()?;
    if rows.is_empty() {
        return Ok(Tensor::zeros([0, positions as i64], (Kind::Float, device)));
    }
    Ok(Tensor::stack(&rows, 0))
}
