"""What a layer's queries and keys say of its KV pairs (crates/extract, crates/score).

When they are read, and of which model, is `reading`'s business.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from .tokens import Requests

LOG_LIMIT = 16.0
LOG_ODDS_LIMIT = 14.0
MEAN_FLOOR = 1e-7
SHORTEST_KEY = 1e-12


def _block_elements(device: torch.device) -> int:
    """Softmax weights held at once: 2 MiB stay in a CPU's cache, 128 MiB fill a GPU."""
    return 1 << 25 if device.type == "cuda" else 1 << 19


class _Layer(NamedTuple):
    """What one attention module shows of new tokens."""

    index: int
    q_qsd: torch.Tensor  # rotary applied
    k_hkd: torch.Tensor  # the cache's, new tokens last
    v_hkd: torch.Tensor
    start: int  # cached positions before the new tokens
    normed_sm: torch.Tensor  # what the module read
    module: nn.Module


class _QueryStatistics:
    """Attention that later queries pay to each KV pair; see crates/extract/src/statistics.rs."""

    REACHES = {"all": ("max_all", "mean_all"), "last": ("max_last", "mean_last"), "window": ("max_window", "mean_window")}
    # Sums of `last` are gathered in its slot where the channel of the KV head's own mean is not wanted.
    LAYER_MEAN = "mean_last_layer"

    def __init__(self, extract: dict):
        channels = extract["channels"]
        self.near, self.window = extract["min_distance"], extract["window_tokens"]
        self.last, self.block_tokens = extract["last_queries"], max(1, extract["block_tokens"])
        self.stride = extract["whole_range_stride"]
        at = lambda name: channels.index(name) if name in channels else None  # noqa: E731
        slots = {reach: tuple(map(at, names)) for reach, names in self.REACHES.items()}
        self.layer_mean = at(self.LAYER_MEAN)
        if self.layer_mean is not None and slots["last"][1] is None:
            slots["last"] = (slots["last"][0], self.layer_mean)
        # The window comes last: it blanks what is out of its reach.
        self.slots = {reach: pair for reach, pair in slots.items() if pair != (None, None)}
        # The last queries of each layer so far, `[q, up to last_queries, d]`.
        self.tails: dict[int, torch.Tensor] = {}

    def add(self, layer: _Layer, prefix: int, gathered_hct):
        """Fold the attention of new queries into maxima and sums; no matrix of all queries times keys is held.

        `gathered_hct`: the layer's, of all context positions so far, 0 where a position is new.
        """
        if not self.slots:
            return
        q_qsd, start, self.scale = layer.q_qsd, layer.start, layer.module.scaling
        end = start + q_qsd.shape[1]
        self.prefix, self.context = prefix, end - prefix
        k_hdk = layer.k_hkd.float().transpose(1, 2)
        if "last" in self.slots:
            # The last queries so far: those of an earlier forward count again where this one is shorter than them.
            slots = {"last": self.slots["last"]}
            for slot in self.slots["last"]:
                if slot is not None:
                    gathered_hct[:, slot] = 0.0
            tail_qsd = self.tails.get(layer.index, q_qsd[:, :0])
            first = start - tail_qsd.shape[1]
            self._rows(tail_qsd, k_hdk, first, max(first, prefix, end - self.last), start, slots, gathered_hct)
            self.tails[layer.index] = torch.cat([tail_qsd, q_qsd[:, -self.last :]], 1)[:, -self.last :]
        self._rows(q_qsd, k_hdk, start, max(start, prefix), end, self.slots, gathered_hct)

    def _rows(self, q_qsd, k_hdk, start: int, row: int, end: int, slots, gathered_hct):
        """Queries of the positions from `row` to `end`, in blocks; `q_qsd` begins at `start`."""
        while row < end:
            budget = _block_elements(q_qsd.device) // (q_qsd.shape[0] * end)
            stop = min(end, row + max(1, min(self.block_tokens, budget)))
            q_qrd = q_qsd[:, row - start : stop - start].float() * self.scale
            self._block(q_qrd, k_hdk, row, stop, slots, gathered_hct)
            row = stop

    def _block(self, q_qrd, k_hdk, row: int, stop: int, slots, gathered_hct):
        h, d, _ = k_hdk.shape
        n, device = stop - row, k_hdk.device
        q_hrd = q_qrd.reshape(h, -1, d)
        logits_hgrk = q_hrd.matmul(k_hdk[:, :, :stop]).view(h, -1, n, stop)
        later_rr = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        logits_hgrk[..., stop - n :].masked_fill_(later_rr, -math.inf)
        weights_hgrt = logits_hgrk.softmax(-1)[..., self.prefix :]
        del logits_hgrk
        # From here on, rows and columns are context positions.
        first, end = row - self.prefix, stop - self.prefix
        columns = end - self.near
        if columns <= 0:
            return
        self._zero(weights_hgrt, first, max(0, first + 1 - self.near), columns, lambda x: x < self.near)
        for reach, pair in slots.items():
            if reach == "all":
                skipped = -first % self.stride
                if skipped < n:
                    _gather(pair, weights_hgrt[:, :, skipped :: self.stride], 0, columns, gathered_hct)
            elif reach == "last":
                start = max(first, self.context - self.last)
                if start < end:
                    _gather(pair, weights_hgrt[:, :, start - first :], 0, columns, gathered_hct)
            else:
                start = max(0, first - self.window)
                if start < columns:
                    too_far = min(columns, max(0, end - self.window))
                    self._zero(weights_hgrt, first, start, too_far, lambda x: x > self.window)
                    _gather(pair, weights_hgrt, start, columns, gathered_hct)

    @staticmethod
    def _zero(weights_hgrt, first: int, start: int, end: int, blank):
        if start >= end:
            return
        device = weights_hgrt.device
        row_r = torch.arange(first, first + weights_hgrt.shape[2], device=device)
        distance_rt = row_r.unsqueeze(1) - torch.arange(start, end, device=device)
        weights_hgrt[..., start:end].masked_fill_(blank(distance_rt), 0.0)

    def finish(self, gathered_pct, heads: int, group: int):
        """Maxima to logs, sums to logs of means, in place; `heads` KV heads in a layer, `group` query heads in each."""
        if not self.slots:
            return
        t = torch.arange(self.context)
        near = t + self.near
        for reach, (maximum, mean) in self.slots.items():
            start, end = near, torch.full_like(t, self.context)
            if reach == "all":
                start, end = ((x + self.stride - 1) // self.stride for x in (start, end))
            elif reach == "window":
                end = end.minimum(t + self.window + 1)
            elif reach == "last":
                start = near.clamp_min(max(0, self.context - self.last))
            if maximum is not None:
                gathered_pct[:, maximum].log_().clamp_(-LOG_LIMIT, LOG_LIMIT)
            means = [] if mean is None else [mean]
            if reach == "last" and self.layer_mean is not None:
                sum_lht = gathered_pct[:, mean].reshape(-1, heads, self.context)
                gathered_pct[:, self.layer_mean] = sum_lht.mean(1, keepdim=True).expand_as(sum_lht).flatten(0, 1)
                means = list({mean, self.layer_mean})
            counts = ((end - start).clamp_min(0) * group).clamp_min(1).float().to(gathered_pct.device)
            for slot in means:
                gathered_pct[:, slot].div_(counts).add_(MEAN_FLOOR).log_().clamp_(-LOG_LIMIT, LOG_LIMIT)


def _gather(slots, weights_hgrt, start: int, end: int, gathered_hct):
    weights_hgrt = weights_hgrt[..., start:end]
    maximum, mean = slots
    if maximum is not None:
        row_ht = gathered_hct[:, maximum, start:end]
        row_ht.copy_(row_ht.maximum(weights_hgrt.amax((1, 2))))
    if mean is not None:
        gathered_hct[:, mean, start:end] += weights_hgrt.sum((1, 2))


def log_odds(p: torch.Tensor) -> torch.Tensor:
    """log p - log1p(-min(p, 1 - 1e-6)), clamped to +-14."""
    return (p.log() - (-p.clamp_max(1.0 - 1e-6)).log1p()).clamp(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)


def _chunk_scores(layer: _Layer, sink: int, start: int, end: int, plus: bool):
    """KVzip scores of one scoring chunk in one layer, and their means: f32 `[h, t]` each."""
    q_qsd, k_hkd = layer.q_qsd, layer.k_hkd
    h, total, d = k_hkd.shape
    rows, t = q_qsd.shape[1], end - start
    q_hgsd = (q_qsd.float() * layer.module.scaling).reshape(h, -1, rows, d)
    group = q_hgsd.shape[1]
    k_hdk = torch.cat([k_hkd[:, :sink], k_hkd[:, start:end], k_hkd[:, total - rows :]], 1).float().transpose(1, 2)
    max_hgt = torch.zeros(h, group, t, device=q_qsd.device)
    sum_hgt = torch.zeros_like(max_hgt)
    block = max(1, min(rows, _block_elements(q_qsd.device) // (h * group * (sink + t + rows))))
    rows_s = 1.0 / layer.normed_sm.float().norm(dim=-1).clamp_min(1e-30) if plus else None
    for first in range(0, rows, block):
        n = min(block, rows - first)
        visible = sink + t + first + n
        logits = q_hgsd[:, :, first : first + n].reshape(h, group * n, d).matmul(k_hdk[:, :, :visible])
        logits = logits.view(h, group, n, visible)
        later_rr = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., visible - n :].masked_fill_(later_rr, -math.inf)
        weights_hgrt = logits.softmax(-1)[..., sink : sink + t]
        if plus:
            weights_hgrt = weights_hgrt * rows_s[first : first + n].unsqueeze(1)
        max_hgt = max_hgt.maximum(weights_hgrt.amax(2))
        sum_hgt += weights_hgrt.sum(2)
    if plus:
        # KVzip+: the norm of each value after the output projection, a query head at a time.
        v_htd, w = layer.v_hkd[:, start:end].float(), layer.module.o_proj.weight
        norms = [(v_htd[q // group] @ w[:, q * d : (q + 1) * d].float().T).norm(dim=-1) for q in range(h * group)]
        columns_hgt = torch.stack(norms).view(h, group, t)
        max_hgt, sum_hgt = max_hgt * columns_hgt, sum_hgt * columns_hgt
    return max_hgt.amax(1), sum_hgt.mean(1) / rows


def key_diff(k_hkd: torch.Tensor, prefix: int) -> torch.Tensor:
    """Minus the cosine between each context key and the mean of its head's unit keys (KeyDiff): f32 `[h, t]`."""
    k_hkd = k_hkd.float()
    lengths = lambda x: x.norm(dim=-1, keepdim=True).clamp_min(SHORTEST_KEY)  # noqa: E731
    unit_hkd = k_hkd / lengths(k_hkd)
    mean_h1d = unit_hkd.mean(1, keepdim=True)
    mean_h1d = mean_h1d / lengths(mean_h1d)
    return -unit_hkd.matmul(mean_h1d.transpose(1, 2)).squeeze(-1)[:, prefix:]


def key_diff_of(cache, prefix: int) -> torch.Tensor:
    """`key_diff` of all layers of a transformers cache that holds the prefix and the context, `[layers, KV heads, t]`."""
    return torch.stack([key_diff(layer.keys[0], prefix) for layer in cache.layers])


def unrun_scores(q_qsd: torch.Tensor, k_htd: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights of every query over all keys, products times `scale`: maximum and mean per key, f32 `[h, t]` each."""
    (heads, keys, d), device = k_htd.shape, k_htd.device
    q_hrd = q_qsd.float().reshape(heads, -1, d) * scale
    max_ht, sum_ht = (torch.zeros(heads, keys, device=device) for _ in range(2))
    for part_hrd in q_hrd.split(max(1, _block_elements(device) // (heads * keys)), 1):
        weights_hrt = part_hrd.matmul(k_htd.transpose(1, 2)).softmax(-1)
        max_ht = max_ht.maximum(weights_hrt.amax(1))
        sum_ht += weights_hrt.sum(1)
    return max_ht, sum_ht / q_hrd.shape[1]


class _UnrunReplay:
    """The replay that is never run: a scoring chunk's own queries against its keys, as if moved to where its repeat would be.

    See crates/extract/src/channels/replay_unrun.rs. What is held is bounded: of each layer the queries of the chunk that
    earlier forwards began.
    """

    def __init__(self, requests: Requests, inv_freq: torch.Tensor, prefix: int, context: int):
        self.prefix, self.context = prefix, context
        self.waiting: dict[int, torch.Tensor] = {}
        # Each chunk with the rotation that moves its keys as far back as its repeat is further on.
        self.chunks = []
        for start, end in requests.chunks(context):
            angles_d = inv_freq.double() * -(context - start + requests.before(start))
            self.chunks.append((start, end, angles_d.cos().float(), angles_d.sin().float()))

    def add(self, layer: _Layer):
        """Take a layer's new queries; yields begin and end of each chunk that is complete now, and its `unrun_scores`."""
        first, q_qsd = max(0, layer.start - self.prefix), layer.q_qsd[:, max(0, self.prefix - layer.start) :]
        earlier = self.waiting.pop(layer.index, None)
        if earlier is not None:
            first, q_qsd = first - earlier.shape[1], torch.cat([earlier, q_qsd], 1)
        read = first + q_qsd.shape[1]
        for start, end, cos_d, sin_d in self.chunks:
            if first <= start < read < end:
                self.waiting[layer.index] = q_qsd[:, start - first :].clone()
            elif first <= start and end <= read:
                a, b = layer.k_hkd[:, self.prefix + start : self.prefix + end].float().chunk(2, -1)
                cos_d, sin_d = cos_d.to(a.device), sin_d.to(a.device)
                moved_htd = torch.cat([a * cos_d - b * sin_d, b * cos_d + a * sin_d], -1)
                yield start, end, *unrun_scores(q_qsd[:, start - first : end - first], moved_htd, layer.module.scaling)
