//! Teacher-forced passes: continuations whose tokens are known, read after one pruned cache.
//!
//! Every continuation (a question with its answer, or a document's next tokens) runs after every
//! keep mask of a group in one forward. Greedy decoding gives the same tokens exactly where every
//! most likely token is the wanted one, so a pass without decoding decides whether an answer is right.
//!
//! Dimension key: n keep mask, q continuation, s token, w wanted token of all continuations, m hidden,
//! v vocabulary.

use anyhow::{Result, ensure};
use pkv_lm::{Branches, LanguageModel};
use tch::{Device, Kind, Tensor};

use crate::groups::forward_bytes;

/// Tokens to read and the tokens that must follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// Read as they are; at least one token.
    pub prompt: Vec<u32>,
    /// Each predicted from all before it; at least one token.
    pub wanted: Vec<u32>,
}

/// Continuations of one context, padded into a batch.
pub struct Batch {
    /// i64 `[q, s]`; the last wanted token is not read.
    ids_qs: Tensor,
    /// i64 `[w]`, into q x s: where each wanted token is predicted.
    at_w: Tensor,
    /// Wanted tokens of each continuation.
    wanted: Vec<usize>,
    /// i64 `[w]`.
    wanted_w: Tensor,
}

impl Batch {
    /// # Errors
    /// There is no continuation, or an empty one.
    pub fn new(continuations: &[Continuation], device: Device) -> Result<Self> {
        ensure!(!continuations.is_empty(), "there is no continuation to read");
        for c in continuations {
            ensure!(
                !c.prompt.is_empty() && !c.wanted.is_empty(),
                "a continuation needs a prompt and a wanted token, found {} and {}",
                c.prompt.len(),
                c.wanted.len()
            );
        }
        let read = |c: &Continuation| c.prompt.len() + c.wanted.len() - 1;
        let longest = continuations.iter().map(read).max().unwrap_or(0);
        let (mut ids, mut at, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (q, c) in continuations.iter().enumerate() {
            let first = q * longest + c.prompt.len() - 1;
            at.extend((first..first + c.wanted.len()).map(|i| i as i64));
            wanted.extend(c.wanted.iter().map(|&id| i64::from(id)));
            ids.extend(c.prompt.iter().chain(&c.wanted).take(read(c)).map(|&id| i64::from(id)));
            // Pads come after all that is read, where causal attention keeps them harmless.
            ids.resize((q + 1) * longest, i64::from(c.prompt[0]));
        }
        Ok(Self {
            ids_qs: Tensor::from_slice(&ids).view([-1, longest as i64]).to_device(device),
            at_w: Tensor::from_slice(&at).to_device(device),
            wanted: continuations.iter().map(|c| c.wanted.len()).collect(),
            wanted_w: Tensor::from_slice(&wanted).to_device(device),
        })
    }

    pub fn continuations(&self) -> usize {
        self.wanted.len()
    }

    /// Tokens that one row reads.
    pub fn tokens(&self) -> usize {
        self.ids_qs.size()[1] as usize
    }

    /// Range of the wanted tokens of each continuation in `[w]`.
    pub fn ranges(&self) -> Vec<std::ops::Range<usize>> {
        let mut end = 0;
        let range = |&n: &usize| {
            end += n;
            end - n..end
        };
        self.wanted.iter().map(range).collect()
    }

    /// Read all continuations in every branch, mask-major: the hidden states where wanted tokens are
    /// predicted, `[masks, wanted, hidden]`.
    ///
    /// # Errors
    /// The branches are of other continuations, or have no room.
    pub fn read(&self, model: &LanguageModel, branches: &mut Branches) -> Result<Tensor> {
        let masks = (branches.rows() / self.continuations()) as i64;
        let hidden_rsm = model.forward_branches(&self.ids_qs.repeat([masks, 1]), branches)?;
        let width = hidden_rsm.size()[2];
        Ok(hidden_rsm.view([masks, -1, width]).index_select(1, &self.at_w))
    }

    /// `look` at the log-probabilities of all masks, f32 `[some masks, wanted, vocab]`, as many at a time as
    /// fit into [`forward_bytes`] with one copy.
    fn log_probs<T>(
        &self,
        model: &LanguageModel,
        hidden_nwm: &Tensor,
        mut look: impl FnMut(&Tensor) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let mask = 8 * self.wanted_w.numel() * model.shape().vocab;
        let at_once = (forward_bytes(model.device()) / mask.max(1)).max(1);
        let mut found = Vec::new();
        for some_nwm in hidden_nwm.split(at_once as i64, 0) {
            found.extend(look(&model.logits(&some_nwm).log_softmax(-1, Kind::Float))?);
        }
        Ok(found)
    }

    /// The full cache's log-probabilities, f32 `[wanted, vocab]`, of its hidden states `[1, wanted, hidden]`.
    pub fn reference(&self, model: &LanguageModel, hidden_1wm: &Tensor) -> Tensor {
        model.logits(&hidden_1wm.squeeze_dim(0)).log_softmax(-1, Kind::Float)
    }

    /// Drift of each mask's predictions from `full_wv`, the full cache's.
    ///
    /// # Errors
    /// The device fails.
    pub fn drift(&self, model: &LanguageModel, hidden_nwm: &Tensor, full_wv: &Tensor) -> Result<Vec<Drift>> {
        self.log_probs(model, hidden_nwm, |some_nwv| Drift::new(full_wv, some_nwv))
    }

    /// Negative log-likelihood of the wanted tokens: f64 `[n][w]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn surprisal(&self, model: &LanguageModel, hidden_nwm: &Tensor) -> Result<Vec<Vec<f64>>> {
        self.log_probs(model, hidden_nwm, |some_nwv| surprisal(some_nwv, &self.wanted_w))
    }

