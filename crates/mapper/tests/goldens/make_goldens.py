"""Goldens for the mapper and the loss of crates/train: an independent PyTorch implementation in float64.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 numpy==2.* safetensors
    venv/bin/python make_goldens.py

writes one <case>.safetensors per case and cases.json next to this file. Everything is written the
plain way (attention over all pairs of positions, queries, keys and values held per position), so
that it shares no rearrangement with what it checks. Weights go by the names of the parameters.
"""

import hashlib
import json
import math
import pathlib
import struct

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)

HERE = pathlib.Path(__file__).parent
BATCH, PROXY, CHANNELS, GLOBALS, OUTPUTS = 2, 3, 2, 2, 5
SMALL = dict(
    head_width=4, width=8, feed_forward=2, dilations=[1, 3], kernel=5, attention_blocks=[], attention_heads=2,
    attention_window=4, cross_width=6, cross_heads=2, linear_skip=True, ridge=1e-4,
)
LOSS = dict(
    binary=1.0, binary_ratios=[0.3, 0.1, 0.05], value_mse=0.3, fine=0.3, fine_pairs=dict(top=0.2, pairs=50),
    **{"global": 0.1}, cosine=0.3,
)
ADAMW = dict(lr=2e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.02, steps=10)
PAIRS_SEED = 77
CASES = {
    "hybrid-axial": (dict(SMALL, variant="hybrid-axial"), 23),
    "hybrid-axial-attention": (dict(SMALL, variant="hybrid-axial", attention_blocks=[1]), 23),
    "conv": (dict(SMALL, variant="conv", kernel=3), 17),
    "mlp": (dict(SMALL, variant="mlp", linear_skip=False), 9),
    "linear": (dict(SMALL, variant="linear"), 9),
    # Shorter than any kernel reaches.
    "two-positions": (dict(SMALL, variant="hybrid-axial", attention_blocks=[0]), 2),
    "one-position": (dict(SMALL, variant="hybrid-axial", attention_blocks=[0]), 1),
}


def shapes(s):
    """Name and shape of every parameter, in the mapper's order."""
    flat, d, m, n = PROXY * CHANNELS + GLOBALS, s["head_width"], s["width"], s["cross_heads"]
    e = s["cross_width"] // n
    out = {}

    def linear(name, i, o):
        out[name + ".weight"], out[name + ".bias"] = (o, i), (o,)

    def norm(name, w):
        out[name + ".weight"], out[name + ".bias"] = (w,), (w,)

    def conv(name, w):
        out[name + ".weight"], out[name + ".bias"] = (w, w, s["kernel"]), (w,)

    if s["linear_skip"] or s["variant"] == "linear":
        linear("skip", flat, OUTPUTS)
    if s["variant"] == "mlp":
        linear("mlp.hidden0", flat, m * s["feed_forward"])
        linear("mlp.hidden1", m * s["feed_forward"], m * s["feed_forward"])
        linear("output", m * s["feed_forward"], OUTPUTS)
    if s["variant"] == "hybrid-axial":
        linear("stage1.input", CHANNELS, d)
        out["stage1.head_embedding"] = (PROXY, d)
        conv("stage1.conv0", d)
        conv("stage1.conv1", d)
        norm("stage1.norm", d)
    if s["variant"] in ("hybrid-axial", "conv"):
        linear("stage2.input", PROXY * d + GLOBALS if s["variant"] == "hybrid-axial" else flat, m)
        for i in range(len(s["dilations"])):
            b = f"stage2.block{i}."
            norm(b + "conv_norm", m)
            conv(b + "conv", m)
            if i in s["attention_blocks"]:
                norm(b + "attention_norm", m)
                linear(b + "attention.qkv", m, 3 * m)
                linear(b + "attention.output", m, m)
            norm(b + "feed_forward_norm", m)
            linear(b + "feed_forward.up", m, m * s["feed_forward"])
            linear(b + "feed_forward.down", m * s["feed_forward"], m)
        norm("stage2.norm", m)
    if s["variant"] == "hybrid-axial":
        linear("stage3.context", m, d)
        out["stage3.token_embedding"] = (PROXY + 1, d)
        out["stage3.query"] = (n, OUTPUTS, e)
        out["stage3.key.weight"] = (n, e, d)
        out["stage3.value.weight"] = (n, e, d)
        out["stage3.readout"] = (n, OUTPUTS, e)
    if s["variant"] in ("hybrid-axial", "conv"):
        linear("output", m, OUTPUTS)
    out["loss.binary_log_scale"] = out["loss.binary_offset"] = (len(LOSS["binary_ratios"]),)
    out["loss.global_log_scale"] = ()
    return out


