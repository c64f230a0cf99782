"""Time the Python peer of `proxykv-train bench`: kvpress 0.5.5 on transformers 5.2.

Random weights in the shape of a recipe's target or proxy are made on the device, random tokens are read, and
two things are timed: the bare prefill (no LM head) and prefill + KVzip scoring (`KVzipPress`; no question is
answered and nothing is decoded). One JSON object goes to stdout, in the form that `bench --peer FILE` reads:

    python3 scripts/peer/time_kvpress.py --shape llama-3.1-8b --context 8192,32768 > peer.json
    proxykv-train bench label --recipe recipes/llama-3.1-8b--llama-3.2-1b.toml --random-weights \
        --context 8192,32768 --peer peer.json

Attention: `sdpa`, transformers' default; `flash_attention_2`, if flash-attn or the `kernels` package has it
(else it is named under `unavailable`); and `aten_flash`, the FlashAttention-2 kernel inside libtorch called
directly, so that a peer without flash-attn is not judged by its default alone.

Three things are given to the peer. The ranking of all scores (`compress_post`) is left out, as labels need
no ranking. The tokenizer is a stand-in that returns as many ids as Llama 3's (see FRAME), so that nothing is
downloaded. And modules that kvpress imports for its other presses alone (datasets, fire, cachetools) are
replaced by empty ones where they are not installed; they are named under `stubbed`.
"""

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import sys
import time
import tomllib
import types

import torch

SHAPES = {
    "llama-3.1-8b": ("llama", 32, 8, 32, 128, 4096, 14336, 128256),
    "llama-3.2-1b": ("llama", 16, 8, 32, 64, 2048, 8192, 128256),
    "qwen3-32b": ("qwen3", 64, 8, 64, 128, 5120, 25600, 151936),
}
FIELDS = ("layers", "kv_heads", "query_heads", "head_dim", "hidden", "intermediate", "vocab")

# Tokens of Llama 3's chat template before and after the user's text, and of KVzip's two requests. The same
# numbers are in crates/bench/src/subject.rs.
FRAME = {"prefix": 30, "switch": 5, "first": 8, "later": 13}


def stub_missing():
    """Empty modules for what kvpress imports and KVzipPress does not use; their names."""

    def refuse(*_, **__):
        raise RuntimeError("this module is a stub: only KVzipPress is timed")

    def module(name, **members):
        # A spec, because transformers asks for one when it looks for optional packages.
        stub = types.ModuleType(name)
        stub.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        vars(stub).update(members)
        return stub

    stubs = {
        "datasets": {"load_dataset": refuse},
        "fire": {"Fire": refuse},
        # Decorates functions when the module is imported.
        "cachetools": {"LRUCache": dict, "cached": lambda *_, **__: lambda function: function},
    }
    missing = [name for name in stubs if importlib.util.find_spec(name) is None]
    # After transformers has looked at what is installed.
    import transformers  # noqa: F401

    for name in missing:
        sys.modules[name] = module(name, **stubs[name])
    return missing


class StandInTokenizer:
    """Random ids, as many as the texts of KVzipPress have in Llama 3's tokenizer."""

    chat_template = "any"

    def __init__(self, vocab):
        self.vocab = vocab

    def apply_chat_template(self, messages, **_):
        return "[prefix]" + messages[0]["content"] + "[switch]"

    def encode(self, text, **_):
        if text in ("[prefix]", "[switch]"):
            n = FRAME[text[1:-1]]
        elif text.startswith("\n\nRepeat the previous"):
            n = FRAME["first"]
        elif text.startswith("\n\nRepeat the part"):
            n = FRAME["later"]
        else:
            raise ValueError(f"KVzipPress encodes {text!r}, which this script does not know")
        return torch.randint(self.vocab, (1, n))


def read_shape(args):
    """Family, and dimensions by the names of a recipe's `[target.shape]`."""
    if args.recipe:
        with open(args.recipe, "rb") as f:
            section = tomllib.load(f)[args.role]
        name = section["model"].lower()
        family = "qwen3" if "qwen3" in name else "qwen2" if "qwen2" in name else "llama"
        return family, {field: section["shape"][field] for field in FIELDS}
    family, *numbers = SHAPES[args.shape]
    return family, dict(zip(FIELDS, numbers))


