//! Keep masks: the KV pairs that a budget keeps in the cache.
//!
//! The k-th largest score is a threshold; pairs above it stay, and of the pairs that equal it the
//! ones with the lower index fill the rest. No sort's order of equal elements is relied upon, so
//! the mask is the same on every device.

use anyhow::{Result, ensure};
use pkv_core::{HEAD_PLACES, Policy, RetentionRatio, hinted, key_diff_weight};
use tch::{Device, Kind, Tensor};

use crate::HeadBudgets;
use crate::key_diff::with_key_diff;

/// What policies read beside a method's scores.
#[derive(Clone, Copy, Debug, Default)]
pub struct PolicyInputs<'a> {
    /// Of the scores' heads; `pair-budget` needs them.
    pub budgets: Option<&'a HeadBudgets>,
    /// KeyDiff's scores of the same pairs, of the scores' shape; `pair-keydiff` needs them.
    pub key_diff_lht: Option<&'a Tensor>,
    /// Last positions of every head to keep before all others ([`newest_first`]).
    pub newest: usize,
}

impl PolicyInputs<'_> {
    /// The scores that `policy` ranks by where a share `kept` of the pairs stays, and the policy that then
    /// needs nothing but them and the budgets.
    fn ranked(&self, scores_lht: &Tensor, policy: Policy, kept: f64) -> Result<(Tensor, Policy)> {
        let (scores_lht, policy) = match (policy, self.key_diff_lht) {
            (Policy::PairKeydiff, Some(key_diff_lht)) => {
                ensure!(
                    key_diff_lht.size() == scores_lht.size(),
                    "KeyDiff has scores of shape {:?}, the method of {:?}",
                    key_diff_lht.size(),
                    scores_lht.size()
                );
                (with_key_diff(scores_lht, key_diff_lht, key_diff_weight(kept)), Policy::PairFloor)
            }
            (Policy::PairKeydiff, None) => {
                return Err(hinted(
                    "policy `pair-keydiff` needs the target's keys, and there are only scores",
                    "use policy `pair-floor`",
                )
                .into());
            }
            (policy, _) => (scores_lht.shallow_clone(), policy),
        };
        Ok((newest_first(&scores_lht, self.newest), policy))
    }
}

/// The KV pairs that `policy` keeps at `ratio`.
///
/// As [`keep_mask`]. Under `pair-budget` the same total of pairs is kept as under `pair`, and each head keeps
/// its own best positions, as many as its budget says. `pair-keydiff` is `pair-floor` of scores to which
/// KeyDiff's are added, the more the less is kept ([`key_diff_weight`]).
///
/// # Errors
/// The policy lacks an input, or it is of other heads or positions than the scores are of.
pub fn keep_mask_by(
    scores_lht: &Tensor,
    policy: Policy,
    ratio: RetentionRatio,
    inputs: &PolicyInputs,
) -> Result<Tensor> {
    let (scores_lht, policy) = inputs.ranked(scores_lht, policy, ratio.get())?;
    if policy != Policy::PairBudget {
        return Ok(keep_mask(&scores_lht, policy, ratio));
    }
    keep_within(&scores_lht, inputs.budgets, ratio.count(scores_lht.numel()))
}

/// As [`keep_mask_by`], of a budget of `tokens` positions, as [`keep_mask_budget`] counts them.
///
/// # Errors
/// As [`keep_mask_by`].
pub fn keep_mask_budget_by(
    scores_lht: &Tensor,
    policy: Policy,
    tokens: usize,
    inputs: &PolicyInputs,
) -> Result<Tensor> {
    let positions = scores_lht.size().last().copied().unwrap_or(1) as usize;
    let kept = tokens as f64 / positions.max(1) as f64;
    let (scores_lht, policy) = inputs.ranked(scores_lht, policy, kept)?;
    if policy != Policy::PairBudget {
        return Ok(keep_mask_budget(&scores_lht, policy, tokens));
    }
    let heads = scores_lht.numel().checked_div(positions).unwrap_or(0);
    keep_within(&scores_lht, inputs.budgets, tokens.min(positions) * heads)
}

