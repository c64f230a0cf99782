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

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# The export's files


def export_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of an export, downloaded first if `source` is a hub name."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise FileNotFoundError(f"there is no export at `{source}`: expected a folder or a hub name `owner/name`")
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "parity.safetensors", "budgets.json"]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=files))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens around a context (crates/lm)


def text_encoder(tokenizer):
    """A function from texts to ids as they are within a prompt.

    A SentencePiece tokenizer puts a blank before every text it is given, but none after another character.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return encode

    def pieces(text: str) -> str:
        text = core.normalizer.normalize_str(text) if core.normalizer else text
        return "".join(p for p, _ in core.pre_tokenizer.pre_tokenize_str(text)) if core.pre_tokenizer else text

    for lead in ("", "\u0001", "\n", ".", "|"):
        pairs = (("a", "b"), ("a", " b"), ("a ", "b"), ("a\n", "b"))
        fits = all(pieces(a + b) == pieces(a) + pieces(lead + b).removeprefix(pieces(lead)) for a, b in pairs)
        ids = encode(lead)
        if fits and (not lead or all(encode(lead + x)[: len(ids)] == ids for x in ("a", " b", "1", "[", "\u00e9", "\u4eac"))):
            return lambda text: encode(lead + text)[len(ids) :]
    raise ValueError("the tokenizer reads a text as another one than its parts, which prompts are made of")


class Frame(NamedTuple):
    """Tokens around a user's text, by the chat template; without one the bos token, if there is one, as in kvpress."""

    prefix: list[int]
    switch: list[int]

    @classmethod
    def of(cls, tokenizer) -> Frame:
        prefix, switch = cls._texts(tokenizer)
        return cls(tokenizer.encode(prefix, add_special_tokens=False), text_encoder(tokenizer)(switch))

    @classmethod
    def hash(cls, tokenizer) -> str:
        """SHA-256 of the texts of prefix and switch, as an export names it."""
        return hashlib.sha256("\u0001".join(cls._texts(tokenizer)).encode()).hexdigest()

    @staticmethod
    def _texts(tokenizer) -> list[str]:
        if getattr(tokenizer, "chat_template", None) is None:
            return [tokenizer.bos_token or "", "\n"]
        mark = "\u0001"
        message = [{"role": "user", "content": mark}]
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        text = tokenizer.apply_chat_template(message, **options)
        if text.count(mark) != 1:
            raise ValueError("the chat template must render the text of a user's message once")
        return text.split(mark)


def vocab_hash(tokenizer) -> str:
    """SHA-256 of all tokens with their ids, as an export names it."""
    vocab = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# How many KV pairs stay (crates/prune)


NO_BUDGETS = (
    "policy `pair-budget` needs head budgets, and the export has none; write it again with `proxykv-train export`, "
    "or use `pair-uniform`"
)


def kept_count(n: int, retention: float) -> int:
    """How many of `n` KV pairs a retention ratio keeps: rounded half up, at least one."""
    if not 0.0 < retention <= 1.0:
        raise ValueError(f"a retention ratio is the kept share of KV pairs, 0 < ratio <= 1, found {retention}")
    exact = n * retention
    count = math.floor(exact)
    return min(n, max(min(n, 1), count + (exact - count >= 0.5)))


class HeadBudgets(NamedTuple):
    """How many positions each KV head keeps under the policy `pair-budget`: an export's `budgets.json`.

    Shares of a head's positions, at retention ratios, both in parts per million; between two ratios interpolated.
    """

    ratios: list[int]
    # By ratio and head, layers x KV heads.
    shares: list[list[int]]

    @classmethod
    def read(cls, source: str | Path, revision: str | None = None) -> HeadBudgets | None:
        """Those of an export (folder or hub name); None where it is older than budgets are."""
        folder = export_folder(source, revision)
        path = folder / "budgets.json"
        if not path.is_file():
            return None
        file = json.loads(path.read_text(encoding="utf-8"))
        if file.get("schema_version") != 1:
            raise ValueError(f"`{path}`: expected version 1, found {file.get('schema_version')}")
        shares = [[share for layer in row for share in layer] for row in file["shares"]]
        sizes = [file["contexts"], file["layers"], file["kv_heads"]]
        lines = [file["model_sha256"], *(" ".join(map(str, row)) for row in [sizes, file["ratios"], *shares])]
        found = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
        if found != file["sha256"]:
            raise ValueError(f"`{path}` is damaged: expected SHA-256 {file['sha256']}, found {found}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if file["model_sha256"] != config["files"]["model.safetensors"]["sha256"]:
            raise ValueError(f"`{path}` belongs to the weights of another export")
        return cls(file["ratios"], shares)

    def counts(self, kept: int, positions: int) -> list[int]:
        """Positions that each head keeps of `positions`, `kept` pairs in all; it depends on nothing else."""
        heads = len(self.shares[0])
        at = kept / float(heads * positions) * 1e6 if positions else 0.0
        high = next((i for i, ratio in enumerate(self.ratios) if ratio >= at), len(self.ratios) - 1)
        start, low = (self.ratios[high - 1], self.shares[high - 1]) if high else (0, [0] * heads)
        way = (at - start) / (float(self.ratios[high]) - start)
        return _apportion([a + (float(b) - a) * way for a, b in zip(map(float, low), self.shares[high])], kept, positions)


def _apportion(weights: list[float], total: int, cap: int) -> list[int]:
    """`total` in proportion to `weights`, at most `cap` to each; rounded by largest remainder, then the lower index.

    The same operations in the same order as in Rust: all readers count alike.
    """
    quota, full, left = [0.0] * len(weights), [False] * len(weights), total
    while True:
        still = [o for o in range(len(weights)) if not full[o]]
        weight = 0.0
        for o in still:  # `sum` compensates for rounding
            weight += weights[o]
        for o in still:
            quota[o] = left * weights[o] / weight if weight > 0.0 else left / len(still)
        beyond = [o for o in still if quota[o] > cap]
        if not beyond:
            break
        for o in beyond:
            full[o], quota[o] = True, float(cap)
            left = max(0, left - cap)
    counts = [math.floor(q) for q in quota]
    order = sorted(range(len(weights)), key=lambda o: math.floor(quota[o]) - quota[o])
    rest = max(0, total - sum(counts))
    while rest > 0 and min(counts) < cap:
        for o in order:
            if rest > 0 and counts[o] < cap:
                counts[o], rest = counts[o] + 1, rest - 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The contract

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
