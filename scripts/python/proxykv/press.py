"""A press for NVIDIA's kvpress: the target prefills in its pipeline, and is pruned when that is done."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field

import torch
from kvpress import BasePress

from .budgets import NO_BUDGETS
from .cache import CacheBytes, evict
from .keep import POLICIES
from .pair import ProxyKV
from .reading import Reading
from .tokens import Frame


@dataclass
class ProxyKVPress(BasePress):
    """Evicts what an export's mapper scores lowest.

    The target prefills as usual. Where it is a source of features, they are gathered meanwhile, and its rotary
    frequencies are rounded once from f64 from then on. When the context manager is left, the proxy reads the same
    tokens, if it is a source; the mapper scores the target's KV pairs, and the lowest are evicted: the cache holds the
    others alone, under every policy. Tokens of the chat template before the user's text are never evicted and do not
    count. Batches hold one sequence.

    Parameters
    ----------
    export : str
        Folder or hub name of an export of proxykv-train.
    compression_ratio : float
        Share of the context's KV pairs to *remove*, as everywhere in kvpress.
    policy : str
        `pair-floor` (all pairs compete, but every head keeps its best positions), `pair-keydiff` (the same; below a fifth
        kept, KeyDiff's scores count too), `pair` (all pairs compete),
        `pair-uniform` (the positions of each head), `pair-budget` (the same, with as many of each head as the export's
        budgets say), `token` (whole positions).
    proxy : str, optional
        Folder or hub name of the proxy, if not the one that the export names.
    revision : str, optional
        Revision of the export on the hub.
    device : str, optional
        Where proxy and mapper run; the target's device by default.
    retention : float, optional
        Share of the context's KV pairs to *keep*, in place of `compression_ratio`.
    """

    export: str
    compression_ratio: float = 0.0
    policy: str = "pair-keydiff"
    proxy: str | None = None
    revision: str | None = None
    device: str | None = None
    retention: InitVar[float | None] = None
    # What the last context kept: bool `[layers, KV heads, prefix + positions]`.
    kept: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)
    # Bytes of its keys and values before and after.
    bytes: CacheBytes | None = field(default=None, init=False, repr=False, compare=False)
    _proxykv: ProxyKV | None = field(default=None, init=False, repr=False, compare=False)
    _prefixes: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self, retention):
        if retention is not None:
            if self.compression_ratio:
                raise ValueError("give `retention` or `compression_ratio`, not both: one is 1 minus the other")
            if not 0.0 < retention <= 1.0:
                raise ValueError(f"a retention ratio is the kept share, 0 < ratio <= 1, found {retention}")
            self.compression_ratio = 1.0 - retention
        if not 0.0 <= self.compression_ratio < 1.0:
            raise ValueError(f"`compression_ratio` is the removed share, 0 <= ratio < 1, found {self.compression_ratio}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy `{self.policy}` is not known; expected one of {', '.join(POLICIES)}")

    def post_init_from_model(self, model):
        if self._proxykv is None:
            device = self.device or model.device
            self._proxykv = ProxyKV.from_pretrained(self.export, self.proxy, self.revision, device)
        if self.policy == "pair-budget" and self._proxykv.budgets is None:
            raise ValueError(NO_BUDGETS)
        self._proxykv.check_target(model)

    def prefix_of(self, model, ids: list[int]) -> int:
        """How many of the first tokens are the chat template's."""
        name = model.config.name_or_path
        if name not in self._prefixes:
            self._prefixes[name] = Frame.of(self._proxykv.tokenizer_of(model)).prefix
        same = (a == b for a, b in zip(ids, self._prefixes[name]))
        return next((i for i, equal in enumerate(same) if not equal), min(len(ids), len(self._prefixes[name])))

    @contextmanager
    def __call__(self, model):
        self.post_init_from_model(model)
        seen, caches, reading = [], [], None

        def before(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            cache = kwargs.get("past_key_values")
            if ids is None or ids.shape[0] != 1:
                raise ValueError("ProxyKVPress needs the context as `input_ids` of one sequence")
            if cache is None or (not seen and cache.get_seq_length() > 0):
                raise ValueError("ProxyKVPress needs an empty cache to prefill, given as `past_key_values`")
            seen.extend(ids[0].tolist())
            caches[:] = [cache]
            if reading is not None:
                reading.prefix = self.prefix_of(model, seen)

        with ExitStack() as hooks:
            hooks.callback(model.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            if self.compression_ratio > 0 and "target" in self._proxykv.sources:
                reading = hooks.enter_context(self._proxykv.tap(model, 0))
            yield
        if seen and self.compression_ratio > 0:
            self._evict(model, caches[0], seen, reading)

    def _evict(self, model, cache, ids: list[int], reading: Reading | None):
        # 1 - 0.95 is not 0.05 to the last bit, which a count may round by.
        retention = round(1.0 - self.compression_ratio, 12)
        prefix = self.prefix_of(model, ids)
        if prefix == len(ids):
            return
        self.kept = self._proxykv.keep(ids, prefix, retention, self.policy, reading, cache)
        self.bytes = evict(model, cache, self.kept)
