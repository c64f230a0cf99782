"""Features of one model's prefill, gathered while transformers runs it (crates/extract)."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .attention import LOG_LIMIT, MEAN_FLOOR, _Layer, _QueryStatistics, _UnrunReplay, key_diff
from .cache import RaggedHeads
from .tokens import Requests

VALUE_NORM_FLOOR = 1e-4
SMALLEST_F64 = 2.2250738585072014e-308
# Most logits held at once while the surprisal is taken.
LOGIT_ELEMENTS = 1 << 24
# Elements of the mask that transformers makes for a prefill chunk after cached ones.
MASK_ELEMENTS = 1 << 28
# Positions whose hidden states are held in f32 at once.
HIDDEN_ROWS = 1 << 13
# Architectures whose attention modules the hooks know.
MODEL_TYPES = ("llama", "qwen2", "qwen3", "granite", "mistral")
PREFILL_CHANNELS = ("max_all", "mean_all", "max_window", "mean_window", "max_last", "mean_last", "key_norm", "value_norm")
REPEAT_CHANNELS = ("recon_log", "recon_log_odds", "recon_mean")
UNRUN_CHANNELS = ("replay_unrun", "replay_unrun_mean")
# What any model gives. The prefill's are those of a recipe that names none, the repeat's are a proxy's alone.
CHANNELS = (*PREFILL_CHANNELS, *UNRUN_CHANNELS, "key_diff", "mean_last_layer")


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
        # Granite divides its logits.
        divisor = getattr(self.model.config, "logits_scaling", 1.0)
        logits = ((head(block_sd) / divisor).float() for block_sd in state_sd.split(rows))
        pairs = zip(logits, next_s.split(rows))
        return torch.cat([F.cross_entropy(x_sv, n_s.to(x_sv.device), reduction="none") for x_sv, n_s in pairs])