/// The best positions of every head: `kept` pairs in all, spread as `budgets` say.
fn keep_within(scores_lht: &Tensor, budgets: Option<&HeadBudgets>, kept: usize) -> Result<Tensor> {
    let Some(budgets) = budgets else {
        return Err(hinted(
            "policy `pair-budget` needs head budgets, and there are none",
            "export the mapper again, which stores budgets; or use policy `pair-uniform`",
        )
        .into());
    };
    let shape = scores_lht.size();
    let positions = shape.last().copied().unwrap_or(1);
    if scores_lht.numel() == 0 {
        return Ok(Tensor::zeros(&shape, (Kind::Bool, scores_lht.device())));
    }
    let scores_ot = scores_lht.reshape([-1, positions]);
    ensure!(
        scores_ot.size()[0] as usize == budgets.heads(),
        hinted(
            format!(
                "head budgets are for {} KV heads, the scores have {}",
                budgets.heads(),
                scores_ot.size()[0]
            ),
            "use the budgets of the target that is pruned"
        )
    );
    let counts = budgets.counts(kept, positions as usize);
    Ok(top_mask_each(&scores_ot, &counts).reshape(&shape))
}

/// `scores_lht` with the `newest` last positions of every head above all others, later ones higher: any
/// policy then keeps them first, and of them the last ones where the budget is smaller. They count as kept.
/// f64 unless `newest` is 0.
///
/// # Shapes
/// - `scores_lht`: `[.., positions]`, any float kind; returns the same shape
pub fn newest_first(scores_lht: &Tensor, newest: usize) -> Tensor {
    let positions = scores_lht.size().last().copied().unwrap_or(0);
    let newest = (newest as i64).min(positions);
    if newest == 0 || scores_lht.numel() == 0 {
        return scores_lht.shallow_clone();
    }
    let out = scores_lht.to_dtype(Kind::Double, false, true);
    // What is no number is lowest, and has no say in how high the others are.
    let highest = out.where_scalarother(&out.isfinite(), 0.0).max();
    let above = Tensor::arange_start(1, newest + 1, (Kind::Double, out.device())) + highest;
    out.narrow(-1, positions - newest, newest).copy_(&above);
    out
}

/// The KV pairs that `policy` keeps at `ratio`, of scores alone.
///
/// Exactly `ratio.count(n)` of each n that compete: all pairs (`pair`; `pair-floor`, ranked by
/// [`HEAD_PLACES`]), the positions of each head (`pair-uniform`), or the positions themselves (`token`,
/// ranked by [`token_scores`]). Of equal scores the lower flat index stays. A score that is not a number
/// counts as the lowest.
///
/// # Panics
/// `policy` is not among [`Policy::OF_SCORES`]: [`keep_mask_by`] has all.
///
/// # Shapes
/// - `scores_lht`: `[.., positions]`, any float kind; the dimensions before are layers and KV heads,
///   flattened or not
/// - returns the same shape, bool, same device, true = keep
///
/// ```
/// use pkv_core::{Policy, RetentionRatio};
/// use pkv_prune::keep_mask;
/// use tch::Tensor;
///
/// let scores = Tensor::from_slice2(&[[0.9f32, 0.8, 0.7, 0.1], [0.3, 0.2, 0.6, 0.4]]);
/// let kept = |policy| {
///     let mask = keep_mask(&scores, policy, RetentionRatio::new(0.5).unwrap());
///     (0..2).map(|head| mask.get(head).sum(tch::Kind::Int64).int64_value(&[])).collect::<Vec<_>>()
/// };
/// assert_eq!(kept(Policy::Pair), [3, 1], "all pairs compete");
/// assert_eq!(kept(Policy::PairUniform), [2, 2], "every head keeps as many");
/// ```
pub fn keep_mask(scores_lht: &Tensor, policy: Policy, ratio: RetentionRatio) -> Tensor {
    keep(scores_lht, policy, |_, competitors| vec![ratio.count(competitors)]).remove(0)
}

/// [`keep_mask_by`] at each of `ratios`; what they share is computed once.
///
/// # Errors
/// As [`keep_mask_by`].
pub fn keep_masks(
    scores_lht: &Tensor,
    policy: Policy,
    ratios: &[RetentionRatio],
    inputs: &PolicyInputs,
) -> Result<Vec<Tensor>> {
    if !Policy::OF_SCORES.contains(&policy) {
        return ratios.iter().map(|&ratio| keep_mask_by(scores_lht, policy, ratio, inputs)).collect();
    }
    let scores_lht = newest_first(scores_lht, inputs.newest);
    Ok(keep(&scores_lht, policy, |_, competitors| ratios.iter().map(|r| r.count(competitors)).collect()))
}

