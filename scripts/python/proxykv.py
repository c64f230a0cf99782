"""Exports of proxykv-train in Python: mapper, features, keep masks, and a press for kvpress.

    from proxykv import ProxyKVPress
    press = ProxyKVPress("path/or/hub-name/of/an/export", retention=0.1)

Without our binary: torch and safetensors for the mapper, transformers to run the models, kvpress for the press,
huggingface_hub for a hub name; each is imported when it is needed. An export is JSON and safetensors: nothing is
unpickled and no code is downloaded. What needs no torch is in proxykv_engine.py beside this file.

The numbers are those of the Rust crates `mapper`, `extract`, `score` and `prune`, in the same order of operations;
what each means is written there.

Dimension key: l layer, h KV head, g query heads per KV head, q query head, p KV head of the sources of features
(layers x heads, layer-major), o target KV head (same), c channel, t context position, k cached position, r row (query)
of a block, s new token, d head_dim or width, b batch, m width of stage 2, n attention head of the mapper.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from proxykv_engine import NO_BUDGETS, Frame, HeadBudgets, export_folder, kept_count, text_encoder, vocab_hash

import torch
import torch.nn.functional as F
from torch import nn

EXPORT_VERSION = 2
POLICIES = ("pair", "pair-uniform", "pair-budget", "token")


# ---------------------------------------------------------------------------------------------------------------------
# The export's files


def read_config(folder: Path, verify: bool = True) -> dict:
    """`config.json` of an export; with `verify`, every file is compared with the hash it names."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    version = config.get("schema_version")
    if version != EXPORT_VERSION:
        raise ValueError(f"`{path}`: expected export version {EXPORT_VERSION}, found {version}")
    if verify:
        for name, expected in config["files"].items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"`{folder / name}` is missing from the export")
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise ValueError(f"`{folder / name}` is damaged: expected SHA-256 {expected['sha256']}, found {found}")
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# ---------------------------------------------------------------------------------------------------------------------
# The mapper (crates/mapper)

FEATURE_LIMIT = 6.0
SMALLEST_STD = 1e-3
ROTARY_BASE = 10_000.0
# Positions of one forward: bounds the mapper's activations on long contexts.
MAPPER_WINDOW = 16_384
# Elements of stage 3's largest tensor.
PIECE_ELEMENTS = 1 << 27


class _Tensors(nn.Module):
    """Tensors by name, to be filled from the export."""

    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))


class _Linear(_Tensors):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(weight=(outputs, inputs), bias=(outputs,))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class _Norm(_Tensors):
    def __init__(self, width: int):
        super().__init__(weight=(width,), bias=(width,))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class _Conv(_Tensors):
    """Dense convolution over time, centred, zeros beyond both ends: `[rows, t, width]` to the same."""

    def __init__(self, width: int, kernel: int, dilation: int):
        super().__init__(weight=(width, width, kernel), bias=(width,))
        self.dilation, self.reach = dilation, kernel // 2 * dilation

    def forward(self, x):
        image = x.transpose(1, 2).unsqueeze(2)
        y = F.conv2d(image, self.weight.unsqueeze(2), self.bias, 1, (0, self.reach), (1, self.dilation))
        return y.squeeze(2).transpose(1, 2)


class _Temporal(_Tensors):
    """Stage 1: each proxy KV head on its own, weights shared, a head embedding."""

    def __init__(self, section: dict, dims: dict):
        width = section["head_width"]
        super().__init__(head_embedding=(dims["proxy_heads"], width))
        self.input = _Linear(dims["channels"], width)
        self.conv0, self.conv1 = (_Conv(width, section["kernel"], dilation) for dilation in (1, 2))
        self.norm = _Norm(width)
        self.reach = self.conv0.reach + self.conv1.reach

    def forward(self, heads_bpct):
        b, p, _, t = heads_bpct.shape
        x_bptd = self.input(heads_bpct.transpose(2, 3)) + self.head_embedding.unsqueeze(1)
        h_rtd = F.gelu(x_bptd).reshape(b * p, t, -1)
        for conv in (self.conv0, self.conv1):
            h_rtd = h_rtd + F.gelu(conv(h_rtd))
        return self.norm(h_rtd).reshape(b, p, t, -1)