def forward(s, w, stats, heads, globals_):
    """heads [b, p, c, t], globals [b, g, t] to scores [b, o, t]."""
    lin = lambda name, x: x @ w[name + ".weight"].T + w[name + ".bias"]
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)

    def conv(name, x, dilation):  # [b, t, c], one tap after another
        weight, y = w[name + ".weight"], w[name + ".bias"].expand_as(x).clone()
        t, k = x.shape[1], weight.shape[2]
        for tap in range(k):
            shift = (tap - k // 2) * dilation
            a, b = max(0, -shift), min(t, t - shift)
            if a < b:
                y[:, a:b] = y[:, a:b] + x[:, a + shift : b + shift] @ weight[:, :, tap].T
        return y

    def rotary(x):  # complex numbers, absolute positions
        half = x.shape[-1] // 2
        angle = torch.outer(torch.arange(x.shape[-2]).double(), 10000.0 ** (-torch.arange(half).double() / half))
        z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    def attention(name, x):
        b, t, m = x.shape
        q, k, v = (z.view(b, t, s["attention_heads"], -1).transpose(1, 2) for z in lin(name + ".qkv", x).split(m, -1))
        logits = rotary(q) @ rotary(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        far = (torch.arange(t)[:, None] - torch.arange(t)[None]).abs() > s["attention_window"]
        y = logits.masked_fill(far, -math.inf).softmax(-1) @ v
        return lin(name + ".output", y.transpose(1, 2).reshape(b, t, m))

    def context(x):
        x = lin("stage2.input", x)
        for i, dilation in enumerate(s["dilations"]):
            b = f"stage2.block{i}."
            x = x + F.gelu(conv(b + "conv", norm(b + "conv_norm", x), dilation))
            if i in s["attention_blocks"]:
                x = x + attention(b + "attention", norm(b + "attention_norm", x))
            x = x + lin(b + "feed_forward.down", F.gelu(lin(b + "feed_forward.up", norm(b + "feed_forward_norm", x))))
        return norm("stage2.norm", x)

    x = ((heads.double() - stats["heads_mean"][:, :, None]) / stats["heads_std"][:, :, None]).clamp(-6, 6)
    g = ((globals_.double() - stats["globals_mean"][:, None]) / stats["globals_std"][:, None]).clamp(-6, 6)
    x, g = x.permute(0, 3, 1, 2), g.transpose(1, 2)  # [b, t, p, c], [b, t, g]
    flat = torch.cat([x.flatten(2), g], -1)
    y = lin("skip", flat) if "skip.weight" in w else 0.0
    if s["variant"] == "mlp":
        y = y + lin("output", F.gelu(lin("mlp.hidden1", F.gelu(lin("mlp.hidden0", flat)))))
    if s["variant"] == "conv":
        y = y + lin("output", context(flat))
    if s["variant"] == "hybrid-axial":
        tokens = []
        for p in range(PROXY):  # each head on its own
            h = F.gelu(lin("stage1.input", x[:, :, p]) + w["stage1.head_embedding"][p])
            h = h + F.gelu(conv("stage1.conv0", h, 1))
            h = h + F.gelu(conv("stage1.conv1", h, 2))
            tokens.append(norm("stage1.norm", h))
        c = context(torch.cat(tokens + [g], -1))
        tokens = torch.stack(tokens + [lin("stage3.context", c)], 2) + w["stage3.token_embedding"]
        k = torch.einsum("btpd,ned->btpne", tokens, w["stage3.key.weight"])
        v = torch.einsum("btpd,ned->btpne", tokens, w["stage3.value.weight"])
        weights = (torch.einsum("noe,btpne->btnop", w["stage3.query"], k) / math.sqrt(k.shape[-1])).softmax(-1)
        attended = torch.einsum("btnop,btpne->btnoe", weights, v)
        y = y + lin("output", c) + torch.einsum("btnoe,noe->bto", attended, w["stage3.readout"])
    return y.transpose(1, 2)


def chacha8(seed32):
    """32-bit words of ChaCha with 8 rounds, 64-bit counter, stream 0 (rand_chacha's ChaCha8Rng)."""
    key, block = struct.unpack("<8I", seed32), 0
    rot = lambda v, n: ((v << n) | (v >> (32 - n))) & 0xFFFFFFFF
    while True:
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, block & 0xFFFFFFFF, block >> 32, 0, 0]
        x = list(start)

        def quarter(a, b, c, d):
            for i, j, k, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[i] = (x[i] + x[j]) & 0xFFFFFFFF
                x[k] = rot(x[k] ^ x[i], n)

        for _ in range(4):
            for q in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
                quarter(*q)
            for q in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
                quarter(*q)
        yield from ((a + b) & 0xFFFFFFFF for a, b in zip(x, start))
        block += 1


def draws(name, context, top, pairs):
    digest = hashlib.sha256(struct.pack("<QQ", PAIRS_SEED, context) + name.encode()).digest()
    words = chacha8(digest)
    return [(next(words) * top) >> 32 for _ in range(pairs)]


def top_set(y, k):
    """The k largest; of equal ones the lower index."""
    return torch.from_numpy(np.argsort(-y.numpy(), kind="stable")[:k].copy())


def loss(w, stats, scores, y):
    """Terms, each the mean over contexts."""
    mean, std = stats["label_mean"], stats["label_std"]
    terms = {k: 0.0 for k in ("binary", "value_mse", "fine", "global", "cosine")}
    for b in range(y.shape[0]):
        s, t = scores[b].flatten(), y[b].flatten()
        n, v = t.numel(), torch.sigmoid(t)
        for i, rho in enumerate(LOSS["binary_ratios"]):
            label = torch.zeros(n)
            label[top_set(t, max(1, math.floor(n * rho + 0.5)))] = 1.0
            p = torch.sigmoid(w["loss.binary_log_scale"][i].exp() * s + w["loss.binary_offset"][i])
            cross = -(label * p.log() + (1 - label) * (1 - p).log()).mean()
            entropy = -(rho * math.log(rho) + (1 - rho) * math.log(1 - rho))
            terms["binary"] += cross / entropy / len(LOSS["binary_ratios"])
        terms["value_mse"] += ((s - (t - mean) / std) ** 2 * (0.1 + v)).sum() / (0.1 + v).sum()
        k = int(n * LOSS["fine_pairs"]["top"])
        top = top_set(t, k)
        i, j = (top[draws(name, b, k, LOSS["fine_pairs"]["pairs"])] for name in ("fine-left", "fine-right"))
        gap = t[i] - t[j]
        terms["fine"] += (torch.log1p(torch.exp(-4 * (s[i] - s[j]) * gap.sign())) * gap.abs().clamp(max=2)).mean()
        share = v / v.sum()
        terms["global"] += (share * (share / (w["loss.global_log_scale"].exp() * s).softmax(0)).log()).sum()
        u = torch.sigmoid(s * std + mean)
        terms["cosine"] += 1 - (u @ v) / (u.norm() * v.norm())
    terms = {k: x / y.shape[0] for k, x in terms.items()}
    return sum(LOSS[k] * x for k, x in terms.items()), terms


def main():
    cases = {}
    for index, (name, (section, positions)) in enumerate(CASES.items()):
        rng = np.random.default_rng(100 + index)
        f32 = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        stats = {
            "heads_mean": f32(PROXY, CHANNELS), "heads_std": f32(PROXY, CHANNELS).abs() + 0.2,
            "globals_mean": f32(GLOBALS), "globals_std": f32(GLOBALS).abs() + 0.2,
            "label_mean": torch.tensor(-3.25, dtype=torch.float32), "label_std": torch.tensor(2.5, dtype=torch.float32),
        }
        # float16 features in the first case; a few far out, where the clamp acts.
        heads = f32(BATCH, PROXY, CHANNELS, positions).half() if index == 0 else f32(BATCH, PROXY, CHANNELS, positions)
        heads[0, 0, 0, :2] = 40.0
        globals_ = f32(BATCH, GLOBALS, positions).to(heads.dtype)
        y = ((f32(BATCH, OUTPUTS, positions) * 2.5 - 3.25) * 4).round() / 4  # steps of 1/4: many ties
        params = {}
        for key, shape in shapes(section).items():
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            x = f32(*shape) * (0.6 / math.sqrt(fan) if len(shape) > 1 else 0.3)
            params[key] = (x + 1.0) if key.endswith("norm.weight") or key.endswith("log_scale") else x
        tensors = {"input.heads": heads, "input.globals": globals_, "input.y": y}
        tensors |= {"standardize." + k: x for k, x in stats.items()}
        tensors |= {"param." + k: x for k, x in params.items()}
        wide_stats = {k: x.double() for k, x in stats.items()}
        w = {k: x.double().requires_grad_() for k, x in params.items()}
        groups = [
            dict(params=[x for x in w.values() if x.dim() >= 2], weight_decay=ADAMW["weight_decay"]),
            dict(params=[x for x in w.values() if x.dim() < 2], weight_decay=0.0),
        ]
        betas = (ADAMW["beta1"], ADAMW["beta2"])
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=ADAMW["lr"], betas=betas, eps=ADAMW["eps"])
        totals = []
        for step in range(ADAMW["steps"]):
            optimizer.zero_grad(set_to_none=True)
            scores = forward(section, w, wide_stats, heads, globals_)
            scores.retain_grad()
            total, terms = loss(w, wide_stats, scores, y.double())
            total.backward()
            totals.append(total.item())
            if step == 0:
                # Where the network ends and the loss begins: each is held against it by itself.
                tensors["output"], tensors["output_grad"] = scores.detach(), scores.grad.clone()
                tensors |= {"term." + k: x.detach() for k, x in terms.items()}
                tensors |= {"grad." + k: x.grad.clone() for k, x in w.items()}
            optimizer.step()
        tensors["steps.total"] = torch.tensor(totals)
        tensors |= {"final." + k: x.detach() for k, x in w.items()}
        small = {k: (x if x.dtype == torch.float16 else x.float()).contiguous() for k, x in tensors.items()}
        save_file(small, HERE / f"{name}.safetensors")
        cases[name] = dict(mapper=section, loss=LOSS, adamw=ADAMW, pairs_seed=PAIRS_SEED)
        print(name, positions, [round(t, 4) for t in totals])
    (HERE / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
