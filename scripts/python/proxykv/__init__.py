"""Exports of proxykv-train in Python: mapper, features, keep masks, and a press for kvpress.

    from proxykv import ProxyKVPress
    press = ProxyKVPress("path/or/hub-name/of/an/export", retention=0.1)

Without our binary: torch and safetensors for the mapper, transformers to run the models, kvpress for the press,
huggingface_hub for a hub name; each is imported when it is needed. An export is JSON and safetensors: nothing is
unpickled and no code is downloaded. `proxykv.engine` needs no torch.

The numbers are those of the Rust crates `mapper`, `extract`, `score` and `prune`, in the same order of operations;
what each means is written there.

Dimension key: l layer, h KV head, g query heads per KV head, q query head, p KV head of the sources of features
(layers x heads, layer-major), o target KV head (same), c channel, t context position, k cached position, r row (query)
of a block, s new token, d head_dim or width, b batch, m width of stage 2, n attention head of the mapper.
"""

from importlib import import_module

# Modules are imported when one of their names is, so that each package is needed only by what uses it.
_NAMES = {
    "attention": ("key_diff", "key_diff_of", "log_odds", "unrun_scores"),
    "budgets": ("HeadBudgets", "kept_count"),
    "cache": ("CacheBytes", "RaggedHeads", "cache_bytes", "evict"),
    "export": ("export_folder", "read_config"),
    "keep": ("POLICIES", "keep_mask", "token_scores", "top_mask"),
    "mapper": ("HybridAxialMapper", "check_parity", "read_tensors"),
    "pair": ("ProxyKV", "join_features", "source_sections"),
    "press": ("ProxyKVPress",),
    "reading": ("CHANNELS", "PREFILL_CHANNELS", "REPEAT_CHANNELS", "UNRUN_CHANNELS", "Reading"),
    "tokens": ("Frame", "Requests", "text_encoder", "vocab_hash"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]
