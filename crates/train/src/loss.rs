//! The multi-granularity hybrid loss, and the numbers that it learns beside the network.
//!
//! Five terms for one question, how the KV pairs of a context are ranked: at a few budgets (`binary`), by
//! value (`value_mse`), pair by pair inside the top (`fine`), as a distribution over the whole context
//! (`global`), as a direction (`cosine`). Heads and positions of a context are ranked together, contexts of a
//! batch never: every term is a mean over contexts.
//!
//! It does not depend on the network that made the predictions.

use anyhow::{Context as _, Result, ensure};
use pkv_checkpoint::{LOSS_PREFIX, NamedTensors};
use pkv_core::{RetentionRatio, Seed};
use pkv_mapper::Standardization;
use pkv_recipe::{FineLoss, LossSection};
use rand::Rng;
use tch::{Device, Kind, Reduction, Tensor};

/// Start of the binary term's learned scale, as a logarithm: trained scales settle near 4 to 5.
const BINARY_LOG_SCALE: f64 = 1.5;
/// Added to the score as weight of its squared error: the many small scores count a little.
const VALUE_FLOOR: f64 = 0.1;
/// Steepness of the pair-wise logistic; about the scale that the binary term learns.
const FINE_SLOPE: f64 = 4.0;
/// Gaps in log-odds beyond this weigh no more.
const FINE_GAP_LIMIT: f64 = 2.0;

/// A loss and its parts.
#[derive(Debug)]
pub struct LossTerms {
    /// Weighted sum, a scalar with gradient.
    pub total: Tensor,
    /// Terms that are on, before weighting, scalars without gradient on the predictions' device.
    pub terms: Vec<(&'static str, Tensor)>,
}

/// The hybrid loss of a recipe's `[loss]`; terms of weight 0 are not computed.
///
/// # Source
/// The five terms are those of arXiv 2605.16360 as its abstract and reviews name them; weights,
/// scales and normalizations are this project's, from measurement.
pub struct HybridLoss {
    section: LossSection,
    /// The scale of predictions, on the device that the loss is computed on.
    stats: Standardization,
    binary: Option<Binary>,
    /// Logarithm of the global term's scale, no dimension.
    global_log_scale: Option<Tensor>,
    parameters: NamedTensors,
}

/// Constants of the binary term's retention ratios; tensors `[ratios]`.
struct Binary {
    ratios: Vec<RetentionRatio>,
    /// The ratios, f64.
    ratio_r: Tensor,
    /// 1 / entropy of the ratio, f32.
    inverse_entropy_r: Tensor,
    /// Learned.
    log_scale_r: Tensor,
    /// Learned.
    offset_r: Tensor,
}

impl Binary {
    fn new(parameters: &mut NamedTensors, ratios: &[f64], device: Device) -> Result<Self> {
        let ratios: Vec<RetentionRatio> =
            ratios.iter().map(|&r| RetentionRatio::new(r)).collect::<Result<_, _>>()?;
        let shape = [ratios.len() as i64];
        let log_scale_r = learned(parameters, "binary_log_scale", &shape, BINARY_LOG_SCALE, device);
        let offset_r = learned(parameters, "binary_offset", &shape, 0.0, device);
        let plain: Vec<f64> = ratios.iter().map(|r| r.get()).collect();
        let entropy = |r: &f64| -(r * r.ln() + (1.0 - r) * (1.0 - r).ln());
        let inverse: Vec<f32> = plain.iter().map(|r| entropy(r).recip() as f32).collect();
        Ok(Self {
            ratios,
            ratio_r: Tensor::from_slice(&plain).to_device(device),
            inverse_entropy_r: Tensor::from_slice(&inverse).to_device(device),
            log_scale_r,
            offset_r,
        })
    }

    /// [`RetentionRatio::count`] of `n` for every ratio, f64 `[ratios, 1]`, without asking the host.
    fn counts(&self, n: i64) -> Tensor {
        (&self.ratio_r * n as f64 + 0.5).floor().clamp(1.0, n as f64).unsqueeze(-1)
    }

