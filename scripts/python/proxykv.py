"""Exports of proxykv-train in Python: mapper, proxy features, keep masks, and a press for kvpress.

    from proxykv import ProxyKVPress
    press = ProxyKVPress("path/or/hub-name/of/an/export", retention=0.1)

One file without our binary: torch and safetensors for the mapper, transformers to run the proxy, kvpress for
the press, huggingface_hub for a hub name; each is imported when it is needed. An export is JSON and safetensors:
nothing is unpickled and no code is downloaded.

The numbers are those of the Rust crates `mapper`, `extract`, `score` and `prune`, in the same order of operations;
what each means is written there.

Dimension key: l layer, h KV head, g query heads per KV head, q query head, p proxy KV head (layers x heads,
layer-major), o target KV head (same), c channel, t context position, k cached position, r row (query) of a block,
s new token, d head_dim or width, b batch, m width of stage 2, n attention head of the mapper.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

EXPORT_VERSION = 2
POLICIES = ("pair", "pair-uniform", "token")


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

    files = ["config.json", "model.safetensors", "parity.safetensors"]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=files))


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
    """From a proxy's raw features to one score per KV pair of the target; higher means keep.

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
        # Learned numbers of the loss are of no use here.
        tensors = read_tensors(folder / "model.safetensors")
        mapper.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("loss.")})
        return mapper.eval()

    def forward(self, heads_bpct: torch.Tensor, globals_bct: torch.Tensor) -> torch.Tensor:
        """Raw features `[b, proxy heads, channels, t]` and `[b, globals, t]` to f32 `[b, outputs, t]`."""
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


def kept_count(n: int, retention: float) -> int:
    """How many of `n` KV pairs a retention ratio keeps: rounded half up, at least one."""
    if not 0.0 < retention <= 1.0:
        raise ValueError(f"a retention ratio is the kept share of KV pairs, 0 < ratio <= 1, found {retention}")
    exact = n * retention
    count = math.floor(exact)
    return min(n, max(min(n, 1), count + (exact - count >= 0.5)))


