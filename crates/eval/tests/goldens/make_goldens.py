"""Scores of kvpress's training-free presses for small models.

Everything is float32 on CPU. Needs transformers 5.2.0, kvpress 0.5.5 and torch 2.11.0; from this folder:

    python make_goldens.py

Writes METHOD.safetensors beside itself, METHOD as recipes spell it. Per model it holds f32 [layers, KV heads, positions] of
the first TOKENS of the model's `input_ids` in crates/lm/tests/goldens/MODEL.safetensors: the chat template's prefix, then
the context. Presses have their default settings; the models are the nano pair and the random ones of crates/lm, which have
QKV bias, QK-norm, llama3 and yarn rotary scaling.
"""
import importlib.metadata
from pathlib import Path

import torch
from kvpress import ExpectedAttentionPress, KeyDiffPress, KnormPress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

EXPECTED = {"transformers": "5.2.0", "kvpress": "0.5.5", "torch": "2.11.0"}
VERSIONS = {name: importlib.metadata.version(name).split("+")[0] for name in EXPECTED}
assert VERSIONS == EXPECTED, VERSIONS

HERE = Path(__file__).resolve().parent
LM = HERE.parents[2] / "lm/tests/goldens"
NANO = HERE.parents[3] / "recipes/nano-llama"
MODELS = {f"nano-llama-{which}": NANO / which for which in ("target", "proxy")} | {
    name: LM / name for name in ("arch-llama3-rope-untied", "arch-qwen2-bias", "arch-qwen2-yarn", "arch-qwen3-qknorm")
}
PRESSES = {"expected-attention": ExpectedAttentionPress, "keydiff": KeyDiffPress, "knorm": KnormPress}
TOKENS = 200


def scores(model, press, ids):
    """What `press` gives every KV pair after one forward of `ids`."""
    found = {}
    score = press.score

    def record(module, *args, **kwargs):
        found[module.layer_idx] = score(module, *args, **kwargs)
        return found[module.layer_idx]

    press.score = record
    press.compression_ratio = 0.5
    with press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    return torch.cat([found[layer] for layer in sorted(found)])


def main():
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    goldens = {method: {} for method in PRESSES}
    for name, folder in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = load_file(LM / f"{name}.safetensors")["input_ids"][None, :TOKENS]
        for method, press in PRESSES.items():
            goldens[method][name] = scores(model, press(), ids).float().contiguous()
            print(method, name, tuple(goldens[method][name].shape), goldens[method][name].mean().item())
    for method, tensors in goldens.items():
        save_file(tensors, HERE / f"{method}.safetensors")


if __name__ == "__main__":
    main()