    /// Cross-entropy of "in the top rho of its context" at each rho, over the entropy of rho, so that
    /// knowing nothing costs 1 at every ratio; mean over ratios, all of them in one operation each.
    fn of(&self, s_bn: &Tensor, order_bn: &Tensor) -> Tensor {
        let n = order_bn.size()[1];
        let place_bn = Tensor::arange(n, (Kind::Int64, order_bn.device())).expand_as(order_bn);
        let rank_b1n = order_bn.empty_like().scatter(1, order_bn, &place_bn).unsqueeze(1);
        let kept_brn = rank_b1n.lt_tensor(&self.counts(n)).to_kind(Kind::Float);
        let column = |x: &Tensor| x.unsqueeze(-1);
        let logit_brn = column(&self.offset_r) + s_bn.unsqueeze(1) * column(&self.log_scale_r.exp());
        let weight_r1 = column(&self.inverse_entropy_r);
        let none = None::<&Tensor>;
        logit_brn.binary_cross_entropy_with_logits(&kept_brn, Some(&weight_r1), none, Reduction::Mean)
    }
}

/// A trainable f32 tensor of equal numbers, added to `parameters`.
fn learned(parameters: &mut NamedTensors, name: &str, shape: &[i64], value: f64, device: Device) -> Tensor {
    let x = Tensor::full(shape, value, (Kind::Float, device)).set_requires_grad(true);
    parameters.push((format!("{LOSS_PREFIX}{name}"), x.shallow_clone()));
    x
}

impl HybridLoss {
    /// The loss at its start, for predictions that `stats` standardizes, on their device.
    ///
    /// # Errors
    /// A ratio outside (0, 1].
    pub fn new(section: &LossSection, stats: &Standardization) -> Result<Self> {
        let device = stats.heads_mean_pc.device();
        let mut parameters = Vec::new();
        let binary = (section.binary > 0.0)
            .then(|| Binary::new(&mut parameters, &section.binary_ratios, device))
            .transpose()?;
        // A small score is about the exponential of its log-odds, so the labels' deviation is the
        // scale at which a softmax of perfect predictions is the share of the scores.
        let start = f64::from(stats.label_std).ln();
        let global_log_scale =
            (section.global > 0.0).then(|| learned(&mut parameters, "global_log_scale", &[], start, device));
        let stats = stats.to_device(device);
        Ok(Self { section: section.clone(), stats, binary, global_log_scale, parameters })
    }

    /// All that is trained, by name, in a fixed order; tensors share memory with the loss.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// The loss of a batch.
    ///
    /// # Shapes
    /// - `scores_bot`: predictions, `[b, o, t]`, f32, standardized log-odds
    /// - `y_bot`: labels as log-odds, raw or pooled, not standardized, the same shape, any float kind
    /// - `pairs_seed`: draws the `fine` term's pairs, by `draw_pairs`; another one in every step
    ///
    /// # Errors
    /// Shapes differ or are empty, or every term is off.
    pub fn of(&self, scores_bot: &Tensor, y_bot: &Tensor, pairs_seed: u64) -> Result<LossTerms> {
        let shape = y_bot.size();
        let pairs = match shape[..] {
            [b, o, t] if self.section.fine > 0.0 => {
                let places = draw_pairs(&self.section.fine_pairs, pairs_seed, b, o * t);
                Some(Tensor::from_slice(&places).reshape([2, b, self.section.fine_pairs.pairs as i64]))
            }
            _ => None,
        };
        self.of_pairs(scores_bot, y_bot, pairs.as_ref())
    }

