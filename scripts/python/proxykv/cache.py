"""A transformers cache that pruning has really shrunk: each KV head of each layer holds its own pairs.

Which pairs are kept is `keep`'s business.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class RaggedHeads:
    """Keys or values of one sequence in one layer, `[1, KV heads, positions, d]` to transformers; each head holds what it kept.

    Positions count evicted tokens, too, so that generation goes on where the context ended. What is read after it is
    held by every head.
    """

    def __init__(self, parts: list[torch.Tensor], context: int, positions: int):
        # `parts`: neighbouring heads that hold equally many, `[heads, held, d]` each.
        self.parts, self.context = parts, context
        self.shape = torch.Size((1, sum(part.shape[0] for part in parts), positions, parts[0].shape[2]))

    @classmethod
    def of(cls, full_hkd: torch.Tensor, keep_hk: torch.Tensor) -> RaggedHeads:
        """Those of `full_hkd` that `keep_hk` (bool) has, in memory of their own."""
        parts, first = [], 0
        for held, run in groupby(keep_hk.sum(-1).tolist()):
            heads = slice(first, first + len(list(run)))
            parts.append(full_hkd[heads][keep_hk[heads]].view(heads.stop - first, held, full_hkd.shape[2]))
            first = heads.stop
        return cls(parts, keep_hk.shape[1], keep_hk.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def numel(self) -> int:
        return sum(part.numel() for part in self.parts)

    def appended(self, new_1hsd: torch.Tensor) -> RaggedHeads:
        if new_1hsd.shape[0] != 1:
            raise ValueError(f"a pruned cache holds one sequence, {new_1hsd.shape[0]} came: ask without beams, one question at a time")
        new = new_1hsd[0].split([part.shape[0] for part in self.parts])
        parts = [torch.cat(pair, 1) for pair in zip(self.parts, new)]
        return RaggedHeads(parts, self.context, self.shape[2] + new_1hsd.shape[2])

    def __getitem__(self, at) -> RaggedHeads:
        """`[:, :, :n]` and `[..., :n, :]`, by which caches forget an answer."""
        whole = slice(None)
        at = at if isinstance(at, tuple) else (at,)
        if at[:1] == (Ellipsis,):
            at = (whole,) * (5 - len(at)) + at[1:]
        if len(at) < 3 or any(part != whole for part in (*at[:2], *at[3:])) or at[2] != slice(at[2].stop):
            raise ValueError("a pruned cache can only be cut to its first positions")
        gone = self.shape[2] - len(range(*at[2].indices(self.shape[2])))
        if gone > self.shape[2] - self.context:
            raise ValueError(f"a pruned cache cannot be cut to less than its context of {self.context} positions")
        return RaggedHeads([part[:, : part.shape[1] - gone] for part in self.parts], self.context, self.shape[2] - gone)

    def attend(self, query_1qsd: torch.Tensor, values: RaggedHeads, scale: float | None) -> torch.Tensor:
        """Attention of new tokens, which are the last positions here: `[1, s, q, d]`."""
        _, q, s, d = query_1qsd.shape
        group, first, out = q // self.shape[1], 0, []
        for keys, vals in zip(self.parts, values.parts):
            heads, held, _ = keys.shape
            # The query heads of a KV head are rows of one product, so that no key is repeated.
            rows = query_1qsd[0, first : first + heads * group].reshape(heads, group * s, d)
            seen = None if s == 1 else torch.ones(s, held, dtype=torch.bool, device=rows.device).tril(held - s).repeat(group, 1)
            out.append(F.scaled_dot_product_attention(rows, keys, vals, seen, scale=scale).view(heads * group, s, d))
            first += heads * group
        return torch.cat(out).transpose(0, 1).unsqueeze(0)


class RaggedLayer(DynamicLayer):
    def __init__(self, keys: RaggedHeads, values: RaggedHeads):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states, value_states, cache_kwargs=None):
        self.keys, self.values = self.keys.appended(key_states), self.values.appended(value_states)
        return self.keys, self.values


def _serve_ragged(implementation: str) -> None:
    """Let an attention implementation of transformers read pruned caches. It reads all others as before."""
    base = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if hasattr(base, "reads_ragged"):
        return

    def attention(module, query, key, value, *args, **kwargs):
        if isinstance(key, RaggedHeads):
            changed = [name for name in ("softcap", "sliding_window", "s_aux") if kwargs.get(name) is not None]
            if changed:
                raise ValueError(f"attention with {', '.join(changed)} cannot read a pruned cache")
            return key.attend(query, value, kwargs.get("scaling")), None
        # `eager` has no entry: each model's file has its own.
        own = base or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    attention.reads_ragged = True
    ALL_ATTENTION_FUNCTIONS[implementation] = attention


class CacheBytes(NamedTuple):
    """Bytes of a cache's keys and values."""

    before: int
    after: int


def cache_bytes(cache) -> int:
    """Bytes of the keys and values that a transformers cache holds as they are."""
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def evict(model: nn.Module, cache, keep_lhk: torch.Tensor) -> CacheBytes | None:
    """Evict what `keep_lhk` (bool `[layers, KV heads, cached positions]`) leaves out, of a cache of batch 1.

    The cache shrinks to the pairs that are kept, however unequally the heads keep them. It goes on counting evicted
    tokens: `model.generate(ids of the context and a question, past_key_values=cache)` reads the question alone, and
    `cache.crop(keep_lhk.shape[-1])` forgets question and answer. A quantized cache keeps its size, and None is
    returned: its evicted pairs are hidden by the attention patch that importing kvpress installs.
    """
    if hasattr(cache.layers[0], "_quantized_keys"):
        _hide(model, keep_lhk)
        return None
    shape = tuple(keep_lhk.shape)
    for layer in cache.layers:
        found = (len(cache.layers), layer.keys.shape[1], layer.get_seq_length())
        if found != shape or layer.keys.shape[0] != 1 or isinstance(layer.keys, RaggedHeads):
            raise ValueError(f"a mask of {shape} layers, KV heads and positions needs a whole cache of one sequence that has them, found {found}")
    if cache.offloading:
        raise ValueError("a cache that is offloaded to the CPU cannot be pruned: use `DynamicCache()`")
    before = cache_bytes(cache)
    _serve_ragged(model.config._attn_implementation)
    for index, held in enumerate(cache.layers):
        keep_hk = keep_lhk[index].to(held.keys.device)
        # Each full layer goes as soon as it was read.
        cache.layers[index] = RaggedLayer(*(RaggedHeads.of(x[0], keep_hk) for x in (held.keys, held.values)))
    return CacheBytes(before, cache_bytes(cache))


def _hide(model: nn.Module, keep_lhk: torch.Tensor) -> None:
    if "kvpress" not in sys.modules or model.config._attn_implementation == "eager":
        raise ValueError(
            "evicted pairs of a quantized cache are hidden by kvpress's attention patch: import kvpress, and use an "
            "attention implementation other than `eager`, such as `sdpa`"
        )
    for index, layer in enumerate(model.model.layers):
        device = next(layer.self_attn.parameters()).device
        head, position = (~keep_lhk[index].to(device)).nonzero(as_tuple=True)
        layer.self_attn.masked_key_indices = (torch.zeros_like(head), head, position)
