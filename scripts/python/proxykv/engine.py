"""What a serving engine needs of an export, without torch: who it is for, how much each KV head keeps, which positions.

    contract = Contract.read("path/or/hub-name/of/an/export")
    contract.check(Served.of(model, revision, dtype, config, tokenizer))        # refuses any other target
    scores = contract.scores(log_odds, prefix=17, tokens=4096)                  # of one prompt
    scores.uniform(0.25)                                                        # positions, equally many in every head

Scores are log-odds, `[layers, KV heads, positions after the prefix]`; who computes them is the engine's business
(`proxykv.ProxyKV` does in torch). Nothing here falls back: what does not fit is an error. Arrays are numpy's.
docs/serving.md has the frames of a Tangram scorer and of a TensorRT-LLM compression manager.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .budgets import NO_BUDGETS, HeadBudgets, kept_count
from .export import export_folder
from .tokens import Frame, vocab_hash

SHAPE = {
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "query_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "hidden": "hidden_size",
    "vocab": "vocab_size",
}
# By the export's name of it.
DTYPES = {"Float": "float32", "BFloat16": "bfloat16", "Half": "float16"}


class Mismatch(ValueError):
    """The engine's target is not the one whose scores the export knows."""


class Served(NamedTuple):
    """The target as an engine serves it, as far as scores depend on it."""

    model: str
    revision: str
    dtype: str
    shape: dict[str, int]
    vocab_hash: str
    template_hash: str

    @classmethod
    def of(cls, model: str, revision: str, dtype: str, config: dict, tokenizer) -> Served:
        """`model` and `revision` are the hub's name and commit, or an export's own of a local folder; `dtype` is what the
        target computes in, `float32`, `bfloat16` or `float16`; `config` its `config.json`; `tokenizer` that of transformers.
        """
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        config = {**config, "head_dim": head_dim, "num_key_value_heads": kv_heads}
        shape = {ours: config[theirs] for ours, theirs in SHAPE.items()}
        return cls(model, revision, str(dtype).removeprefix("torch."), shape, vocab_hash(tokenizer), Frame.hash(tokenizer))


class Contract:
    """An export's target and head budgets, and the shape of its scores."""

    def __init__(self, target: Served, budgets: HeadBudgets | None):
        self.target, self.budgets = target, budgets
        self.layers, self.kv_heads = target.shape["layers"], target.shape["kv_heads"]
        if budgets is not None and len(budgets.shares[0]) != self.layers * self.kv_heads:
            raise ValueError(f"head budgets are for {len(budgets.shares[0])} KV heads, the target has {self.layers} x {self.kv_heads}")

    @classmethod
    def read(cls, source: str | Path, revision: str | None = None) -> Contract:
        """Of an export: a folder or a hub name."""
        folder = export_folder(source, revision)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        try:
            named = config["target"]
            shape = {name: named["shape"][name] for name in SHAPE}
            names = named["model"], named["revision"], DTYPES[named["dtype"]], shape, named["vocab_hash"], named["template_hash"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"`{path}` is no export that this file knows: {error!r}") from error
        return cls(Served(*names), HeadBudgets.read(folder))

    def check(self, served: Served) -> None:
        """Refuse any other target than the export's; the error names all that differs."""
        pairs = [(name, getattr(self.target, name), getattr(served, name)) for name in Served._fields if name != "shape"]
        pairs += [(name, self.target.shape[name], served.shape.get(name)) for name in SHAPE]
        wrong = [f"{name}: expected {expected}, found {found}" for name, expected, found in pairs if expected != found]
        if wrong:
            raise Mismatch("the mapper does not know the scores of this target. " + "; ".join(wrong))

    def scores(self, log_odds: np.ndarray, prefix: int, tokens: int) -> PromptScores:
        """Scores of a prompt of `tokens` tokens, of which the first `prefix` are the chat template's and have none."""
        if not 0 <= prefix < tokens:
            raise ValueError(f"a prompt of {tokens} tokens with a prefix of {prefix} has no context")
        log_odds, expected = np.asarray(log_odds), (self.layers, self.kv_heads, tokens - prefix)
        if log_odds.shape != expected or log_odds.dtype.kind != "f":
            raise Mismatch(f"scores are {log_odds.dtype} of shape {log_odds.shape}, expected floats of shape {expected}")
        if not np.isfinite(log_odds).all():
            raise Mismatch("scores have NaN or infinite values: the features they were computed from are damaged")
        return PromptScores(log_odds.astype(np.float32, copy=False), prefix, self.budgets)

    def counts(self, prefix: int, tokens: int, retention: float) -> np.ndarray:
        """Pairs that each head keeps of a prompt by the export's budgets, int64 `[layers, KV heads]`; known before it is read."""
        if self.budgets is None:
            raise ValueError(NO_BUDGETS)
        positions, heads = tokens - prefix, self.layers * self.kv_heads
        kept = self.budgets.counts(kept_count(heads * positions, retention), positions)
        return np.array(kept).reshape(self.layers, self.kv_heads) + prefix


class PromptScores:
    """Scores of one prompt: which of its positions each head keeps. Positions count from the prompt's first token.

    The prefix always stays. A rank that holds some of the KV heads takes its part of what is returned: heads are chosen for
    one by one.
    """

    def __init__(self, log_odds_lht: np.ndarray, prefix: int, budgets: HeadBudgets | None):
        self.log_odds, self.prefix, self.budgets = log_odds_lht, prefix, budgets

    def uniform(self, retention: float) -> np.ndarray:
        """Positions that stay, ascending, int64 `[layers, KV heads, kept]`: policy `pair-uniform`."""
        layers, heads, t = self.log_odds.shape
        best = self._ranked()[..., : kept_count(t, retention)]
        prefix = np.broadcast_to(np.arange(self.prefix), (layers, heads, self.prefix))
        return np.concatenate([prefix, np.sort(best, -1) + self.prefix], -1)

    def budgeted(self, retention: float) -> list[list[np.ndarray]]:
        """Positions that stay, ascending, of each layer and KV head, as many as its budget: policy `pair-budget`."""
        if self.budgets is None:
            raise ValueError(NO_BUDGETS)
        layers, heads, t = self.log_odds.shape
        counts = self.budgets.counts(kept_count(self.log_odds.size, retention), t)
        ranked, prefix = self._ranked(), np.arange(self.prefix)
        keep = lambda l, h: np.sort(ranked[l, h, : counts[l * heads + h]]) + self.prefix  # noqa: E731, E741
        return [[np.concatenate([prefix, keep(layer, head)]) for head in range(heads)] for layer in range(layers)]

    def chunk(self, layer: int, start: int, end: int) -> np.ndarray:
        """Scores of the prompt's tokens from `start` to `end`, f32 `[KV heads, end - start]`, for engines that ask chunk by
        chunk and rank by themselves. The prefix scores above all others.
        """
        t = self.log_odds.shape[2] + self.prefix
        if not 0 <= start <= end <= t:
            raise ValueError(f"tokens from {start} to {end} are not of a prompt of {t} tokens")
        prefix = np.full((self.log_odds.shape[1], self.prefix), self.log_odds.max() + 1.0, np.float32)
        return np.concatenate([prefix, self.log_odds[layer]], 1)[:, start:end]

    def _ranked(self) -> np.ndarray:
        """Context positions of each head, best first; of equal scores the lower."""
        return np.argsort(-self.log_odds, -1, kind="stable")