def build(family, shape, device, dtype):
    """The model with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    config = config_class(
        num_hidden_layers=shape["layers"],
        num_key_value_heads=shape["kv_heads"],
        num_attention_heads=shape["query_heads"],
        head_dim=shape["head_dim"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        vocab_size=shape["vocab"],
        max_position_embeddings=1 << 18,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def aten_flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """FlashAttention-2 as libtorch ships it: bottom-right causal, query heads share KV heads."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scaling
    )[0]
    return out, None


class Clock:
    """Times a function on a device: one warm-up, then the median of the repeats."""

    def __init__(self, device, repeats, max_seconds):
        self.device, self.repeats, self.max_seconds = device, repeats, max_seconds

    def once(self, work):
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - start

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def row(self, what, attention, context, work):
        row = {"what": what, "attention": attention, "context": context}
        try:
            self.once(work)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = []
            while len(times) < self.repeats and (len(times) < 2 or sum(times) < self.max_seconds):
                times.append(self.once(work))
        except torch.OutOfMemoryError:
            return row | {"error": "out of memory"}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        median = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return row | {
            "repeats": len(times),
            "median_s": median,
            "min_s": min(times),
            "tokens_per_s": context / median,
            "peak_bytes": peak,
        }


def attentions(model, wanted, device):
    """The attention functions that work here, and why the others do not."""
    usable, unavailable = [], {}
    for name in wanted:
        if name == "aten_flash" and device.type != "cuda":
            unavailable[name] = "needs CUDA"
            continue
        try:
            model.set_attn_implementation(name)
            usable.append(name)
        except Exception as e:  # ImportError, ValueError, or whatever a hub that is out of reach raises
            unavailable[name] = (str(e).strip().splitlines() or [type(e).__name__])[0]
    return usable, unavailable


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES)
    which.add_argument("--recipe", help="take the shape from this recipe")
    parser.add_argument("--role", choices=["target", "proxy"], default="target", help="which model of the recipe")
    parser.add_argument("--context", default="8192,32768", help="tokens, separated by commas")
    parser.add_argument("--attention", default="sdpa,aten_flash,flash_attention_2")
    parser.add_argument("--what", default="prefill,label", help="label is prefill + KVzip scoring")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=20, help="no further repeat after this, but two at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on CUDA, float32 on a CPU")
    args = parser.parse_args()

    logging.disable(logging.WARNING)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    stubbed = stub_missing()
    from importlib.metadata import version

    from transformers import AttentionInterface, DynamicCache

    # Before kvpress is imported, so that it is wrapped like the others.
    AttentionInterface.register("aten_flash", aten_flash)
    from kvpress.presses import kvzip_press

    torch.manual_seed(0)
    family, shape = read_shape(args)
    tokenizer = StandInTokenizer(shape["vocab"])
    kvzip_press.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda _: tokenizer)

    class Scoring(kvzip_press.KVzipPress):
        def compress_post(self, model):
            pass

    begin = time.perf_counter()
    model = build(family, shape, device, dtype)
    print(f"model made in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    usable, unavailable = attentions(model, args.attention.split(","), device)
    clock = Clock(device, args.repeats, args.max_seconds)
    rows = []
    with torch.inference_mode():
        for context in map(int, args.context.split(",")):
            ids = torch.randint(shape["vocab"], (1, FRAME["prefix"] + context), device=device)
            # Scoring happens only if something is to be removed.
            press = Scoring(compression_ratio=0.5)

            def prefill():
                model.model(input_ids=ids, past_key_values=DynamicCache())

            def label():
                with press(model):
                    prefill()

            for attention in usable:
                model.set_attn_implementation(attention)
                for what, work in (("prefill", prefill), ("label", label)):
                    if what in args.what.split(","):
                        rows.append(clock.row(what, attention, context, work))
                        print(json.dumps(rows[-1]), file=sys.stderr)
    print(
        json.dumps(
            {
                "tool": "kvpress",
                "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "dtype": str(dtype).removeprefix("torch."),
                "family": family,
                "shape": shape,
                "stubbed": stubbed,
                "unavailable": unavailable,
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