/// The KV pairs that `policy` keeps of a budget of `tokens` positions.
///
/// As [`keep_mask`], with a count of `tokens` positions of every head (`pair-uniform`, `token`), or
/// as many KV pairs as these are together (`pair`). A budget beyond the context keeps all of it.
///
/// # Panics
/// As [`keep_mask`]: [`keep_mask_budget_by`] has all policies.
pub fn keep_mask_budget(scores_lht: &Tensor, policy: Policy, tokens: usize) -> Tensor {
    keep(scores_lht, policy, |positions, competitors| {
        vec![tokens.min(positions) * competitors.checked_div(positions).unwrap_or(0)]
    })
    .remove(0)
}

/// A mask for each of `counts(positions, competitors)` of every group of competitors.
fn keep(scores_lht: &Tensor, policy: Policy, counts: impl Fn(usize, usize) -> Vec<usize>) -> Vec<Tensor> {
    let shape = scores_lht.size();
    let total = scores_lht.numel();
    let positions = shape.last().copied().unwrap_or(1) as usize;
    if total == 0 {
        let none = |_| Tensor::zeros(&shape, (Kind::Bool, scores_lht.device()));
        return counts(positions, 0).into_iter().map(none).collect();
    }
    let masks = |scores_bn: &Tensor, competitors| top_masks(scores_bn, &counts(positions, competitors));
    let shaped = |masks: Vec<Tensor>| masks.into_iter().map(|mask| mask.reshape(&shape)).collect();
    match policy {
        Policy::Pair => shaped(masks(&scores_lht.reshape([1, -1]), total)),
        Policy::PairFloor => shaped(masks(&by_place(&scores_lht.reshape([-1, positions as i64])), total)),
        Policy::PairUniform => shaped(masks(&scores_lht.reshape([-1, positions as i64]), positions)),
        Policy::Token => {
            let keep_1t = masks(&token_scores(scores_lht).unsqueeze(0), positions);
            keep_1t.into_iter().map(|keep| keep.squeeze_dim(0).expand(&shape, false).contiguous()).collect()
        }
        Policy::PairBudget | Policy::PairKeydiff => {
            panic!("policy `{}` needs more than scores", policy.name())
        }
    }
}

/// Scores for the `pair-floor` policy: of a pair's place among all pairs and [`HEAD_PLACES`] times its place
/// within its head, both from the top and as shares, the better one. Of n pairs that stay, every head has its
/// best n / (6 heads) or more.
///
/// # Shapes
/// - `scores_ot`: `[KV heads, positions]`, any float kind
/// - returns `[1, pairs]`, f64, same device: whole numbers below 0, higher means keep
pub(crate) fn by_place(scores_ot: &Tensor) -> Tensor {
    let heads = scores_ot.size()[0];
    let of_all_1n = place(&scores_ot.reshape([1, -1])) + 1;
    let of_head_1n = (place(scores_ot) + 1).reshape([1, -1]) * (HEAD_PLACES * heads);
    -of_all_1n.minimum(&of_head_1n).to_kind(Kind::Double)
}

/// Every score's place in its row from the top, from 0, i64; of equal scores the lower index comes first.
pub(crate) fn place(scores_bn: &Tensor) -> Tensor {
    // One zero: what compares equal must sort as equal on every device.
    let order = (ordered(scores_bn) + 0.0).sort_stable(true, -1, true).1;
    order.sort(-1, false).1
}

/// One score per position for the `token` policy: the mean, over all layers and KV heads, of the
/// position's rank within the head.
///
/// Ranks and not scores, because heads differ so much in strength (the strongest average 0.9) that
/// a mean of scores would be the opinion of a few. Equal scores share their average rank. Lowest
/// rank 1, so higher means keep.
///
/// # Shapes
/// - `scores_lht`: `[.., positions]`, as for [`keep_mask`]
/// - returns `[positions]`, f64, same device; exact up to the last division
pub fn token_scores(scores_lht: &Tensor) -> Tensor {
    let positions = scores_lht.size().last().copied().unwrap_or(1);
    if scores_lht.numel() == 0 {
        return Tensor::zeros([positions], (Kind::Double, scores_lht.device()));
    }
    let scores_ot = ordered(scores_lht).reshape([-1, positions]).contiguous();
    let (sorted_ot, _) = scores_ot.sort(-1, false);
    let side = |right| sorted_ot.searchsorted_of(&scores_ot, right);
    // Below it, and not above it: their sum plus 1 is twice the average rank, an integer.
    let twice_rank_ot = side(false) + side(true) + 1;
    let heads = scores_ot.size()[0];
    twice_rank_ot.sum_dim_intlist(0, false, Kind::Int64).to_kind(Kind::Double) / (2 * heads) as f64
}

