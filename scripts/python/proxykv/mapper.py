"""The mapper in plain torch (crates/mapper): tensors in, tensors out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .export import export_folder, read_config

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
        # Version 2 holds the learned numbers of the loss too, and the map of hidden states makes a feature.
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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@torch.no_grad()
def check_parity(source: str | Path, revision: str | None = None) -> float:
    """Largest difference between this mapper and the export's parity vectors, which the Rust mapper wrote."""
    folder = export_folder(source, revision)
    parity = read_tensors(folder / "parity.safetensors")
    scores = HybridAxialMapper.from_export(folder).scores(parity["heads_pct"], parity["globals_ct"])
    return (scores - parity["scores_ot"]).abs().max().item()