    /// [`Self::of`] with the `fine` term's pairs drawn before, `[2, b, pairs]`, Int or Int64: with
    /// labels and pairs on the loss's device, nothing waits for it.
    ///
    /// # Errors
    /// As [`Self::of`], or the term is on and there are no pairs.
    pub fn of_pairs(
        &self,
        scores_bot: &Tensor,
        y_bot: &Tensor,
        pairs_2bq: Option<&Tensor>,
    ) -> Result<LossTerms> {
        ensure!(
            scores_bot.size() == y_bot.size() && scores_bot.dim() == 3 && scores_bot.numel() > 0,
            "predictions have shape {:?}, labels {:?}; expected the same [batch, target heads, positions]",
            scores_bot.size(),
            y_bot.size()
        );
        let weight = &self.section;
        let s_bn = scores_bot.flatten(1, 2);
        let y_bn = y_bot.detach().to_device(s_bn.device()).to_kind(Kind::Float).flatten(1, 2);
        let value_bn = y_bn.sigmoid();
        // Both terms that ask for the top want it from the largest label to the smallest. Stable, so that
        // of equal labels the lower index comes first on every device.
        let order_bn =
            (self.binary.is_some() || weight.fine > 0.0).then(|| y_bn.sort_stable(true, -1, true).1);
        let mut sum = Weighted::default();
        if let (Some(binary), Some(order_bn)) = (&self.binary, &order_bn) {
            sum.add("binary", weight.binary, binary.of(&s_bn, order_bn));
        }
        if weight.value_mse > 0.0 {
            let y_std_bn = self.stats.standardize_labels(&y_bn);
            sum.add("value_mse", weight.value_mse, value_mse(&s_bn, &y_std_bn, &value_bn));
        }
        if let (true, Some(order_bn)) = (weight.fine > 0.0, &order_bn) {
            let pairs_2bq =
                pairs_2bq.context("loss term `fine`: no pairs were drawn")?.to_device(s_bn.device());
            let term = fine(&s_bn, &y_bn, order_bn, &pairs_2bq, weight.fine_pairs.top);
            sum.add("fine", weight.fine, term);
        }
        if let Some(log_scale) = &self.global_log_scale {
            sum.add("global", weight.global, global(log_scale, &s_bn, &value_bn));
        }
        if weight.cosine > 0.0 {
            let predicted_bn = self.stats.to_log_odds(&s_bn).sigmoid();
            sum.add("cosine", weight.cosine, cosine(&predicted_bn, &value_bn));
        }
        let total = sum.total.context("every term of the loss is off")?;
        Ok(LossTerms { total, terms: sum.terms })
    }

