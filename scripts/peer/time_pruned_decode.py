"""Time decoding in transformers from a full cache, from one whose evicted pairs kvpress hides, and from a pruned one.

Random weights in the shape of a recipe's model, random tokens, and random keep masks: the shares that heads keep are in
proportion to the squares of uniform random numbers. One JSON object goes to stdout:

    PYTHONPATH=scripts/python python3 scripts/peer/time_pruned_decode.py --recipe recipes/smollm2-135m.toml --context 8192

`full` keeps everything; `hidden` is what kvpress's AdaKV and KVzip presses do; `pruned` is `proxykv.evict`.
"""

import argparse
import json
import logging
import sys

import torch
from time_kvpress import Clock, build, read_shape, stub_missing


def keep_mask(shape, positions, retention, device):
    """Bool `[layers, KV heads, positions]`, each head with a share of its own."""
    random = torch.Generator().manual_seed(0)
    share = torch.rand(shape["layers"], shape["kv_heads"], 1, generator=random) ** 2
    share = (share * retention / share.mean()).clamp_max(1.0)
    return (torch.rand(*share.shape[:2], positions, generator=random) < share).to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="take the shape from this recipe")
    parser.add_argument("--role", choices=["target", "proxy"], default="target", help="which model of the recipe")
    parser.add_argument("--context", default="8192,32768", help="tokens, separated by commas")
    parser.add_argument("--retention", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    logging.disable(logging.WARNING)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stub_missing()
    import kvpress  # noqa: F401
    from transformers import DynamicCache

    from proxykv.cache import _hide, cache_bytes, evict

    torch.manual_seed(0)
    family, shape = read_shape(args)
    model = build(family, shape, device, dtype)
    clock, rows = Clock(device, args.repeats, 60), []
    with torch.inference_mode():
        for context in map(int, args.context.split(",")):
            ids = torch.randint(shape["vocab"], (1, context), device=device)
            keep = keep_mask(shape, context, args.retention, device)
            for what in ("full", "hidden", "pruned"):
                cache = DynamicCache()
                model.model(input_ids=ids, past_key_values=cache)
                if what == "hidden":
                    _hide(model, keep)
                elif what == "pruned":
                    evict(model, cache, keep)
                held = cache_bytes(cache)

                def decode(cache=cache, context=context):
                    for _ in range(args.tokens):
                        model(ids[:, :1], past_key_values=cache)
                    cache.crop(context)

                row = clock.row(what, "sdpa", context, decode)
                for layer in model.model.layers:
                    layer.self_attn.masked_key_indices = None
                rows.append({"what": what, "context": context, "cache_bytes": held, "ms_per_token": row["median_s"] / args.tokens * 1e3})
                print(json.dumps(rows[-1]), file=sys.stderr)
                del cache
    print(json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "dtype": str(dtype), "kept": keep.float().mean().item(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