class _TimeAttention(nn.Module):
    """Attention over time in a window, rotary positions; blocks of one window against three."""

    def __init__(self, section: dict):
        super().__init__()
        width = section["width"]
        self.qkv, self.output = _Linear(width, 3 * width), _Linear(width, width)
        self.heads, self.window = section["attention_heads"], section["attention_window"]

    def forward(self, x_btm):
        b, t, m = x_btm.shape
        e, w = m // self.heads, self.window
        q, k, v = self.qkv(x_btm).reshape(b, t, 3, self.heads, e).permute(2, 0, 3, 1, 4).unbind(0)
        if t <= w + 1:
            y = F.scaled_dot_product_attention(_rotate(q, 0), _rotate(k, 0), v)
        else:
            blocks = -(-t // w)
            beyond = blocks * w - t
            q = F.pad(q, (0, 0, 0, beyond)).reshape(b, self.heads, blocks, w, e)
            k, v = (
                F.pad(x, (0, 0, w, w + beyond)).unfold(2, 3 * w, w).transpose(3, 4).contiguous() for x in (k, v)
            )
            y = F.scaled_dot_product_attention(_rotate(q, w), _rotate(k, 0), v, self._band(blocks, t, x_btm.device))
            y = y.reshape(b, self.heads, blocks * w, e).narrow(2, 0, t)
        return self.output(y.transpose(1, 2).reshape(b, t, m))

    def _band(self, blocks: int, t: int, device):
        w = self.window
        arange = lambda n: torch.arange(n, device=device)  # noqa: E731
        distance = arange(3 * w).unsqueeze(0) - (arange(w) + w).unsqueeze(1)
        key = (arange(blocks) * w - w).unsqueeze(1) + arange(3 * w).unsqueeze(0)
        inside = ((key >= 0) & (key < t)).unsqueeze(1)
        return (distance.abs() <= w).unsqueeze(0) & inside


def _rotate(x, start: int):
    """Rotary positions from `start` along the second last axis, pairs (i, i + e/2)."""
    t, e = x.shape[-2:]
    frequencies = torch.tensor([ROTARY_BASE ** (-2.0 * i / e) for i in range(e // 2)], dtype=torch.float64)
    angle = torch.outer(torch.arange(start, start + t, dtype=torch.float64), frequencies)
    angle = torch.cat([angle, angle], -1)
    turned = torch.cat([-x[..., e // 2 :], x[..., : e // 2]], -1)
    return x * angle.cos().float().to(x.device) + turned * angle.sin().float().to(x.device)


class _Block(nn.Module):
    """Convolution, attention where the recipe asks for it, feed-forward; each on a normalized copy."""

    def __init__(self, section: dict, index: int):
        super().__init__()
        width, wide = section["width"], section["width"] * section["feed_forward"]
        self.conv_norm = _Norm(width)
        self.conv = _Conv(width, section["kernel"], section["dilations"][index])
        self.attends = index in section["attention_blocks"]
        if self.attends:
            self.attention_norm, self.attention = _Norm(width), _TimeAttention(section)
        self.feed_forward_norm = _Norm(width)
        self.feed_forward = nn.ModuleDict({"up": _Linear(width, wide), "down": _Linear(wide, width)})
        self.reach = self.conv.reach + (section["attention_window"] if self.attends else 0)

    def forward(self, x_btm):
        x_btm = x_btm + F.gelu(self.conv(self.conv_norm(x_btm)))
        if self.attends:
            x_btm = x_btm + self.attention(self.attention_norm(x_btm))
        up = F.gelu(self.feed_forward["up"](self.feed_forward_norm(x_btm)))
        return x_btm + self.feed_forward["down"](up)


class _Context(nn.Module):
    """Stage 2: all heads together, residual blocks along time."""

    def __init__(self, section: dict, inputs: int):
        super().__init__()
        self.input = _Linear(inputs, section["width"])
        self.blocks = len(section["dilations"])
        for i in range(self.blocks):
            self.add_module(f"block{i}", _Block(section, i))
        self.norm = _Norm(section["width"])
        self.reach = sum(self.get_submodule(f"block{i}").reach for i in range(self.blocks))

    def forward(self, x_bti):
        x_btm = self.input(x_bti)
        for i in range(self.blocks):
            x_btm = self.get_submodule(f"block{i}")(x_btm)
        return self.norm(x_btm)


class _Cross(_Tensors):
    """Stage 3: one learned query per target KV head over the proxy heads' tokens and the context's."""

    def __init__(self, section: dict, dims: dict):
        n, d, p, o = section["cross_heads"], section["head_width"], dims["proxy_heads"], dims["outputs"]
        e = section["cross_width"] // n
        super().__init__(token_embedding=(p + 1, d), query=(n, o, e), readout=(n, o, e))
        self.context = _Linear(section["width"], d)
        self.key, self.value = _Tensors(weight=(n, e, d)), _Tensors(weight=(n, e, d))
        self.scale = 1.0 / math.sqrt(e)

    def forward(self, heads_bptd, context_btm):
        b, p, t, _ = heads_bptd.shape
        context_b1td = self.context(context_btm).unsqueeze(1)
        tokens_bptd = torch.cat([heads_bptd, context_b1td], 1) + self.token_embedding.unsqueeze(1)
        # Queries fold into the keys, readouts into the values: `[n x o, d]` each.
        logit_rd = (self.query.bmm(self.key.weight) * self.scale).flatten(0, 1)
        reading_rd = self.readout.bmm(self.value.weight).flatten(0, 1)
        piece = max(1, min(t, PIECE_ELEMENTS // (b * (p + 1) * logit_rd.shape[0])))
        scores = [self._read(part, logit_rd, reading_rd) for part in tokens_bptd.split(piece, 2)]
        return torch.cat(scores, 1)

    def _read(self, tokens_bptd, logit_rd, reading_rd):
        b, _, t, _ = tokens_bptd.shape
        n, o, _ = self.query.shape
        weight_bptr = F.linear(tokens_bptd, logit_rd).softmax(1)
        sum_btr = (weight_bptr * F.linear(tokens_bptd, reading_rd)).sum(1)
        return sum_btr.reshape(b, t, n, o).sum(2)


class HybridAxialMapper(nn.Module):
    """From raw features of the sources to one score per KV pair of the target; higher means keep.

    All variants of a recipe's `[mapper]`: `hybrid-axial`, `conv`, `mlp`, `linear`. Standardization is part of it.
    """

    def __init__(self, section: dict, dims: dict):
        super().__init__()
        self.section, self.dims = section, dims
        variant = section["variant"]
        p, c, g, o = (dims[name] for name in ("proxy_heads", "channels", "globals", "outputs"))
        flat = p * c + g
        self.standardize = _Tensors(
            heads_mean=(p, c), heads_std=(p, c), globals_mean=(g,), globals_std=(g,), label_mean=(), label_std=()
        )
        self.skip = _Linear(flat, o) if section["linear_skip"] or variant == "linear" else None
        self.reach = 0
        if variant == "mlp":
            hidden = section["width"] * section["feed_forward"]
            self.mlp = nn.ModuleDict({"hidden0": _Linear(flat, hidden), "hidden1": _Linear(hidden, hidden)})
            self.output = _Linear(hidden, o)
        elif variant == "conv":
            self.stage2 = _Context(section, flat)
            self.output = _Linear(section["width"], o)
            self.reach = self.stage2.reach
        elif variant == "hybrid-axial":
            self.stage1 = _Temporal(section, dims)
            self.stage2 = _Context(section, p * section["head_width"] + g)
            self.stage3 = _Cross(section, dims)
            self.output = _Linear(section["width"], o)
            self.reach = self.stage1.reach + self.stage2.reach
        elif variant != "linear":
            raise ValueError(f"mapper variant `{variant}` is not known; this file is older than the export")

    @classmethod
    def from_export(cls, source: str | Path, revision: str | None = None, verify: bool = True) -> HybridAxialMapper:
        """The mapper of an export, in eval mode, f32 on the CPU."""
        folder = export_folder(source, revision)
        config = read_config(folder, verify)
        mapper = cls(config["mapper"], config["dims"])
        # Learned numbers of the loss are of no use here, and the map of hidden states makes a feature.
        tensors = read_tensors(folder / "model.safetensors")
        mapper.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(("loss.", "hidden."))})
        return mapper.eval()

    def forward(self, heads_bpct: torch.Tensor, globals_bct: torch.Tensor) -> torch.Tensor:
        """Raw features `[b, heads of all sources, channels, t]` and `[b, globals, t]` to f32 `[b, outputs, t]`."""
        expected = (self.dims["proxy_heads"], self.dims["channels"])
        if heads_bpct.dim() != 4 or tuple(heads_bpct.shape[1:3]) != expected or heads_bpct.shape[3] == 0:
            raise ValueError(f"head features have shape {tuple(heads_bpct.shape)}, expected [batch, {expected}, positions]")
        expected = (heads_bpct.shape[0], self.dims["globals"], heads_bpct.shape[3])
        if tuple(globals_bct.shape) != expected:
            raise ValueError(f"global features have shape {tuple(globals_bct.shape)}, expected {expected}")
        z = self.standardize
        heads_bpct = _standardized(heads_bpct, z.heads_mean, z.heads_std)
        globals_bct = _standardized(globals_bct, z.globals_mean, z.globals_std)
        flat_btf = torch.cat([heads_bpct.flatten(1, 2), globals_bct], 1).transpose(1, 2).contiguous()
        parts = [] if self.skip is None else [self.skip(flat_btf)]
        variant = self.section["variant"]
        if variant == "mlp":
            h = flat_btf
            for layer in self.mlp.values():
                h = F.gelu(layer(h))
            parts.append(self.output(h))
        elif variant == "conv":
            parts.append(self.output(self.stage2(flat_btf)))
        elif variant == "hybrid-axial":
            heads_bptd = self.stage1(heads_bpct)
            tokens_btf = heads_bptd.transpose(1, 2).flatten(2, 3)
            context_btm = self.stage2(torch.cat([tokens_btf, globals_bct.transpose(1, 2)], 2))
            parts.append(self.output(context_btm) + self.stage3(heads_bptd, context_btm))
        scores_bto = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return scores_bto.transpose(1, 2).contiguous()

    @torch.no_grad()
    def scores(self, heads_pct: torch.Tensor, globals_ct: torch.Tensor, window: int = MAPPER_WINDOW) -> torch.Tensor:
        """Scores of one context of any length, f32 `[outputs, t]`: windows that overlap by the mapper's reach."""
        heads, globals_ = heads_pct.unsqueeze(0), globals_ct.unsqueeze(0)
        t = heads.shape[-1]
        if t <= window:
            return self(heads, globals_).squeeze(0)
        out = []
        for start in range(0, t, window):
            end, first = min(t, start + window), max(0, start - self.reach)
            last = min(t, end + self.reach)
            part = self(heads[..., first:last], globals_[..., first:last])
            out.append(part[0, :, start - first : end - first])
        return torch.cat(out, -1)

    def to_log_odds(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores to log-odds of the target's (span-pooled) KVzip score."""
        return scores * self.standardize.label_std + self.standardize.label_mean


def _standardized(x, mean, std):
    x = (x.float() - mean.unsqueeze(-1)) / std.unsqueeze(-1).clamp_min(SMALLEST_STD)
    return x.clamp(-FEATURE_LIMIT, FEATURE_LIMIT)


@torch.no_grad()
def check_parity(source: str | Path, revision: str | None = None) -> float:
    """Largest difference between this mapper and the export's parity vectors, which the Rust mapper wrote."""
    folder = export_folder(source, revision)
    parity = read_tensors(folder / "parity.safetensors")
    scores = HybridAxialMapper.from_export(folder).scores(parity["heads_pct"], parity["globals_ct"])
    return (scores - parity["scores_ot"]).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Keep masks (crates/prune)


def keep_mask(
    scores_lht: torch.Tensor, policy: str, retention: float, budgets: HeadBudgets | None = None
) -> torch.Tensor:
    """The KV pairs that stay, bool of the scores' shape `[.., positions]`; of equal scores the lower index.

    `pair`: all pairs compete; `pair-uniform`: the positions of each head; `pair-budget`: the same, with as many of each
    head as `budgets` say, and in all as many as `pair`; `token`: the positions, by the mean over heads of their rank.
    The count is exact: `kept_count` of what competes.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy `{policy}` is not known; expected one of {', '.join(POLICIES)}")
    shape, t = scores_lht.shape, scores_lht.shape[-1]
    if policy == "pair":
        return top_mask(scores_lht.reshape(1, -1), kept_count(scores_lht.numel(), retention)).reshape(shape)
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


# ---------------------------------------------------------------------------------------------------------------------
# Features of a source, which is the proxy or the target (crates/extract, crates/score)

LOG_LIMIT = 16.0
LOG_ODDS_LIMIT = 14.0
MEAN_FLOOR = 1e-7
VALUE_NORM_FLOOR = 1e-4
SHORTEST_KEY = 1e-12
SMALLEST_F64 = 2.2250738585072014e-308
# Most logits held at once while the surprisal is taken.
LOGIT_ELEMENTS = 1 << 24
# Elements of the mask that transformers makes for a prefill chunk after cached ones.
MASK_ELEMENTS = 1 << 28
QUOTED_TOKENS = 8
# Positions whose hidden states are held in f32 at once.
HIDDEN_ROWS = 1 << 13
# Architectures whose attention modules the hooks know.
MODEL_TYPES = ("llama", "qwen2", "qwen3")
PREFILL_CHANNELS = ("max_all", "mean_all", "max_window", "mean_window", "max_last", "mean_last", "key_norm", "value_norm")
REPEAT_CHANNELS = ("recon_log", "recon_log_odds", "recon_mean")
UNRUN_CHANNELS = ("replay_unrun", "replay_unrun_mean")
# What any model gives. The prefill's are those of a recipe that names none, the repeat's are a proxy's alone.
CHANNELS = (*PREFILL_CHANNELS, *UNRUN_CHANNELS, "key_diff", "mean_last_layer")


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


@contextmanager
def _tap(model: nn.Module, see):
    """Call `see(_Layer)` after every attention module of a transformers model."""

    def hook(module, args, kwargs, output):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs["past_key_values"].layers[module.layer_idx]
        if hasattr(cache, "_quantized_keys"):
            raise ValueError("features need a cache that holds keys and values as they are, this one is quantized")
        if isinstance(cache.keys, RaggedHeads):
            raise ValueError("features need a prefill from an empty cache, this one was pruned")
        q = module.q_proj(hidden).view(*hidden.shape[:-1], -1, module.head_dim)
        if hasattr(module, "q_norm"):
            q = module.q_norm(q)
        q = q.transpose(1, 2)
        cos, sin = (x.unsqueeze(1) for x in kwargs["position_embeddings"])
        half = q.shape[-1] // 2
        q = q * cos + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * sin
        k, v = cache.keys[0], cache.values[0]
        see(_Layer(module.layer_idx, q[0], k, v, k.shape[1] - hidden.shape[1], hidden[0], module))

    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _exact_frequencies(model: nn.Module) -> None:
    """Give a model the rotary frequencies of the Rust one: computed in f64, rounded to f32 once.

    transformers computes them in f32, which turns a query at position 500 by up to 5e-5 more or less, and one at
    100,000 by 1e-2. Scalings that are not known here keep transformers' numbers.
    """
    rotary, config = model.model.rotary_emb, model.config
    rope = config.rope_parameters
    theta, kind, d = float(rope["rope_theta"]), rope.get("rope_type", "default"), 2 * rotary.inv_freq.numel()
    exact = [theta ** (-2.0 * i / d) for i in range(d // 2)]
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = [(original * f / math.tau - low) / (high - low) for f in exact]
    elif kind == "yarn":
        # The dimension whose wavelength makes so many turns within the original length.
        turns = (rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0)
        low, high = (d * math.log(original / (n * math.tau)) / (2.0 * math.log(theta)) for n in turns)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0.0), min(high, d - 1.0)
        kept = [1.0 - (i - low) / ((high - low) or 0.001) for i in range(d // 2)]
    else:
        kept = [1.0] * (d // 2)
    kept = [min(max(x, 0.0), 1.0) for x in kept]
    factor = rope.get("factor") or 1.0
    exact = torch.tensor([f * (k + (1.0 - k) / factor) for f, k in zip(exact, kept)], dtype=torch.float64)
    exact = exact.to(rotary.inv_freq)
    if torch.allclose(exact, rotary.inv_freq, rtol=1e-4, atol=0.0):
        rotary.inv_freq.copy_(exact)


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
        q_qsd, start = layer.q_qsd, layer.start
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
        scale = 1.0 / math.sqrt(q_qsd.shape[2])
        while row < end:
            budget = _block_elements(q_qsd.device) // (q_qsd.shape[0] * end)
            stop = min(end, row + max(1, min(self.block_tokens, budget)))
            q_qrd = q_qsd[:, row - start : stop - start].float() * scale
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
    q_hgsd = (q_qsd.float() * (1.0 / math.sqrt(d))).reshape(h, -1, rows, d)
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


class Requests(NamedTuple):
    """What is fed to make a model repeat its context, scoring chunk by scoring chunk: token ids."""

    first: list[int]
    later: list[int]
    switch: list[int]
    chunk_tokens: int

    @classmethod
    def of(cls, tokenizer, label: dict) -> Requests:
        """By the section `label` of an export."""
        original, encode = label["preset"] == "original", text_encoder(tokenizer)
        later = "\n\nRepeat the part of the previous context exactly, starting with" + " " * original
        first, size = "\n\nRepeat the previous context exactly.", label["chunk_tokens"] or (2000 if original else 2048)
        return cls(encode(first), encode(later), Frame.of(tokenizer).switch, max(1, size))

    def chunks(self, context: int) -> list[tuple[int, int]]:
        """Begin and end of each scoring chunk of so many tokens; the last may be shorter."""
        return [(start, min(start + self.chunk_tokens, context)) for start in range(0, context, self.chunk_tokens)]

    def _quoted(self, start: int) -> int:
        return min(start, self.chunk_tokens, QUOTED_TOKENS)

    def before(self, start: int) -> int:
        """Tokens fed before the chunk at `start` itself."""
        return len(self.later if start else self.first) + self._quoted(start) + len(self.switch)

    def ids(self, context: list[int], start: int, end: int) -> list[int]:
        quote = context[start - self._quoted(start) : start]
        return (self.later if start else self.first) + quote + self.switch + context[start:end]


def _check_type(model: nn.Module) -> None:
    if model.config.model_type not in MODEL_TYPES:
        raise ValueError(f"features of `{model.config.model_type}` are not supported, only of {', '.join(MODEL_TYPES)}")


class Reading:
    """Features of one model's prefill of one context, gathered while it runs; see `ProxyKV.tap`.

    The context may come in several forwards that share a cache. What is held is bounded: the features, and of each
    layer the last queries.
    """

    def __init__(
        self,
        model: nn.Module,
        extract: dict,
        prefix: int,
        hidden: tuple | None = None,
        requests: Requests | None = None,
        context: int | None = None,
    ):
        # `hidden`: weight `[l, d, h]` and bias `[l, h]` of the channel `hidden_linear`. `requests` and, where the context
        # comes in several forwards, its length `context` are for the channels `replay_unrun` and `replay_unrun_mean`.
        self.model, self.extract, self.prefix, self.hidden = model, extract, prefix, hidden
        self.requests, self.context, self.unrun = requests, context, None
        if requests is None and any(channel in UNRUN_CHANNELS for channel in extract["channels"]):
            raise ValueError("the channels `replay_unrun` and `replay_unrun_mean` need the requests of a repeat: `Requests.of`")
        self.ids = torch.empty(0, dtype=torch.long)
        self.statistics = _QueryStatistics(extract)
        # Of each layer `[h, c, t]`, of the tokens so far.
        self.layers: list[torch.Tensor | None] = [None] * model.config.num_hidden_layers
        self.nats, self.state_1d = [], None
        _exact_frequencies(model)

    @contextmanager
    def gathering(self):
        hook = self.model.model.register_forward_hook(self._tokens, with_kwargs=True)
        try:
            with _tap(self.model, self._layer):
                yield self
        finally:
            hook.remove()

    @torch.no_grad()
    def prefill(self, ids: list[int] | torch.Tensor):
        """Let the model read `ids` in chunks; its cache."""
        from transformers import DynamicCache

        ids, cache = torch.as_tensor(ids, dtype=torch.long, device=self.model.device).reshape(1, -1), DynamicCache()
        total, chunk = ids.numel(), max(1, self.extract["prefill_chunk_tokens"])
        self.context = self._context(total)
        if total > chunk:
            chunk = min(chunk, max(256, MASK_ELEMENTS // total))
        with self.gathering():
            for part in ids.split(chunk, 1):
                self.model.model(input_ids=part, past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the tokens so far, those of the prefix left out: f32 `[p, channels, t]` and `[globals, t]`."""
        context, device = self._context(self.ids.numel()), self.model.device
        if self.context not in (None, context):
            raise ValueError(f"{context} tokens of a context of {self.context} were read")
        heads_pct = torch.cat([x.to(device) for x in self.layers])
        config = self.model.config
        heads = config.num_key_value_heads
        self.statistics.finish(heads_pct, heads, config.num_attention_heads // heads)
        heads_pct.clamp_(-LOG_LIMIT, LOG_LIMIT)
        t = torch.arange(context, dtype=torch.float64, device=device)
        of = {
            "surprisal": lambda: torch.cat(self.nats)[self.prefix :],
            "position": lambda: t / context,
            "log_position": lambda: t.log1p(),
            "log_remaining": lambda: (context - t).log(),
        }
        rows = [of[name]().float() for name in self.extract["globals"]]
        return heads_pct, torch.stack(rows) if rows else torch.zeros(0, context, device=device)

    def _context(self, total: int) -> int:
        if total <= self.prefix:
            raise ValueError(f"{total} tokens with a prefix of {self.prefix} leave no context")
        return total - self.prefix

    @torch.no_grad()
    def _layer(self, layer: _Layer):
        channels, context = self.extract["channels"], layer.k_hkd.shape[1] - self.prefix
        if layer.start != self.ids.numel():
            raise ValueError(
                f"features need a prefill from an empty cache: layer {layer.index} has {layer.start} cached positions, "
                f"of which {self.ids.numel()} were read here"
            )
        if context <= 0:
            return
        out_hct = self.layers[layer.index]
        if out_hct is None:
            out_hct = torch.zeros(layer.k_hkd.shape[0], len(channels), 0, device=layer.k_hkd.device)
        n = context - out_hct.shape[-1]
        self.layers[layer.index] = out_hct = F.pad(out_hct, (0, n))
        self.statistics.add(layer, self.prefix, out_hct)
        log_norms = lambda x_hkd, floor: x_hkd[:, -n:].float().norm(dim=-1).clamp_min(floor).log()  # noqa: E731
        of = {
            "key_norm": lambda: log_norms(layer.k_hkd, SMALLEST_F64),
            "value_norm": lambda: log_norms(layer.v_hkd, VALUE_NORM_FLOOR),
            "hidden_linear": lambda: self._projected(layer, n),
        }
        for slot, channel in enumerate(channels):
            if channel in of:
                out_hct[:, slot, -n:] = of[channel]()
            elif channel == "key_diff":
                # Of the mean of all keys so far: each forward writes all positions anew.
                out_hct[:, slot] = key_diff(layer.k_hkd, self.prefix)
        if self.requests is not None:
            for start, end, max_ht, mean_ht in self._unrun(context).add(layer):
                for slot, channel in enumerate(channels):
                    if channel in UNRUN_CHANNELS:
                        out_hct[:, slot, start:end] = (max_ht if channel == "replay_unrun" else mean_ht + MEAN_FLOOR).log()

    def _unrun(self, read: int) -> _UnrunReplay:
        """Where the repeat would be depends on the context's length: that stated, or `read`, if all comes in one forward."""
        context = self.context or read
        if self.unrun is None:
            rotary = self.model.model.rotary_emb
            self.unrun = _UnrunReplay(self.requests, rotary.inv_freq, self.prefix, context)
        if self.unrun.context != context or read > context:
            raise ValueError(
                "the channels `replay_unrun` and `replay_unrun_mean` need the context in one forward, or its length "
                f"before the first: `tap(target, prefix, context=...)`; {read} tokens came after {self.unrun.context} were expected"
            )
        return self.unrun

    def _projected(self, layer: _Layer, n: int):
        """The fitted map of what the layer's attention reads, of its last `n` tokens: `[h, n]`."""
        weight_dh, bias_h = (x[layer.index].to(layer.normed_sm.device) for x in self.hidden)
        parts = layer.normed_sm[-n:].split(HIDDEN_ROWS)
        return torch.cat([part_sd.float() @ weight_dh + bias_h for part_sd in parts]).T

    @torch.no_grad()
    def _tokens(self, module, args, kwargs, output):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.shape[0] != 1:
            raise ValueError("features need the context as `input_ids` of one sequence")
        if "surprisal" in self.extract["globals"]:
            # The state at a position predicts the next token; nothing predicts the first one of all.
            state_sd, device = output[0][0], self.model.device
            first = torch.zeros(1) if self.state_1d is None else self._surprisal(self.state_1d, ids[0, :1])
            self.nats += [first.to(device), self._surprisal(state_sd[:-1], ids[0, 1:]).to(device)]
            self.state_1d = state_sd[-1:].clone()
        self.ids = torch.cat([self.ids, ids[0].cpu()])

    def _surprisal(self, state_sd, next_s):
        """Negative log-likelihoods, f32 `[s]`; the LM head is applied to blocks of positions."""
        rows, head = max(1, LOGIT_ELEMENTS // self.model.config.vocab_size), self.model.get_output_embeddings()
        logits = (head(block_sd).float() for block_sd in state_sd.split(rows))
        pairs = zip(logits, next_s.split(rows))
        return torch.cat([F.cross_entropy(x_sv, n_s.to(x_sv.device), reduction="none") for x_sv, n_s in pairs])


def source_sections(extract: dict) -> dict[str, dict]:
    """The models that features come from, in the mapper's order, each with what it is asked for in `channels`."""
    channels = {"proxy": extract["channels"], "target": extract.get("target_channels", list(PREFILL_CHANNELS))}
    known = {"proxy": (*CHANNELS, *REPEAT_CHANNELS), "target": (*CHANNELS, "hidden_linear")}
    sources = extract.get("from", ["proxy"])
    unknown = [f"{s} {c}" for s in sources for c in channels.get(s, "?") if c not in known.get(s, ())]
    if unknown:
        raise ValueError(f"features `{', '.join(unknown)}` are not known here: this file is older than the export")
    return {source: {**extract, "channels": channels[source]} for source in sources}


def join_features(parts: list[tuple[torch.Tensor, torch.Tensor]], sections: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of several sources as the mapper reads them: f32 `[p, channels, t]` and `[globals, t]`.

    Each part has the heads, channels and globals of its source, each section its names of them. Heads of the sources follow one another. Channels are the union of their lists in the order of first mention, 0
    where a source lacks one. Globals are all of the first source and, of the others, the surprisal.
    """
    if len(parts) == 1:
        return parts[0]
    channels = list(dict.fromkeys(channel for section in sections for channel in section["channels"]))
    heads, globals_, device = [], [], parts[0][0].device
    for i, ((heads_pct, globals_ct), section) in enumerate(zip(parts, sections)):
        all_pct = torch.zeros(heads_pct.shape[0], len(channels), heads_pct.shape[2], device=device)
        all_pct[:, [channels.index(channel) for channel in section["channels"]]] = heads_pct.to(device)
        rows = [row for row, name in enumerate(section["globals"]) if i == 0 or name == "surprisal"]
        heads.append(all_pct)
        globals_.append(globals_ct.to(device)[rows])
    return torch.cat(heads), torch.cat(globals_)


class ProxyKV:
    """An export, with its proxy if it reads one: from token ids to features, scores and keep masks of KV pairs.

    `sources` are the models that the mapper reads, `proxy` and `target` in its order, each with what it is asked for.
    """

    def __init__(
        self,
        config: dict,
        mapper: HybridAxialMapper,
        proxy: nn.Module | None = None,
        tokenizer=None,
        hidden: tuple[torch.Tensor, torch.Tensor] | None = None,
        budgets: HeadBudgets | None = None,
    ):
        """`hidden`: weight `[l, d, h]` and bias `[l, h]` that the channel `hidden_linear` of the target needs.

        `budgets` are needed by the policy `pair-budget`.
        """
        self.config, self.mapper, self.proxy, self.tokenizer, self.hidden = config, mapper, proxy, tokenizer, hidden
        self.budgets = budgets
        self._tokenizers = {}
        self.sources = source_sections(config["extract"])
        if ("proxy" in self.sources) != (proxy is not None):
            raise ValueError(f"the mapper reads features of {', '.join(self.sources)}; a proxy was {'' if proxy else 'not '}given")
        if "target" in self.sources and "hidden_linear" in self.sources["target"]["channels"]:
            shape = config["target"]["shape"]
            l, d, h = shape["layers"], shape["hidden"], shape["kv_heads"]
            found = [tuple(x.shape) for x in hidden or ()]
            if found != [(l, d, h), (l, h)]:
                raise ValueError(f"the export's map of hidden states has shapes {found}, expected {[(l, d, h), (l, h)]}")
        if proxy is not None:
            self._check_proxy()

    def _check_proxy(self):
        named, model = self.config["proxy"], self.proxy.eval()
        self.mapper.to(model.device)
        shape, found = named["shape"], model.config
        expected = (shape["layers"], shape["kv_heads"], shape["query_heads"], shape["vocab"])
        found = (found.num_hidden_layers, found.num_key_value_heads, found.num_attention_heads, found.vocab_size)
        if expected != found:
            raise ValueError(
                f"the proxy has layers, KV heads, query heads, vocabulary {found}, the export's `{named['model']}` has {expected}"
            )
        _check_type(model)
        if vocab_hash(self.tokenizer) != named["vocab_hash"]:
            raise ValueError(f"the proxy's vocabulary is not that of `{named['model']}`, which the mapper knows")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        proxy: str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> ProxyKV:
        """Load an export (folder or hub name), and its proxy if it is a source of features.

        `proxy` replaces the name or folder that the export has for it, `dtype` the one it was run in; `device` is where
        proxy and mapper run. Without a proxy, `self.proxy` and `self.tokenizer` are None.
        """
        folder = export_folder(source, revision)
        config = read_config(folder)
        mapper = HybridAxialMapper.from_export(folder, verify=False).to(device or "cpu")
        tensors = read_tensors(folder / "model.safetensors")
        hidden = tuple(tensors[name] for name in ("hidden.weight_lmh", "hidden.bias_lh") if name in tensors)
        budgets = HeadBudgets.read(folder)
        if "proxy" not in source_sections(config["extract"]):
            if proxy is not None:
                raise ValueError(f"the mapper reads the target alone; leave the proxy `{proxy}` out")
            return cls(config, mapper, hidden=hidden or None, budgets=budgets)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        named = config["proxy"]
        pinned = {}
        if proxy is None:
            proxy = named["model"]
            if named["revision"].startswith("local:"):
                if not Path(proxy).is_dir():
                    raise FileNotFoundError(
                        f"the export's proxy is the local folder `{proxy}`, which is not here; "
                        "give its place: `proxy=\"path/to/proxy\"`"
                    )
            else:
                pinned["revision"] = named["revision"]
        dtype = dtype or {"Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16}[named["dtype"]]
        tokenizer = AutoTokenizer.from_pretrained(proxy, trust_remote_code=False, **pinned)
        model = AutoModelForCausalLM.from_pretrained(
            proxy, dtype=dtype, trust_remote_code=False, use_safetensors=True, **pinned
        )
        return cls(config, mapper, model.to(device or "cpu"), tokenizer, hidden or None, budgets)

    @contextmanager
    def tap(self, target: nn.Module, prefix: int, context: int | None = None):
        """Gather the target's features while it prefills, for `target=` of the other methods: no second forward.

            with px.tap(target, prefix) as reading:
                target.model(input_ids=ids, past_key_values=cache)
            keep = px.keep(ids, prefix, 0.1, target=reading)

        The channels `replay_unrun` and `replay_unrun_mean` need the context in one forward, or its length `context`,
        which the prefix is no part of.
        """
        with self._reading_of(target, prefix, context).gathering() as reading:
            yield reading

    def _reading_of(self, target: nn.Module, prefix: int, context: int | None = None) -> Reading:
        if "target" not in self.sources:
            raise ValueError("the mapper reads the proxy alone")
        self.check_target(target)
        section = self.sources["target"]
        return Reading(target, section, prefix, self.hidden, self._requests(section, lambda: self.tokenizer_of(target)), context)

    def _requests(self, section: dict, tokenizer) -> Requests | None:
        """Where the channels of a source need them; `tokenizer` gives its tokenizer."""
        moves = any(channel in UNRUN_CHANNELS for channel in section["channels"])
        return Requests.of(tokenizer(), self.config["label"]) if moves else None

    def tokenizer_of(self, target: nn.Module):
        """The tokenizer beside the target's weights; its vocabulary must be the one that the mapper knows."""
        name = target.config.name_or_path
        if name not in self._tokenizers:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if vocab_hash(tokenizer) != self.config["target"]["vocab_hash"]:
                raise ValueError(f"the vocabulary of `{name}` is not that of the target that the mapper knows")
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    @torch.no_grad()
    def features(
        self, ids: list[int] | torch.Tensor, prefix: int, target: nn.Module | Reading | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw features of the tokens after the first `prefix`: f32 `[p, channels, t]` and `[globals, t]`.

        `target` is needed where it is a source: what `tap` gathered, or the model, which then prefills here.
        """
        parts = [self._features_of(source, ids, prefix, target) for source in self.sources]
        return join_features(parts, list(self.sources.values()))

    def _features_of(self, source: str, ids, prefix: int, target):
        if source == "proxy":
            section = self.sources["proxy"]
            reading = Reading(self.proxy, section, prefix, requests=self._requests(section, lambda: self.tokenizer))
            cache = reading.prefill(ids)
            heads_pct, globals_ct = reading.features()
            if any(channel in REPEAT_CHANNELS for channel in reading.extract["channels"]):
                self._reconstruction(reading.ids, prefix, cache, heads_pct)
            return heads_pct, globals_ct
        if target is None:
            raise ValueError("the mapper reads features of the target: give the model, or what `tap` gathered, as `target=`")
        if not isinstance(target, Reading):
            reading = self._reading_of(target, prefix)
            reading.prefill(ids)
            return reading.features()
        if target.prefix != prefix or target.ids.tolist() != torch.as_tensor(ids).reshape(-1).tolist():
            raise ValueError("the target read other tokens, or another prefix, than these")
        return target.features()

    def _reconstruction(self, ids, prefix: int, cache, heads_pct):
        """Channels for which the proxy repeats its context, chunk by chunk, as KVzip scores do."""
        model, label, channels = self.proxy, self.config["label"], self.sources["proxy"]["channels"]
        original, plus = label["preset"] == "original", label["preset"] == "plus"
        requests = Requests.of(self.tokenizer, label)
        sink = label["sink"] or ("prefix" if original else {"tokens": 4})
        sink = prefix if sink == "prefix" else min(sink["tokens"], prefix)
        context = ids[prefix:].tolist()
        shape = (heads_pct.shape[0], len(context))
        max_pt, mean_pt = (torch.zeros(shape, device=heads_pct.device) for _ in range(2))
        held, heads = cache.get_seq_length(), model.config.num_key_value_heads
        for start, end in requests.chunks(len(context)):

            def see(layer: _Layer, start=start, end=end):
                best_ht, mean_ht = _chunk_scores(layer, sink, prefix + start, prefix + end, plus)
                rows = slice(layer.index * heads, (layer.index + 1) * heads)
                max_pt[rows, start:end], mean_pt[rows, start:end] = best_ht, mean_ht

            with _tap(model, see):
                input_ids = torch.tensor([requests.ids(context, start, end)], device=model.device)
                model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
            cache.crop(held)
        of = {
            "recon_log": lambda: max_pt.log().clamp(-LOG_LIMIT, 0.0),
            "recon_log_odds": lambda: log_odds(max_pt),
            "recon_mean": lambda: (mean_pt + MEAN_FLOOR).log(),
        }
        for slot, channel in enumerate(channels):
            if channel in of:
                heads_pct[:, slot] = of[channel]().clamp(-LOG_LIMIT, LOG_LIMIT)

    @torch.no_grad()
    def scores(
        self, ids: list[int] | torch.Tensor, prefix: int, target: nn.Module | Reading | None = None
    ) -> torch.Tensor:
        """The mapper's scores of the target's KV pairs after the prefix, f32 `[layers, KV heads, t]`."""
        shape, device = self.config["target"]["shape"], self.mapper.standardize.heads_mean.device
        scores_ot = self.mapper.scores(*(x.to(device) for x in self.features(ids, prefix, target)))
        return scores_ot.reshape(shape["layers"], shape["kv_heads"], -1)

    def keep(
        self,
        ids: list[int] | torch.Tensor,
        prefix: int,
        retention: float,
        policy: str = "pair",
        target: nn.Module | Reading | None = None,
    ) -> torch.Tensor:
        """Which of the target's KV pairs stay, bool `[layers, KV heads, prefix + t]`; the prefix always does."""
        keep_lht = keep_mask(self.scores(ids, prefix, target), policy, retention, self.budgets)
        return torch.cat([torch.ones(*keep_lht.shape[:2], prefix, dtype=torch.bool, device=keep_lht.device), keep_lht], -1)

    def check_target(self, model: nn.Module) -> None:
        """Refuse a model that is not shaped as the target whose scores the mapper knows."""
        named = self.config["target"]
        shape, found = named["shape"], model.config
        expected = {
            "num_hidden_layers": shape["layers"],
            "num_key_value_heads": shape["kv_heads"],
            "num_attention_heads": shape["query_heads"],
            "hidden_size": shape["hidden"],
            "vocab_size": shape["vocab"],
        }
        found = {name: getattr(found, name, None) for name in expected}
        if found != expected:
            raise ValueError(f"the mapper was trained for `{named['model']}` with {expected}; this model has {found}")
        if "target" in self.sources:
            _check_type(model)


# ---------------------------------------------------------------------------------------------------------------------
# Eviction from a transformers cache


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


@lru_cache(None)
def _ragged_layer():
    from transformers.cache_utils import DynamicLayer

    class RaggedLayer(DynamicLayer):
        def __init__(self, keys: RaggedHeads, values: RaggedHeads):
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, key_states, value_states, cache_kwargs=None):
            self.keys, self.values = self.keys.appended(key_states), self.values.appended(value_states)
            return self.keys, self.values

    return RaggedLayer


def _serve_ragged(implementation: str) -> None:
    """Let an attention implementation of transformers read pruned caches. It reads all others as before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
        cache.layers[index] = _ragged_layer()(*(RaggedHeads.of(x[0], keep_hk) for x in (held.keys, held.values)))
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


# ---------------------------------------------------------------------------------------------------------------------
# The press (kvpress)


def _make_press():
    from kvpress import BasePress

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
            `pair` (all pairs compete), `pair-uniform` (the positions of each head), `pair-budget` (the same, with as many
            of each head as the export's budgets say), `token` (whole positions).
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
        policy: str = "pair"
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
            self.kept = self._proxykv.keep(ids, prefix, retention, self.policy, reading)
            self.bytes = evict(model, cache, self.kept)

    ProxyKVPress.__qualname__ = "ProxyKVPress"
    ProxyKVPress.__module__ = __name__
    return ProxyKVPress


def __getattr__(name: str):
    # The press is a class of kvpress; everything else here works without it.
    if name == "ProxyKVPress":
        globals()[name] = _make_press()
        return globals()[name]
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python proxykv.py EXPORT   (folder or hub name; checks the mapper against its parity vectors)")
    difference = check_parity(sys.argv[1])
    print(f"{sys.argv[1]}: largest difference from the parity vectors {difference:.1e}")
    sys.exit(difference > 1e-5)