    /// Start the binary term's offsets where a perfect prediction would have them: at the mean
    /// threshold of each ratio over `labels` (log-odds `[b, o, t]`, pooled as in training). Without
    /// this they start at 0 and need some hundred steps to travel there. No effect if the term is off.
    ///
    /// # Errors
    /// A shape that is not `[b, o, t]`, another `o` than the first has, or no label at all.
    pub fn calibrate(&mut self, labels: &[Tensor]) -> Result<()> {
        let Some(Binary { ratios, log_scale_r, offset_r, .. }) = &mut self.binary else { return Ok(()) };
        let _guard = tch::no_grad_guard();
        let (mut sums, mut contexts) = (vec![0.0; ratios.len()], 0i64);
        let heads = labels.first().and_then(|y_bot| y_bot.size().get(1).copied());
        for y_bot in labels {
            let shape = y_bot.size();
            ensure!(
                shape.len() == 3 && Some(shape[1]) == heads && y_bot.numel() > 0,
                "labels have shape {shape:?}, expected [batch, target heads, positions], and {} heads as the first",
                heads.unwrap_or(0)
            );
            let y_bn = self.stats.standardize_labels(y_bot).flatten(1, 2);
            contexts += shape[0];
            for (sum, ratio) in sums.iter_mut().zip(ratios.iter()) {
                let top_bn = pkv_prune::top_mask(&y_bn, ratio.count(y_bn.size()[1] as usize));
                let lowest_b = y_bn.masked_fill(&top_bn.logical_not(), f64::INFINITY).amin([1], false);
                *sum += lowest_b.sum(Kind::Double).double_value(&[]);
            }
        }
        ensure!(contexts > 0, "no labels to take thresholds of");
        let mean: Vec<f32> = sums.iter().map(|sum| (sum / contexts as f64) as f32).collect();
        let threshold_r = Tensor::from_slice(&mean).to_device(offset_r.device());
        offset_r.copy_(&(log_scale_r.exp() * threshold_r).neg());
        Ok(())
    }
}

#[derive(Default)]
struct Weighted {
    total: Option<Tensor>,
    terms: Vec<(&'static str, Tensor)>,
}

impl Weighted {
    fn add(&mut self, name: &'static str, weight: f64, term: Tensor) {
        self.terms.push((name, term.detach()));
        let part = term * weight;
        self.total = Some(match self.total.take() {
            Some(total) => total + part,
            None => part,
        });
    }
}

/// Squared error of standardized log-odds, as a mean weighted by the score.
fn value_mse(s_bn: &Tensor, y_std_bn: &Tensor, value_bn: &Tensor) -> Tensor {
    let weight_bn = value_bn + VALUE_FLOOR;
    let error_b = ((s_bn - y_std_bn).square() * &weight_bn).sum_dim_intlist(1, false, None);
    (error_b / weight_bn.sum_dim_intlist(1, false, None)).mean(None)
}

/// Pairs of places among the first `top` of `n` values in order, uniform: as `[2, contexts, pairs]`,
/// row-major. Every context has a stream of its own.
pub fn draw_pairs(fine: &FineLoss, seed: u64, contexts: i64, n: i64) -> Vec<i64> {
    let top = top_count(fine.top, n) as u64;
    let mut draws = Vec::with_capacity(2 * contexts.max(0) as usize * fine.pairs);
    for name in ["fine-left", "fine-right"] {
        for context in 0..contexts {
            let mut rng = Seed(seed).stream(name, context as u64);
            // 32 random bits times the count, high half: no division, and the same on every machine.
            draws.extend((0..fine.pairs).map(|_| ((u64::from(rng.random::<u32>()) * top) >> 32) as i64));
        }
    }
    draws
}

fn top_count(share: f64, n: i64) -> i64 {
    ((n as f64 * share) as i64).clamp(1, n.max(1))
}

/// Logistic loss of the order of random pairs from each context's top, weighted by their gap.
fn fine(s_bn: &Tensor, y_bn: &Tensor, order_bn: &Tensor, pairs_2bq: &Tensor, share: f64) -> Tensor {
    let top_bk = order_bn.narrow(1, 0, top_count(share, y_bn.size()[1]));
    let pairs_2bq = pairs_2bq.to_kind(Kind::Int64);
    let pick = |side: i64| top_bk.gather(1, &pairs_2bq.get(side), false);
    let (left_bq, right_bq) = (pick(0), pick(1));
    let gap = |x: &Tensor| x.gather(1, &left_bq, false) - x.gather(1, &right_bq, false);
    let y_gap = gap(y_bn);
    let wrong = (gap(s_bn) * y_gap.sign() * -FINE_SLOPE).softplus();
    (wrong * y_gap.abs().clamp_max(FINE_GAP_LIMIT)).mean(None)
}

/// How far the softmax of scaled predictions is from the scores' shares of their sum: cross-entropy
/// less the shares' own entropy, so that 0 is perfect.
fn global(log_scale: &Tensor, s_bn: &Tensor, value_bn: &Tensor) -> Tensor {
    let share_bn = value_bn / value_bn.sum_dim_intlist(1, true, None);
    let predicted_bn = (s_bn * log_scale.exp()).log_softmax(1, None);
    let distance_bn = &share_bn * (share_bn.log() - predicted_bn);
    distance_bn.sum_dim_intlist(1, false, None).mean(None)
}

/// 1 - cosine of predicted and true scores.
fn cosine(predicted_bn: &Tensor, value_bn: &Tensor) -> Tensor {
    -Tensor::cosine_similarity(predicted_bn, value_bn, 1, 1e-8).mean(None) + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the loss counts on the device is what keep masks count.
    #[test]
    fn counts_are_those_of_the_ratios() {
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let ratios = [0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.5, 0.25];
        let binary = Binary::new(&mut Vec::new(), &ratios, device).unwrap();
        for n in (1..3000).chain([36_000, 50_400, 1_048_575, 16_777_217]) {
            let expected: Vec<f64> = binary.ratios.iter().map(|r| r.count(n as usize) as f64).collect();
            assert_eq!(Vec::<f64>::try_from(binary.counts(n).flatten(0, -1)).unwrap(), expected, "{n}");
        }
    }
}
