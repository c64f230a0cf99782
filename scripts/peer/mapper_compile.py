"""A training step of the same mapper in PyTorch, for comparison: torch.compile, fused AdamW, a resident batch.

    python scripts/peer/mapper_compile.py --batch 16 --positions 1000 --proxy-heads 12 --target-heads 36 --dtype bf16

prints one JSON line: median milliseconds per step, tokens/s, peak memory. Sizes and formulas are those of
crates/mapper (its goldens check them against crates/mapper/tests/goldens/make_goldens.py); here they are
written the way a PyTorch user would for speed: a channels-last convolution, batched attention over heads.
Runs on a CPU too: `--device cpu --no-compile --steps 2 --batch 2 --positions 64`.
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

RATIOS = (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
HEAD_WIDTH, WIDTH, FEED_FORWARD, DILATIONS, KERNEL, CROSS_WIDTH, CROSS_HEADS = 32, 192, 2, (1, 2, 4, 8), 5, 64, 4


class Conv(nn.Module):
    """Over time, [rows, positions, width] in and out."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2 * dilation, dilation=dilation)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.conv_norm, self.feed_forward_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.conv = Conv(WIDTH, dilation)
        self.up, self.down = nn.Linear(WIDTH, FEED_FORWARD * WIDTH), nn.Linear(FEED_FORWARD * WIDTH, WIDTH)

    def forward(self, x):
        x = x + F.gelu(self.conv(self.conv_norm(x)))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class Mapper(nn.Module):
    """`hybrid-axial` with the linear skip, or `conv`."""

    def __init__(self, variant, proxy, channels, globals_, outputs):
        super().__init__()
        self.variant, flat, e = variant, proxy * channels + globals_, CROSS_WIDTH // CROSS_HEADS
        self.skip = nn.Linear(flat, outputs)
        self.output = nn.Linear(WIDTH, outputs)
        self.blocks = nn.ModuleList(Block(d) for d in DILATIONS)
        self.norm = nn.LayerNorm(WIDTH)
        self.log_scale = nn.Parameter(torch.full((len(RATIOS),), 1.5))
        self.offset = nn.Parameter(torch.zeros(len(RATIOS)))
        self.inputs = nn.Linear(flat if variant == "conv" else proxy * HEAD_WIDTH + globals_, WIDTH)
        for name, shape in (
            ("heads_mean", (proxy, channels, 1)), ("heads_std", (proxy, channels, 1)), ("globals_mean", (globals_, 1)),
            ("globals_std", (globals_, 1)),
        ):
            self.register_buffer(name, torch.zeros(shape) if name.endswith("mean") else torch.ones(shape))
        if variant == "conv":
            return
        self.head_input = nn.Linear(channels, HEAD_WIDTH)
        self.head_embedding = nn.Parameter(torch.randn(proxy, HEAD_WIDTH) * 0.4)
        self.head_convs = nn.ModuleList(Conv(HEAD_WIDTH, d) for d in (1, 2))
        self.head_norm = nn.LayerNorm(HEAD_WIDTH)
        self.context = nn.Linear(WIDTH, HEAD_WIDTH)
        self.token_embedding = nn.Parameter(torch.randn(proxy + 1, HEAD_WIDTH) * 0.2)
        self.query = nn.Parameter(torch.randn(CROSS_HEADS, outputs, e))
        self.key = nn.Parameter(torch.randn(CROSS_HEADS, e, HEAD_WIDTH) / math.sqrt(HEAD_WIDTH))
        self.value = nn.Parameter(torch.randn(CROSS_HEADS, e, HEAD_WIDTH) / math.sqrt(HEAD_WIDTH))
        self.readout = nn.Parameter(torch.zeros(CROSS_HEADS, outputs, e))

    def forward(self, heads, globals_):
        """heads [b, p, c, t], globals [b, g, t] to scores [b, o, t], f32."""
        x = ((heads.float() - self.heads_mean) / self.heads_std).clamp(-6, 6)
        g = ((globals_.float() - self.globals_mean) / self.globals_std).clamp(-6, 6)
        b, p, _, t = x.shape
        flat = torch.cat([x.flatten(1, 2), g], 1).transpose(1, 2)
        if self.variant == "conv":
            h = self.inputs(flat)
        else:
            tokens = F.gelu(self.head_input(x.transpose(2, 3)) + self.head_embedding[:, None]).reshape(b * p, t, -1)
            for conv in self.head_convs:
                tokens = tokens + F.gelu(conv(tokens))
            tokens = self.head_norm(tokens).view(b, p, t, -1)
            h = self.inputs(torch.cat([tokens.transpose(1, 2).flatten(2), g.transpose(1, 2).to(tokens.dtype)], 2))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        y = self.skip(flat).float() + self.output(h).float()
        if self.variant == "hybrid-axial":
            tokens = torch.cat([tokens, self.context(h)[:, None].to(tokens.dtype)], 1) + self.token_embedding[:, None]
            # As in the crate, queries and read-outs fold into the projections.
            scale = 1 / math.sqrt(self.query.shape[-1])
            logits = F.linear(tokens, (torch.bmm(self.query, self.key) * scale).flatten(0, 1))
            readings = F.linear(tokens, torch.bmm(self.readout, self.value).flatten(0, 1))
            attended = (logits.softmax(1).to(readings.dtype) * readings).sum(1)
            y = y + attended.view(b, t, CROSS_HEADS, -1).float().sum(2)
        return y.transpose(1, 2)