def keep_mask(scores_lht: torch.Tensor, policy: str, retention: float) -> torch.Tensor:
    """The KV pairs that stay, bool of the scores' shape `[.., positions]`; of equal scores the lower index.

    `pair`: all pairs compete; `pair-uniform`: the positions of each head; `token`: the positions, by the mean over
    heads of their rank. The count is exact: `kept_count` of what competes.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy `{policy}` is not known; expected one of {', '.join(POLICIES)}")
    shape, t = scores_lht.shape, scores_lht.shape[-1]
    if policy == "pair":
        return top_mask(scores_lht.reshape(1, -1), kept_count(scores_lht.numel(), retention)).reshape(shape)
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
# Features of the proxy (crates/extract, crates/score)

LOG_LIMIT = 16.0
LOG_ODDS_LIMIT = 14.0
MEAN_FLOOR = 1e-7
VALUE_NORM_FLOOR = 1e-4
SMALLEST_F64 = 2.2250738585072014e-308
# Most logits held at once while the surprisal is taken.
LOGIT_ELEMENTS = 1 << 24
# Elements of the mask that transformers makes for a prefill chunk behind a cache.
MASK_ELEMENTS = 1 << 28
QUOTED_TOKENS = 8
# Architectures whose attention modules the hooks know.
MODEL_TYPES = ("llama", "qwen2", "qwen3")


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
    """Give a proxy the rotary frequencies of the Rust one: computed in f64, rounded to f32 once.

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

    def __init__(self, extract: dict, prefix: int, context: int):
        channels = extract["channels"]
        self.prefix, self.context = prefix, context
        self.near, self.window = extract["min_distance"], extract["window_tokens"]
        self.last, self.block_tokens = extract["last_queries"], max(1, extract["block_tokens"])
        self.stride = extract["whole_range_stride"]
        at = lambda name: channels.index(name) if name in channels else None  # noqa: E731
        slots = {reach: tuple(map(at, names)) for reach, names in self.REACHES.items()}
        # The window comes last: it blanks what is out of its reach.
        self.slots = {reach: pair for reach, pair in slots.items() if pair != (None, None)}

    def add(self, q_qsd, k_hkd, start: int, gathered_hct):
        """Fold the attention of new queries into maxima and sums; no matrix of all queries times keys is held."""
        if not self.slots:
            return
        n_queries, s, d = q_qsd.shape
        end = start + s
        k_hdk = k_hkd.float().transpose(1, 2)
        scale = 1.0 / math.sqrt(d)
        row = max(start, self.prefix)
        while row < end:
            budget = _block_elements(q_qsd.device) // (n_queries * end)
            stop = min(end, row + max(1, min(self.block_tokens, budget)))
            q_qrd = q_qsd[:, row - start : stop - start].float() * scale
            self._block(q_qrd, k_hdk, row, stop, gathered_hct)
            row = stop

    def _block(self, q_qrd, k_hdk, row: int, stop: int, gathered_hct):
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
        for reach, slots in self.slots.items():
            if reach == "all":
                skipped = -first % self.stride
                if skipped < n:
                    _gather(slots, weights_hgrt[:, :, skipped :: self.stride], 0, columns, gathered_hct)
            elif reach == "last":
                start = max(first, self.context - self.last)
                if start < end:
                    _gather(slots, weights_hgrt[:, :, start - first :], 0, columns, gathered_hct)
            else:
                start = max(0, first - self.window)
                if start < columns:
                    too_far = min(columns, max(0, end - self.window))
                    self._zero(weights_hgrt, first, start, too_far, lambda x: x > self.window)
                    _gather(slots, weights_hgrt, start, columns, gathered_hct)

    @staticmethod
    def _zero(weights_hgrt, first: int, start: int, end: int, blank):
        if start >= end:
            return
        device = weights_hgrt.device
        row_r = torch.arange(first, first + weights_hgrt.shape[2], device=device)
        distance_rt = row_r.unsqueeze(1) - torch.arange(start, end, device=device)
        weights_hgrt[..., start:end].masked_fill_(blank(distance_rt), 0.0)

    def finish(self, gathered_hct, group: int):
        """Maxima to logs, sums to logs of means, in place."""
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
                gathered_hct[:, maximum].log_().clamp_(-LOG_LIMIT, LOG_LIMIT)
            if mean is not None:
                counts = ((end - start).clamp_min(0) * group).clamp_min(1).float().to(gathered_hct.device)
                gathered_hct[:, mean].div_(counts).add_(MEAN_FLOOR).log_().clamp_(-LOG_LIMIT, LOG_LIMIT)


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


class Frame(NamedTuple):
    """Tokens around a user's text, by the chat template."""

    prefix: list[int]
    switch: list[int]

    @classmethod
    def of(cls, tokenizer) -> Frame:
        if getattr(tokenizer, "chat_template", None) is None:
            prefix, switch = "", "\n"
        else:
            mark = "\u0001"
            message = [{"role": "user", "content": mark}]
            options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
            prefix, _, switch = tokenizer.apply_chat_template(message, **options).partition(mark)
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        return cls(encode(prefix), encode(switch))


