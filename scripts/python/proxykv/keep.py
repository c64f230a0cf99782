"""Scores to keep masks: the policies (crates/prune)."""

from __future__ import annotations

import math

import torch

from .budgets import NO_BUDGETS, HeadBudgets, kept_count

POLICIES = ("pair", "pair-floor", "pair-keydiff", "pair-uniform", "pair-budget", "token")

# Under `pair-floor`, what a place within the KV head counts beside a place among all pairs (crates/core/src/policy.rs).
HEAD_PLACES = 5
# Smallest standard deviation to divide by: equal scores become zeros.
SMALLEST = 1e-30
NO_KEYS = "policy `pair-keydiff` needs the target's keys: give `key_diff_lht` or the target's cache, or use policy `pair-floor`"


def keep_mask(
    scores_lht: torch.Tensor,
    policy: str,
    retention: float,
    budgets: HeadBudgets | None = None,
    key_diff_lht: torch.Tensor | None = None,
) -> torch.Tensor:
    """The KV pairs that stay, bool of the scores' shape `[.., positions]`; of equal scores the lower index.

    `pair`: all pairs compete; `pair-floor`: the same, but the best positions of every head stay, at least a sixth of an
    even share; `pair-keydiff`: the same, of scores to which `key_diff_lht` is added (`key_diff_of` a cache), the more the less
    is kept; `pair-uniform`: the positions of each head; `pair-budget`: the same, with as many of each
    head as `budgets` say, and in all as many as `pair`; `token`: the positions, by the mean over heads of their rank.
    The count is exact: `kept_count` of what competes.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy `{policy}` is not known; expected one of {', '.join(POLICIES)}")
    shape, t = scores_lht.shape, scores_lht.shape[-1]
    if policy == "pair-keydiff":
        if key_diff_lht is None:
            raise ValueError(NO_KEYS)
        if key_diff_lht.shape != shape:
            raise ValueError(f"KeyDiff's scores are of shape {tuple(key_diff_lht.shape)}, the mapper's of {tuple(shape)}")
        scores_lht, policy = with_key_diff(scores_lht, key_diff_lht, key_diff_weight(retention)), "pair-floor"
    if policy in ("pair", "pair-floor"):
        scores_1n = scores_lht.reshape(1, -1) if policy == "pair" else by_place(scores_lht.reshape(-1, t))
        return top_mask(scores_1n, kept_count(scores_lht.numel(), retention)).reshape(shape)
    if policy == "pair-budget":
        if budgets is None:
            raise ValueError(NO_BUDGETS)
        scores_ot = scores_lht.reshape(-1, t)
        if scores_ot.shape[0] != len(budgets.shares[0]):
            raise ValueError(f"head budgets are for {len(budgets.shares[0])} KV heads, the scores have {scores_ot.shape[0]}")
        counts = budgets.counts(kept_count(scores_lht.numel(), retention), t)
        rows = [top_mask(scores_ot[o : o + 1], k) for o, k in enumerate(counts)]
        return torch.cat(rows).reshape(shape)
    k = kept_count(t, retention)
    if policy == "pair-uniform":
        return top_mask(scores_lht.reshape(-1, t), k).reshape(shape)
    return top_mask(token_scores(scores_lht).unsqueeze(0), k).squeeze(0).expand(shape).contiguous()


def key_diff_weight(retention: float) -> float:
    """What KeyDiff's scores weigh beside the mapper's (crates/core/src/policy.rs)."""
    return min(max(0.2 * (0.2 / retention - 1.0), 0.0), 1.0)


def with_key_diff(scores_lht: torch.Tensor, key_diff_lht: torch.Tensor, weight: float) -> torch.Tensor:
    """The sum of both, each standardized over the context, f64; the scores themselves if `weight` is 0."""
    if weight == 0.0 or scores_lht.numel() == 0:
        return scores_lht
    return _standardized(scores_lht) + _standardized(key_diff_lht.to(scores_lht.device)) * weight


def _standardized(scores):
    scores = scores.double()
    finite = scores[scores.isfinite()]
    return scores if finite.numel() == 0 else (scores - finite.mean()) / finite.std(correction=0).clamp_min(SMALLEST)


def by_place(scores_ot: torch.Tensor) -> torch.Tensor:
    """The better of a pair's place among all pairs and `HEAD_PLACES` times its place within its head, as shares; f64
    `[1, pairs]`, whole numbers below 0, higher means keep."""
    of_all = place(scores_ot.reshape(1, -1)) + 1
    of_head = (place(scores_ot) + 1).reshape(1, -1) * (HEAD_PLACES * scores_ot.shape[0])
    return -torch.minimum(of_all, of_head).double()


def place(scores_bn: torch.Tensor) -> torch.Tensor:
    """Every score's place in its row from the top, from 0; of equal scores the lower index comes first."""
    order = (_ordered(scores_bn) + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(-1)


def token_scores(scores_lht: torch.Tensor) -> torch.Tensor:
    """Mean rank of each position over all heads, f64 `[positions]`; equal scores share their average rank."""
    scores_ot = _ordered(scores_lht).reshape(-1, scores_lht.shape[-1]).contiguous()
    sorted_ot = scores_ot.sort(-1).values
    below = torch.searchsorted(sorted_ot, scores_ot)
    not_above = torch.searchsorted(sorted_ot, scores_ot, right=True)
    return (below + not_above + 1).sum(0).double() / (2 * scores_ot.shape[0])


def top_mask(scores_bn: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` largest of every row, bool; of equal scores the lower index, whatever the device."""
    n = scores_bn.shape[1]
    if k <= 0 or k >= n:
        return torch.full_like(scores_bn, k > 0, dtype=torch.bool)
    scores_bn = _ordered(scores_bn)
    if scores_bn.device.type == "cpu":
        threshold = scores_bn.kthvalue(n - k + 1, -1, keepdim=True).values
    else:
        threshold = scores_bn.sort(-1, descending=True).values[:, k - 1 : k]
    above, equal = scores_bn > threshold, scores_bn == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _ordered(scores):
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.nan_to_num(-math.inf, math.inf, -math.inf)
