//! The multi-granularity hybrid loss.
//!
//! Five views of one question, which KV pairs of a context come first: at a handful of budgets
//! (`binary`), by value (`value_mse`), pair by pair inside the top (`fine`), as a distribution over
//! the whole context (`global`), as a direction (`cosine`). Heads and positions of a context are
//! ranked together, contexts of a batch never: every term is a mean over contexts.

use anyhow::{Context, Result, ensure};
use pkv_core::Seed;
use pkv_recipe::{FineLoss, LossSection};
use rand::Rng;
use tch::{Kind, Reduction, Tensor};

use crate::mapper::Mapper;

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
    /// Terms that are on, before weighting, scalars without gradient on the mapper's device.
    pub terms: Vec<(&'static str, Tensor)>,
}

/// The hybrid loss of a batch; terms of weight 0 are not computed.
///
/// # Shapes
/// - `scores_bot`: [`Mapper::forward`]'s predictions, `[b, o, t]`, f32
/// - `y_bot`: labels as log-odds, raw or pooled, not standardized, the same shape, any float kind
/// - `pairs_seed`: draws the `fine` term's pairs, by [`draw_pairs`]; another one in every step
///
/// # Errors
/// Shapes differ or are empty, or the mapper was built for other `binary_ratios` or without a term
/// that `loss` has on.
///
/// # Source
/// The five terms are those of arXiv 2605.16360 as its abstract and reviews name them; weights,
/// scales and normalizations are this project's, from measurement.
pub fn hybrid_loss(
    mapper: &Mapper,
    scores_bot: &Tensor,
    y_bot: &Tensor,
    loss: &LossSection,
    pairs_seed: u64,
) -> Result<LossTerms> {
    let shape = y_bot.size();
    let pairs = match shape[..] {
        [b, o, t] if loss.fine > 0.0 => Some(draw_pairs(&loss.fine_pairs, pairs_seed, b, o * t)),
        _ => None,
    };
    hybrid_loss_of_pairs(mapper, scores_bot, y_bot, loss, pairs.as_ref())
}

/// [`hybrid_loss`] with the `fine` term's pairs drawn before, `[2, b, pairs]`, Int or Int64: with
/// labels and pairs on the mapper's device, nothing waits for it.
///
/// # Errors
/// As [`hybrid_loss`], or the term is on and there are no pairs.
pub fn hybrid_loss_of_pairs(
    mapper: &Mapper,
    scores_bot: &Tensor,
    y_bot: &Tensor,
    loss: &LossSection,
    pairs_2bq: Option<&Tensor>,
) -> Result<LossTerms> {
    ensure!(
        scores_bot.size() == y_bot.size() && scores_bot.dim() == 3 && scores_bot.numel() > 0,
        "predictions have shape {:?}, labels {:?}; expected the same [batch, target heads, positions]",
        scores_bot.size(),
        y_bot.size()
    );
    let stats = mapper.standardization();
    let s_bn = scores_bot.flatten(1, 2);
    let y_bn = y_bot.detach().to_device(s_bn.device()).to_kind(Kind::Float).flatten(1, 2);
    let value_bn = y_bn.sigmoid();
    // Both terms that ask for the top want it from the largest label to the smallest. Stable, so that
    // of equal labels the lower index comes first on every device.
    let order_bn = (loss.binary > 0.0 || loss.fine > 0.0).then(|| y_bn.sort_stable(true, -1, true).1);
    let order_bn = || order_bn.as_ref().context("labels are not in order");
    let mut sum = Weighted::default();
    sum.add("binary", loss.binary, || binary(mapper, &s_bn, order_bn()?, loss))?;
    sum.add("value_mse", loss.value_mse, || {
        Ok(value_mse(&s_bn, &stats.standardize_labels(&y_bn), &value_bn))
    })?;
    sum.add("fine", loss.fine, || {
        let pairs_2bq = pairs_2bq.context("no pairs were drawn")?.to_device(s_bn.device());
        Ok(fine(&s_bn, &y_bn, order_bn()?, &pairs_2bq, loss.fine_pairs.top))
    })?;
    sum.add("global", loss.global, || global(mapper, &s_bn, &value_bn))?;
    sum.add("cosine", loss.cosine, || Ok(cosine(&stats.to_log_odds(&s_bn).sigmoid(), &value_bn)))?;
    let total = sum.total.context("every term of the loss is off")?;
    Ok(LossTerms { total, terms: sum.terms })
}