def hybrid_loss(mapper, scores, y, mean=-4.0, std=2.0):
    """The default terms: 1.0 binary and 0.3 value_mse."""
    s, y = scores.flatten(1), y.flatten(1)
    n = s.shape[1]
    rank = torch.empty_like(y, dtype=torch.int64)
    order = torch.sort(y, dim=1, descending=True, stable=True).indices
    rank.scatter_(1, order, torch.arange(n, device=y.device).expand_as(order))
    binary = 0.0
    for i, rho in enumerate(RATIOS):
        kept = (rank < max(1, round(n * rho))).to(s.dtype)
        logits = mapper.log_scale[i].exp() * s + mapper.offset[i]
        entropy = -(rho * math.log(rho) + (1 - rho) * math.log(1 - rho))
        binary = binary + F.binary_cross_entropy_with_logits(logits, kept) / entropy
    weight = y.sigmoid() + 0.1
    value = ((s - (y - mean) / std).square() * weight).sum(1) / weight.sum(1)
    return binary / len(RATIOS) + 0.3 * value.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=["hybrid-axial", "conv"], default="hybrid-axial")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--proxy-heads", type=int, default=12)
    parser.add_argument("--target-heads", type=int, default=36)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--globals", type=int, default=4)
    parser.add_argument("--dtype", choices=["f32", "tf32", "bf16"], default="tf32", help="bf16 is autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="per round; the median of five rounds counts")
    parser.add_argument("--mode", default="default", help="of torch.compile: default, reduce-overhead, max-autotune")
    parser.add_argument("--no-compile", action="store_true")
    a = parser.parse_args()
    torch.manual_seed(1)
    cuda = a.device.startswith("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = a.dtype != "f32"

    mapper = Mapper(a.variant, a.proxy_heads, a.channels, a.globals, a.target_heads).to(a.device)
    groups = [
        dict(params=[p for p in mapper.parameters() if p.dim() >= 2], weight_decay=0.02),
        dict(params=[p for p in mapper.parameters() if p.dim() < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=True)
    heads = torch.randn(a.batch, a.proxy_heads, a.channels, a.positions, device=a.device)
    globals_ = torch.randn(a.batch, a.globals, a.positions, device=a.device)
    y = torch.randn(a.batch, a.target_heads, a.positions, device=a.device) * 2 - 4

    def forward(heads, globals_, y):
        with torch.autocast(a.device.split(":")[0], torch.bfloat16, enabled=a.dtype == "bf16"):
            scores = mapper(heads, globals_)
        return hybrid_loss(mapper, scores, y)

    compiled = forward if a.no_compile else torch.compile(forward, mode=a.mode)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = compiled(heads, globals_, y)
        loss.backward()
        nn.utils.clip_grad_norm_(mapper.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss

    def wait():
        if cuda:
            torch.cuda.synchronize()

    started = time.perf_counter()
    for _ in range(5):
        loss = step()
    wait()
    warm_up_s = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(a.steps):
            loss = step()
        wait()
        rounds.append((time.perf_counter() - started) / a.steps)
    seconds = statistics.median(rounds)
    print(json.dumps({
        "peer": "pytorch", "torch": torch.__version__, "compiled": not a.no_compile, "mode": a.mode,
        "variant": a.variant, "parameters": sum(p.numel() for p in mapper.parameters()), "batch": a.batch,
        "proxy_heads": a.proxy_heads, "channels": a.channels, "target_heads": a.target_heads,
        "positions": a.positions, "dtype": a.dtype, "step_ms": seconds * 1e3,
        "tokens_per_s": a.batch * a.positions / seconds, "warm_up_s": warm_up_s, "loss": loss.item(),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }))


if __name__ == "__main__":
    main()