/// The `k` largest of every row; of equal scores the lower index.
///
/// # Shapes
/// - `scores_bn`: `[rows, n]`, any float kind
/// - returns `[rows, n]`, bool, same device, with min(k, n) true in every row
///
/// Gradients do not flow through a mask; the device is never waited for.
pub fn top_mask(scores_bn: &Tensor, k: usize) -> Tensor {
    top_masks(scores_bn, &[k]).remove(0)
}

/// The `counts[b]` largest of row b; of equal scores the lower index.
///
/// # Shapes
/// - `scores_bn`: `[rows, n]`, any float kind, n at least 1; a count for every row
/// - returns `[rows, n]`, bool, same device
fn top_mask_each(scores_bn: &Tensor, counts: &[usize]) -> Tensor {
    let (n, device) = (scores_bn.size()[1], scores_bn.device());
    let counts: Vec<i64> = counts.iter().map(|&k| (k as i64).min(n)).collect();
    let scores_bn = ordered(scores_bn);
    let threshold_b1 = match device {
        // A selection by row, as in `kth_largest`. A row of which nothing stays has any threshold.
        Device::Cpu => {
            let rows = counts.iter().enumerate();
            let of = rows.map(|(b, &k)| kth_largest(&scores_bn.narrow(0, b as i64, 1), k.max(1), &mut None));
            Tensor::cat(&of.collect::<Vec<_>>(), 0)
        }
        _ => {
            let last: Vec<i64> = counts.iter().map(|k| (k - 1).max(0)).collect();
            let last_b1 = Tensor::from_slice(&last).to_device(device).unsqueeze(1);
            scores_bn.sort(-1, true).0.gather(-1, &last_b1, false)
        }
    };
    let counts_b1 = Tensor::from_slice(&counts).to_device(device).unsqueeze(1);
    with_ties(&scores_bn, &threshold_b1, &counts_b1).logical_and(&counts_b1.gt(0))
}

/// What lies above each row's threshold, and as many of what equals it as make `k`, lower indices first.
fn with_ties(scores_bn: &Tensor, threshold_b1: &Tensor, k: &Tensor) -> Tensor {
    let above_bn = scores_bn.gt_tensor(threshold_b1);
    let equal_bn = scores_bn.eq_tensor(threshold_b1);
    let room_b1 = above_bn.sum_dim_intlist(-1, true, Kind::Int64).neg() + k;
    let place_bn = equal_bn.cumsum(-1, Kind::Int64);
    above_bn.logical_or(&equal_bn.logical_and(&place_bn.le_tensor(&room_b1)))
}

/// [`top_mask`] for each of `counts`; where it takes a sort, one serves all.
fn top_masks(scores_bn: &Tensor, counts: &[usize]) -> Vec<Tensor> {
    let shape = scores_bn.size();
    let n = shape[1];
    let full = |value: bool| Tensor::full(&shape, i64::from(value), (Kind::Bool, scores_bn.device()));
    let scores_bn = ordered(scores_bn);
    let mut sorted_bn = None;
    let one = |&k: &usize| {
        let k = k as i64;
        if k <= 0 || n == 0 {
            return full(false);
        }
        if k >= n {
            return full(true);
        }
        let threshold_b1 = kth_largest(&scores_bn, k, &mut sorted_bn);
        with_ties(&scores_bn, &threshold_b1, &Tensor::full([1], k, (Kind::Int64, scores_bn.device())))
    };
    counts.iter().map(one).collect()
}

/// The k-th largest of every row, `[rows, 1]`; `sorted_bn` is for later calls.
fn kth_largest(scores_bn: &Tensor, k: i64, sorted_bn: &mut Option<Tensor>) -> Tensor {
    let n = scores_bn.size()[1];
    match scores_bn.device() {
        // A selection, linear in n: 7 to 15 times faster than a sort of 36,000 to 50,000 pairs.
        Device::Cpu => scores_bn.kthvalue(n - k + 1, -1, true).0,
        // kthvalue is refused there when only deterministic kernels are allowed.
        _ => sorted_bn.get_or_insert_with(|| scores_bn.sort(-1, true).0).narrow(-1, k - 1, 1),
    }
}