#[derive(Default)]
struct Weighted {
    total: Option<Tensor>,
    terms: Vec<(&'static str, Tensor)>,
}

impl Weighted {
    fn add(&mut self, name: &'static str, weight: f64, term: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if weight == 0.0 {
            return Ok(());
        }
        let term = term().with_context(|| format!("loss term `{name}`"))?;
        self.terms.push((name, term.detach()));
        let part = term * weight;
        self.total = Some(match self.total.take() {
            Some(total) => total + part,
            None => part,
        });
        Ok(())
    }
}

/// Cross-entropy of "in the top rho of its context" at each rho, over the entropy of rho, so that
/// knowing nothing costs 1 at every ratio; mean over ratios, all of them in one operation each.
fn binary(mapper: &Mapper, s_bn: &Tensor, order_bn: &Tensor, loss: &LossSection) -> Result<Tensor> {
    let Some(binary) = &mapper.loss_parameters().binary else {
        anyhow::bail!("the mapper was built with `loss.binary = 0`");
    };
    ensure!(
        binary.ratios.iter().map(|r| r.get()).eq(loss.binary_ratios.iter().copied()),
        "the mapper was built for `loss.binary_ratios` = {:?}, found {:?}",
        binary.ratios,
        loss.binary_ratios
    );
    let n = order_bn.size()[1];
    let place_bn = Tensor::arange(n, (Kind::Int64, order_bn.device())).expand_as(order_bn);
    let rank_b1n = order_bn.empty_like().scatter(1, order_bn, &place_bn).unsqueeze(1);
    let kept_brn = rank_b1n.lt_tensor(&binary.counts(n)).to_kind(Kind::Float);
    let column = |x: &Tensor| x.unsqueeze(-1);
    let logit_brn = column(&binary.offset_r) + s_bn.unsqueeze(1) * column(&binary.log_scale_r.exp());
    let weight_r1 = column(&binary.inverse_entropy_r);
    let none = None::<&Tensor>;
    Ok(logit_brn.binary_cross_entropy_with_logits(&kept_brn, Some(&weight_r1), none, Reduction::Mean))
}

/// Squared error of standardized log-odds, as a mean weighted by the score.
fn value_mse(s_bn: &Tensor, y_std_bn: &Tensor, value_bn: &Tensor) -> Tensor {
    let weight_bn = value_bn + VALUE_FLOOR;
    let error_b = ((s_bn - y_std_bn).square() * &weight_bn).sum_dim_intlist(1, false, None);
    (error_b / weight_bn.sum_dim_intlist(1, false, None)).mean(None)
}

/// Pairs of places among the first `top` of `n` values in order, uniform: `[2, contexts, pairs]`, Int64
/// on the CPU. Every context has a stream of its own.
pub fn draw_pairs(fine: &FineLoss, seed: u64, contexts: i64, n: i64) -> Tensor {
    let top = top_count(fine.top, n) as u64;
    let mut draws = Vec::with_capacity(2 * contexts.max(0) as usize * fine.pairs);
    for name in ["fine-left", "fine-right"] {
        for context in 0..contexts {
            let mut rng = Seed(seed).stream(name, context as u64);
            // 32 random bits times the count, high half: no division, and the same on every machine.
            draws.extend((0..fine.pairs).map(|_| ((u64::from(rng.random::<u32>()) * top) >> 32) as i64));
        }
    }
    Tensor::from_slice(&draws).reshape([2, contexts, fine.pairs as i64])
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
fn global(mapper: &Mapper, s_bn: &Tensor, value_bn: &Tensor) -> Result<Tensor> {
    let Some(log_scale) = &mapper.loss_parameters().global_log_scale else {
        anyhow::bail!("the mapper was built with `loss.global = 0`");
    };
    let share_bn = value_bn / value_bn.sum_dim_intlist(1, true, None);
    let predicted_bn = (s_bn * log_scale.exp()).log_softmax(1, None);
    let distance_bn = &share_bn * (share_bn.log() - predicted_bn);
    Ok(distance_bn.sum_dim_intlist(1, false, None).mean(None))
}

/// 1 - cosine of predicted and true scores.
fn cosine(predicted_bn: &Tensor, value_bn: &Tensor) -> Tensor {
    -Tensor::cosine_similarity(predicted_bn, value_bn, 1, 1e-8).mean(None) + 1.0
}
