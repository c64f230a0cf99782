"""What transformers makes of odd model folders: heads and ties.

Needs transformers 5.24.0 and torch 2.11.0; from this folder:

    python make_folders.py ../../../../recipes/nano-llama

Writes beside itself
  ties.json  per combination of file, index and tie_word_embeddings: logits of LOGIT_IDS at the last position of IDS
The tests write the same folders (tests/lm/folders.rs) from nano-llama's files and from what is in the JSON.
"""
import importlib.metadata, json, os, sys, tempfile
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

VERSIONS = {p: importlib.metadata.version(p) for p in ("transformers", "torch")}
assert VERSIONS["transformers"] == "5.24.0" and VERSIONS["torch"].startswith("2.11.0"), VERSIONS
torch.set_grad_enabled(False); torch.set_num_threads(2); transformers.logging.set_verbosity_error()
nano = sys.argv[1]; out = os.path.dirname(os.path.abspath(__file__))

IDS, LOGIT_IDS = list(range(40, 60)), [5, 77, 300, 1000, 2047, 4000]

def tie_case(held, index, tie):
    """held: embed, head, equal, different; index: none, lists both, lists what is held; tie: true, false, absent."""
    with tempfile.TemporaryDirectory() as d:
        config = json.load(open(f"{nano}/proxy/config.json"))
        config.pop("tie_word_embeddings")
        if tie is not None: config["tie_word_embeddings"] = tie
        json.dump(config, open(f"{d}/config.json", "w"))
        t = load_file(f"{nano}/proxy/model.safetensors"); embed = t.pop("model.embed_tokens.weight")
        if held != "head": t["model.embed_tokens.weight"] = embed
        if held == "head" or held == "equal": t["lm_head.weight"] = embed.clone()
        # Row i of this head is row i - 7 of the embedding.
        if held == "different": t["lm_head.weight"] = torch.roll(embed, 7, 0)
        name = "model.safetensors" if index == "none" else "model-00001-of-00001.safetensors"
        save_file(t, f"{d}/{name}", metadata={"format": "pt"})
        if index != "none":
            names = set(t) | ({"lm_head.weight"} if index == "both" else set())
            if index == "no head": names -= {"lm_head.weight"}
            json.dump({"metadata": {}, "weight_map": {n: name for n in sorted(names)}}, open(f"{d}/model.safetensors.index.json", "w"))
        m, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        missing = sorted(info["missing_keys"])
        case = dict(held=held, index=index, tie=tie, missing=missing)
        if not missing:
            case["logits"] = [round(x, 5) for x in m(input_ids=torch.tensor([IDS])).logits[0, -1, LOGIT_IDS].tolist()]
        return case

ties = [tie_case(h, i, t) for h in ("embed", "head", "equal", "different") for i in ("none", "held", "both", "no head") for t in (True, False, None)]
json.dump(dict(versions=VERSIONS, ids=IDS, logit_ids=LOGIT_IDS, cases=ties), open(f"{out}/ties.json", "w"), indent=None)
print(len(ties), "ties;", sum("logits" in c for c in ties), "with logits")