def vocab_hash(tokenizer) -> str:
    """SHA-256 of all tokens with their ids, as an export names it."""
    vocab = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class ProxyKV:
    """An export with its proxy: from token ids to features, scores and keep masks of the target's KV pairs."""

    def __init__(self, config: dict, mapper: HybridAxialMapper, proxy: nn.Module, tokenizer):
        self.config, self.proxy, self.tokenizer = config, proxy.eval(), tokenizer
        self.mapper = mapper.to(proxy.device)
        _exact_frequencies(proxy)
        shape, found = config["proxy"]["shape"], proxy.config
        expected = (shape["layers"], shape["kv_heads"], shape["query_heads"], shape["vocab"])
        found = (found.num_hidden_layers, found.num_key_value_heads, found.num_attention_heads, found.vocab_size)
        if expected != found:
            raise ValueError(
                f"the proxy has layers, KV heads, query heads, vocabulary {found}, the export's "
                f"`{config['proxy']['model']}` has {expected}"
            )
        if proxy.config.model_type not in MODEL_TYPES:
            raise ValueError(f"proxies of type `{proxy.config.model_type}` are not supported, only {', '.join(MODEL_TYPES)}")
        if vocab_hash(tokenizer) != config["proxy"]["vocab_hash"]:
            raise ValueError(f"the proxy's vocabulary is not that of `{config['proxy']['model']}`, which the mapper knows")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        proxy: str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> ProxyKV:
        """Load an export (folder or hub name) and its proxy.

        `proxy` replaces the name or folder that the export has for it; `dtype` the one it was run in.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = export_folder(source, revision)
        config = read_config(folder)
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
        return cls(config, HybridAxialMapper.from_export(folder, verify=False), model.to(device or "cpu"), tokenizer)

    @torch.no_grad()
    def features(self, ids: list[int] | torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw features of the tokens behind the first `prefix`: f32 `[p, channels, t]` and `[globals, t]`."""
        from transformers import DynamicCache

        model, extract = self.proxy, self.config["extract"]
        ids = torch.as_tensor(ids, dtype=torch.long, device=model.device).reshape(-1)
        channels, total = extract["channels"], ids.numel()
        context = total - prefix
        if context <= 0:
            raise ValueError(f"{total} tokens with a prefix of {prefix} leave no context")
        heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
        heads_pct = torch.zeros(layers * heads, len(channels), context, device=model.device)
        statistics = _QueryStatistics(extract, prefix, context)

        def see(layer: _Layer):
            out_hct = heads_pct[layer.index * heads : (layer.index + 1) * heads]
            statistics.add(layer.q_qsd, layer.k_hkd, layer.start, out_hct)
            start = max(layer.start, prefix)
            norms = (("key_norm", layer.k_hkd, SMALLEST_F64), ("value_norm", layer.v_hkd, VALUE_NORM_FLOOR))
            for channel, vectors, floor in norms:
                if channel in channels and vectors.shape[1] > start:
                    norm_ht = vectors[:, start:].float().norm(dim=-1).clamp_min(floor).log()
                    out_hct[:, channels.index(channel), start - prefix : vectors.shape[1] - prefix] = norm_ht

        cache = DynamicCache()
        nats_t = torch.zeros(context, device=model.device)
        chunk = max(1, extract["prefill_chunk_tokens"])
        if total > chunk:
            chunk = min(chunk, max(256, MASK_ELEMENTS // total))
        with _tap(model, see):
            for start in range(0, total, chunk):
                hidden = model.model(
                    input_ids=ids[start : start + chunk].unsqueeze(0), past_key_values=cache, use_cache=True
                ).last_hidden_state[0]
                if "surprisal" in extract["globals"]:
                    self._surprisal(hidden, ids, start, prefix, nats_t)
        statistics.finish(heads_pct, model.config.num_attention_heads // heads)
        if any(channel.startswith("recon_") for channel in channels):
            self._reconstruction(ids, prefix, cache, heads_pct)
        heads_pct.clamp_(-LOG_LIMIT, LOG_LIMIT)

        t = torch.arange(context, dtype=torch.float64, device=model.device)
        of = {
            "surprisal": lambda: nats_t,
            "position": lambda: t / context,
            "log_position": lambda: t.log1p(),
            "log_remaining": lambda: (context - t).log(),
        }
        rows = [of[name]().float() for name in extract["globals"]]
        return heads_pct, torch.stack(rows) if rows else torch.zeros(0, context, device=model.device)

    def _surprisal(self, hidden_sm, ids, start: int, prefix: int, nats_t):
        """Negative log-likelihood of each context token; the LM head is applied to blocks of positions."""
        head = self.proxy.get_output_embeddings()
        end = min(start + hidden_sm.shape[0], ids.numel() - 1)
        at, rows = max(start, prefix - 1, 0), max(1, LOGIT_ELEMENTS // self.proxy.config.vocab_size)
        while at < end:
            n = min(rows, end - at)
            logits_sv = head(hidden_sm[at - start : at - start + n]).float()
            nats_s = F.cross_entropy(logits_sv, ids[at + 1 : at + 1 + n], reduction="none")
            nats_t[at + 1 - prefix : at + 1 - prefix + n] = nats_s
            at += n

    def _reconstruction(self, ids, prefix: int, cache, heads_pct):
        """Channels for which the proxy repeats its context, chunk by chunk, as KVzip scores do."""
        model, label, channels = self.proxy, self.config["label"], self.config["extract"]["channels"]
        original, plus = label["preset"] == "original", label["preset"] == "plus"
        size = label["chunk_tokens"] or (2000 if original else 2048)
        sink = label["sink"] or ("prefix" if original else {"tokens": 4})
        sink = prefix if sink == "prefix" else min(sink["tokens"], prefix)
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        first = encode("\n\nRepeat the previous context exactly.")
        later = encode("\n\nRepeat the part of the previous context exactly, starting with" + " " * original)
        switch, context = Frame.of(self.tokenizer).switch, ids[prefix:].tolist()
        shape = (heads_pct.shape[0], len(context))
        max_pt, mean_pt = (torch.zeros(shape, device=heads_pct.device) for _ in range(2))
        held, heads = cache.get_seq_length(), model.config.num_key_value_heads
        for start in range(0, len(context), size):
            end = min(start + size, len(context))
            before = context[max(0, start - min(size, QUOTED_TOKENS)) : start]
            tokens = (later if start else first) + before + switch + context[start:end]

            def see(layer: _Layer, start=start, end=end):
                best_ht, mean_ht = _chunk_scores(layer, sink, prefix + start, prefix + end, plus)
                rows = slice(layer.index * heads, (layer.index + 1) * heads)
                max_pt[rows, start:end], mean_pt[rows, start:end] = best_ht, mean_ht

            with _tap(model, see):
                input_ids = torch.tensor([tokens], device=model.device)
                model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
            cache.crop(held)
        of = {
            "recon_log": lambda: max_pt.log().clamp(-LOG_LIMIT, 0.0),
            "recon_log_odds": lambda: log_odds(max_pt),
            "recon_mean": lambda: (mean_pt + MEAN_FLOOR).log(),
        }
        for slot, channel in enumerate(channels):
            if channel in of:
                heads_pct[:, slot] = of[channel]()

    @torch.no_grad()
    def scores(self, ids: list[int] | torch.Tensor, prefix: int) -> torch.Tensor:
        """The mapper's scores of the target's KV pairs behind the prefix, f32 `[layers, KV heads, t]`."""
        shape = self.config["target"]["shape"]
        scores_ot = self.mapper.scores(*self.features(ids, prefix))
        return scores_ot.reshape(shape["layers"], shape["kv_heads"], -1)

    def keep(self, ids: list[int] | torch.Tensor, prefix: int, retention: float, policy: str = "pair") -> torch.Tensor:
        """Which of the target's KV pairs stay, bool `[layers, KV heads, prefix + t]`; the prefix always does."""
        keep_lht = keep_mask(self.scores(ids, prefix), policy, retention)
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


# ---------------------------------------------------------------------------------------------------------------------
# Eviction from a transformers cache


def evict(model: nn.Module, cache, keep_lhk: torch.Tensor) -> None:
    """Evict what `keep_lhk` (bool `[layers, KV heads, cached positions]`) leaves out, of a cache of batch 1.

    Where all heads keep equally many pairs (policies `pair-uniform` and `token`), the cache really shrinks. Where
    they do not (`pair`), it keeps its size and the attention patch that importing kvpress installs hides the evicted
    pairs, as with its AdaKV and KVzip presses. Go on at position `keep_lhk.shape[-1]`.
    """
    counts = keep_lhk.sum(-1)
    shrinks = bool((counts == counts[0, 0]).all()) and not hasattr(cache.layers[0], "_quantized_keys")
    if not shrinks and model.config._attn_implementation == "eager":
        raise ValueError("policy `pair` needs an attention implementation other than `eager`, such as `sdpa`")
    for index, layer in enumerate(model.model.layers):
        held = cache.layers[index]
        layer.self_attn.masked_key_indices = None
        if shrinks:
            keep_hk = keep_lhk[index].to(held.keys.device)
            at = keep_hk.nonzero()[:, 1].view(keep_hk.shape[0], -1)
            at = at[None, :, :, None].expand(1, -1, -1, held.keys.shape[-1])
            held.keys, held.values = held.keys.gather(2, at), held.values.gather(2, at)
        else:
            device = next(layer.self_attn.parameters()).device
            head, position = (~keep_lhk[index].to(device)).nonzero(as_tuple=True)
            layer.self_attn.masked_key_indices = (torch.zeros_like(head), head, position)


# ---------------------------------------------------------------------------------------------------------------------
# The press (kvpress)


def _make_press():
    from kvpress import BasePress

    @dataclass
    class ProxyKVPress(BasePress):
        """Evicts what an export's mapper scores lowest, by one prefill of the small proxy.

        The target prefills as usual; when the context manager is left, the proxy reads the same tokens, the mapper
        scores the target's KV pairs, and the lowest are evicted. Tokens of the chat template before the user's text
        are never evicted and do not count. Batches hold one sequence.

        Parameters
        ----------
        export : str
            Folder or hub name of an export of proxykv-train.
        compression_ratio : float
            Share of the context's KV pairs to *remove*, as everywhere in kvpress.
        policy : str
            `pair` (all pairs compete), `pair-uniform` (the positions of each head), `token` (whole positions).
        proxy : str, optional
            Folder or hub name of the proxy, if not the one that the export names.
        revision : str, optional
            Revision of the export on the hub.
        device : str, optional
            Where the proxy runs; the target's device by default.
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
            self._proxykv.check_target(model)

        def prefix_of(self, model, ids: list[int]) -> int:
            """How many of the first tokens are the chat template's."""
            name = model.config.name_or_path
            if name not in self._prefixes:
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                if vocab_hash(tokenizer) != self._proxykv.config["target"]["vocab_hash"]:
                    raise ValueError(f"the vocabulary of `{name}` is not that of the target that the mapper knows")
                prefix = Frame.of(tokenizer).prefix
                # Without a template kvpress puts the start token there.
                self._prefixes[name] = prefix or [tokenizer.bos_token_id]
            same = (a == b for a, b in zip(ids, self._prefixes[name]))
            return next((i for i, equal in enumerate(same) if not equal), min(len(ids), len(self._prefixes[name])))

        @contextmanager
        def __call__(self, model):
            self.post_init_from_model(model)
            seen, caches = [], []

            def before(module, args, kwargs):
                ids = kwargs.get("input_ids", args[0] if args else None)
                cache = kwargs.get("past_key_values")
                if ids is None or ids.shape[0] != 1:
                    raise ValueError("ProxyKVPress needs the context as `input_ids` of one sequence")
                if cache is None or (not seen and cache.get_seq_length() > 0):
                    raise ValueError("ProxyKVPress needs an empty cache to prefill, given as `past_key_values`")
                seen.extend(ids[0].tolist())
                caches[:] = [cache]

            hook = model.model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
            if seen and self.compression_ratio > 0:
                self._evict(model, caches[0], seen)

        def _evict(self, model, cache, ids: list[int]):
            # 1 - 0.95 is not 0.05 to the last bit, which a count may round by.
            retention = round(1.0 - self.compression_ratio, 12)
            prefix = self.prefix_of(model, ids)
            if prefix == len(ids):
                return
            self.kept = self._proxykv.keep(ids, prefix, retention, self.policy)
            evict(model, cache, self.kept)

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
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python proxykv.py EXPORT   (folder or hub name; checks the mapper against its parity vectors)")
    difference = check_parity(sys.argv[1])
    print(f"{sys.argv[1]}: largest difference from the parity vectors {difference:.1e}")
    sys.exit(difference > 1e-5)