/// Scores that compare the same everywhere: at least f32, no gradient, not-a-number lowest.
pub(crate) fn ordered(scores: &Tensor) -> Tensor {
    let scores = scores.detach();
    let scores = if scores.kind() == Kind::Double { scores } else { scores.to_kind(Kind::Float) };
    scores.nan_to_num(f64::NEG_INFINITY, f64::INFINITY, f64::NEG_INFINITY)
}

pub(crate) trait Ranked {
    fn searchsorted_of(&self, values: &Tensor, right: bool) -> Tensor;
}

impl Ranked for Tensor {
    /// Number of entries of each sorted row below (or, from the right, not above) each value, i64.
    fn searchsorted_of(&self, values: &Tensor, right: bool) -> Tensor {
        let side = if right { "right" } else { "left" };
        values.searchsorted(self, false, right, side, None::<&Tensor>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_gpu::DeviceChoice;
    use rand::Rng;

    fn device() -> Device {
        pkv_gpu::device(DeviceChoice::Auto).unwrap()
    }

    #[test]
    fn keys_decide_more_the_less_is_kept() {
        let (heads, positions) = (6_i64, 100_i64);
        let of =
            |seed| Tensor::from_slice(&scores(seed, 600, 1000)).view([2, 3, positions]).to_device(device());
        let (scores_lht, key_diff_lht) = (of(3), of(4));
        let inputs = PolicyInputs { key_diff_lht: Some(&key_diff_lht), ..Default::default() };
        let keep = |policy, ratio, inputs: &PolicyInputs| {
            keep_mask_by(&scores_lht, policy, RetentionRatio::new(ratio).unwrap(), inputs)
        };
        for ratio in [0.5, 0.2] {
            let floor = keep(Policy::PairFloor, ratio, &PolicyInputs::default()).unwrap();
            assert_eq!(keep(Policy::PairKeydiff, ratio, &inputs).unwrap(), floor, "{ratio}");
        }
        let z = |x: &Tensor| {
            let x = x.to_kind(Kind::Double);
            (&x - x.mean(Kind::Double)) / x.std(false)
        };
        let ratio = RetentionRatio::new(0.05).unwrap();
        let sum = z(&scores_lht) + z(&key_diff_lht) * 0.6;
        let expected = keep_mask(&sum, Policy::PairFloor, ratio);
        assert_eq!(keep(Policy::PairKeydiff, 0.05, &inputs).unwrap(), expected);
        assert_ne!(keep(Policy::PairFloor, 0.05, &inputs).unwrap(), expected);
        assert_eq!(keep_mask_budget_by(&scores_lht, Policy::PairKeydiff, 5, &inputs).unwrap(), expected);
        assert_eq!(keep_masks(&scores_lht, Policy::PairKeydiff, &[ratio], &inputs).unwrap(), [expected]);
        // The newest come before what the sum says, within the same count.
        let newest = keep(Policy::PairKeydiff, 0.05, &PolicyInputs { newest: 2, ..inputs }).unwrap();
        assert_eq!(newest.sum(Kind::Int64).int64_value(&[]), 30);
        assert_eq!(newest.narrow(-1, positions - 2, 2).sum(Kind::Int64).int64_value(&[]), 2 * heads);

        let none = keep(Policy::PairKeydiff, 0.05, &PolicyInputs::default()).unwrap_err();
        assert!(format!("{none:#}").contains("needs the target's keys"), "{none:#}");
        let other = PolicyInputs { key_diff_lht: Some(&key_diff_lht.narrow(-1, 0, 9)), ..inputs };
        assert!(keep(Policy::PairKeydiff, 0.05, &other).is_err());
    }

    #[test]
    fn the_newest_positions_stay_under_every_policy_as_far_as_the_budget_reaches() {
        let (heads, positions) = (6_i64, 40_i64);
        let mut numbers = scores(5, 240, 7);
        numbers[3] = f32::NAN;
        numbers[50] = f32::NEG_INFINITY;
        let scores_lht = Tensor::from_slice(&numbers).view([2, 3, positions]).to_device(device());
        for policy in Policy::OF_SCORES {
            for (ratio, newest) in [(0.5, 8), (0.2, 8), (0.1, 8), (0.05, 40), (1.0, 99)] {
                let ratio = RetentionRatio::new(ratio).unwrap();
                let plain = keep_mask(&scores_lht, policy, ratio);
                let keep = keep_mask(&newest_first(&scores_lht, newest), policy, ratio);
                let count = |mask: &Tensor| mask.sum(Kind::Int64).int64_value(&[]);
                assert_eq!(count(&keep), count(&plain), "they count as kept");
                let reached = (newest as i64).min(count(&keep) / heads);
                let tail = keep.narrow(-1, positions - reached, reached);
                assert_eq!(count(&tail), reached * heads, "{policy:?} {ratio} {newest}");
            }
            // Among the others the scores decide.
            let half = RetentionRatio::new(0.5).unwrap();
            let keep = keep_mask(&newest_first(&scores_lht, 1), Policy::PairUniform, half).narrow(
                -1,
                0,
                positions - 1,
            );
            let others = keep_mask_budget(&scores_lht.narrow(-1, 0, positions - 1), Policy::PairUniform, 19);
            assert_eq!(keep, others);
        }
        assert_eq!(newest_first(&scores_lht, 0).data_ptr(), scores_lht.data_ptr());
    }

    /// Scores with many ties.
    fn scores(seed: u64, n: usize, levels: i32) -> Vec<f32> {
        let mut rng = pkv_core::Seed(seed).stream("prune-test", 0);
        (0..n).map(|_| rng.random_range(0..levels) as f32 / levels as f32).collect()
    }

    fn naive_top(scores: &[f64], k: usize) -> Vec<bool> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut keep = vec![false; scores.len()];
        order.iter().take(k).for_each(|&i| keep[i] = true);
        keep
    }

    fn naive_rank_means(scores: &[f32], t: usize) -> Vec<f64> {
        let heads: Vec<&[f32]> = scores.chunks(t).collect();
        let rank = |head: &[f32], x: f32| {
            let below = head.iter().filter(|&&y| y < x).count();
            let equal = head.iter().filter(|&&y| y == x).count();
            below as f64 + (equal as f64 + 1.0) / 2.0
        };
        (0..t).map(|i| heads.iter().map(|h| rank(h, h[i])).sum::<f64>() / heads.len() as f64).collect()
    }

    fn naive(scores: &[f32], t: usize, policy: Policy, count: impl Fn(usize) -> usize) -> Vec<bool> {
        let wide: Vec<f64> = scores.iter().map(|&x| x.into()).collect();
        match policy {
            Policy::Pair => naive_top(&wide, count(wide.len())),
            Policy::PairFloor => {
                let place = |of: &[f64], i: usize| {
                    of.iter().enumerate().filter(|&(j, x)| *x > of[i] || (*x == of[i] && j < i)).count() + 1
                };
                let heads = wide.len() / t;
                let key = |i: usize| {
                    let head = &wide[i / t * t..][..t];
                    -(place(&wide, i).min(5 * heads * place(head, i % t)) as f64)
                };
                naive_top(&(0..wide.len()).map(key).collect::<Vec<_>>(), count(wide.len()))
            }
            Policy::PairUniform => wide.chunks(t).flat_map(|head| naive_top(head, count(t))).collect(),
            Policy::Token => naive_top(&naive_rank_means(scores, t), count(t)).repeat(scores.len() / t),
            Policy::PairBudget | Policy::PairKeydiff => unreachable!("not among those of scores"),
        }
    }

    fn bools(t: &Tensor) -> Vec<bool> {
        Vec::try_from(t.reshape([-1])).unwrap()
    }

    #[test]
    fn masks_equal_a_stable_sort_with_many_ties() {
        let device = device();
        for (seed, (l, h, t)) in [(1, 1, 1), (1, 2, 1), (2, 2, 3), (3, 2, 41), (1, 1, 200)].iter().enumerate()
        {
            for levels in [1, 3, 1000] {
                let data = scores(seed as u64, l * h * t, levels);
                let scores_lht =
                    Tensor::from_slice(&data).reshape([*l as i64, *h as i64, *t as i64]).to(device);
                for policy in Policy::OF_SCORES {
                    for ratio in [1.0, 0.5, 0.3, 0.05, 0.01] {
                        let ratio = RetentionRatio::new(ratio).unwrap();
                        let mask = keep_mask(&scores_lht, policy, ratio);
                        assert_eq!(mask.size(), scores_lht.size());
                        let want = naive(&data, *t, policy, |n| ratio.count(n));
                        assert_eq!(bools(&mask), want, "{policy:?} {ratio} {l}x{h}x{t} {levels}");
                    }
                    let ratios = [1.0, 0.3, 0.05].map(|r| RetentionRatio::new(r).unwrap());
                    let masks = keep_masks(&scores_lht, policy, &ratios, &PolicyInputs::default()).unwrap();
                    for (mask, ratio) in masks.iter().zip(ratios) {
                        assert!(mask.equal(&keep_mask(&scores_lht, policy, ratio)), "{policy:?} {ratio}");
                    }
                    for tokens in [0, 1, 2, 1000] {
                        let mask = keep_mask_budget(&scores_lht, policy, tokens);
                        let want = naive(&data, *t, policy, |n| tokens.min(*t) * (n / t));
                        assert_eq!(bools(&mask), want, "{policy:?} budget {tokens} {l}x{h}x{t}");
                    }
                }
            }
        }
    }

    #[test]
    fn counts_are_exact_and_flattened_heads_are_the_same_heads() {
        let data = scores(9, 36 * 1399, 50);
        let scores_ot = Tensor::from_slice(&data).reshape([36, 1399]).to(device());
        for policy in Policy::OF_SCORES {
            let ratio = RetentionRatio::new(0.03).unwrap();
            let mask = keep_mask(&scores_ot, policy, ratio);
            let per_head: Vec<i64> = Vec::try_from(mask.sum_dim_intlist(-1, false, Kind::Int64)).unwrap();
            match policy {
                Policy::Pair | Policy::PairFloor => {
                    assert_eq!(per_head.iter().sum::<i64>(), (36.0f64 * 1399.0 * 0.03).round() as i64)
                }
                _ => assert!(per_head.iter().all(|&n| n == 42)),
            }
            let mask_lht = keep_mask(&scores_ot.reshape([9, 4, 1399]), policy, ratio);
            assert_eq!(bools(&mask), bools(&mask_lht));
        }
    }

    #[test]
    fn a_head_that_scores_least_keeps_its_floor() {
        // Head 1 scores below all of head 0, which ascends; half of 200 pairs stay.
        let scores_ot = Tensor::arange(200, (Kind::Float, device())).reshape([2, 100]).flip([0]);
        let ratio = RetentionRatio::new(0.5).unwrap();
        let per_head = |policy| -> Vec<i64> {
            let mask = keep_mask(&scores_ot, policy, ratio);
            Vec::try_from(mask.sum_dim_intlist(-1, false, Kind::Int64)).unwrap()
        };
        // 92 pairs are among the 92 best of all, 9 more among the 9 best of a head: the last of them has no
        // room.
        assert_eq!((per_head(Policy::Pair), per_head(Policy::PairFloor)), (vec![100, 0], vec![91, 9]));
        let mask = keep_mask(&scores_ot, Policy::PairFloor, ratio);
        let kept: Vec<bool> = bools(&mask);
        assert!(kept[..9].iter().all(|k| !k) && kept[9..100].iter().all(|k| *k), "{kept:?}");
        assert!(kept[100..191].iter().all(|k| !k) && kept[191..].iter().all(|k| *k), "{kept:?}");
    }

    #[test]
    fn odd_numbers_have_a_place() {
        let device = device();
        let data = [f32::NAN, 1.0, f32::NEG_INFINITY, f32::INFINITY, -0.0, 0.0];
        let row = Tensor::from_slice(&data).reshape([1, 6]).to(device);
        assert_eq!(bools(&top_mask(&row, 2)), [false, true, false, true, false, false]);
        assert_eq!(bools(&top_mask(&row, 3)), [false, true, false, true, true, false]);
        assert_eq!(bools(&top_mask(&row, 5)), [true, true, false, true, true, true]);
        assert_eq!(bools(&top_mask(&row, 9)), [true; 6]);
        let empty = Tensor::zeros([2, 3, 0], (Kind::Float, device));
        for policy in Policy::OF_SCORES {
            assert_eq!(keep_mask(&empty, policy, RetentionRatio::new(0.5).unwrap()).size(), [2, 3, 0]);
        }
    }
}