    /// Bytes of a layer's activations of one mask, in f32; attention weights are bounded by the model itself.
    pub fn mask_bytes(&self, model: &LanguageModel) -> usize {
        let shape = model.shape();
        4 * self.continuations() * self.tokens() * (3 * shape.intermediate + 6 * shape.hidden)
    }
}

/// Drift of one mask's predictions from the full cache's.
pub struct Drift {
    /// f64 `[w]`, KL(full || pruned), nats.
    pub kl: Vec<f64>,
    /// `[w]`, the most likely token.
    pub most_likely: Vec<i64>,
}

impl Drift {
    /// One for each mask.
    ///
    /// # Shapes
    /// - `full_wv`: f32 `[wanted, vocab]`, the full cache's log-probabilities
    /// - `pruned_nwv`: f32 `[masks, wanted, vocab]`
    fn new(full_wv: &Tensor, pruned_nwv: &Tensor) -> Result<Vec<Self>> {
        let kl_nw = (full_wv.exp() * (full_wv - pruned_nwv)).sum_dim_intlist(-1, false, Kind::Float);
        // Rounding can leave a sum of almost nothing below 0.
        let kl = rows(&kl_nw.clamp_min(0.0).to_kind(Kind::Double))?;
        let most_likely = rows(&pruned_nwv.argmax(-1, false))?;
        Ok(kl.into_iter().zip(most_likely).map(|(kl, most_likely)| Self { kl, most_likely }).collect())
    }
}

/// Negative log-likelihood of the wanted tokens: f64 `[n][w]`.
fn surprisal(log_probs_nwv: &Tensor, wanted_w: &Tensor) -> Result<Vec<Vec<f64>>> {
    let n = log_probs_nwv.size()[0];
    let at_nw1 = wanted_w.view([1, -1, 1]).expand([n, -1, 1], false);
    let nll_nw = log_probs_nwv.gather(-1, &at_nw1, false).squeeze_dim(-1).neg();
    rows(&nll_nw.to_kind(Kind::Double))
}

fn rows<T>(matrix: &Tensor) -> Result<Vec<Vec<T>>>
where
    Vec<Vec<T>>: TryFrom<Tensor, Error = tch::TchError>,
{
    Ok(Vec::try_from(matrix.to_device(Device::Cpu))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_tokens_are_found_behind_prompts_of_different_lengths() {
        let c = |prompt: &[u32], wanted: &[u32]| Continuation {
            prompt: prompt.to_vec(),
            wanted: wanted.to_vec(),
        };
        let batch = Batch::new(&[c(&[5, 6, 7], &[8, 9]), c(&[1], &[2])], Device::Cpu).unwrap();
        assert_eq!(batch.tokens(), 4);
        assert_eq!(Vec::<Vec<i64>>::try_from(&batch.ids_qs).unwrap(), [[5, 6, 7, 8], [1, 1, 1, 1]]);
        assert_eq!(Vec::<i64>::try_from(&batch.at_w).unwrap(), [2, 3, 4]);
        assert_eq!(Vec::<i64>::try_from(&batch.wanted_w).unwrap(), [8, 9, 2]);
        assert_eq!(batch.ranges(), [0..2, 2..3]);
        assert!(Batch::new(&[c(&[], &[2])], Device::Cpu).is_err());
        assert!(Batch::new(&[], Device::Cpu).is_err());
    }

    #[test]
    fn drift_and_surprisal_equal_the_definitions() {
        let p = [[0.7f32, 0.2, 0.1], [0.3, 0.3, 0.4]];
        let q = [[[0.5f32, 0.25, 0.25], [0.3, 0.3, 0.4]]];
        let full = Tensor::from_slice2(&p).log();
        let pruned = Tensor::from_slice2(&q[0]).unsqueeze(0).log();
        let drift = Drift::new(&full, &pruned).unwrap().remove(0);
        let expected: f64 = (0..3).map(|i| f64::from(p[0][i]) * f64::from(p[0][i] / q[0][0][i]).ln()).sum();
        assert!((drift.kl[0] - expected).abs() < 1e-6);
        assert!(drift.kl[1] < 1e-7);
        assert_eq!(drift.most_likely, [0, 2]);
        let nll = surprisal(&pruned, &Tensor::from_slice(&[1i64, 2])).unwrap();
        assert!((nll[0][0] - 4f64.ln()).abs() < 1e-6 && (nll[0][1] + 0.4f64.ln()).abs() < 1e-6, "{nll:?}");
    }
}
