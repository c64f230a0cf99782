"""A file of a finished run is damaged (bits and bytes flipped, COUNT each; digits; cut, emptied, zeroed, longer, absent), then
whatever reads it runs. The damage must be refused with a hint, passed over with a warning, or change nothing; what the JSON of a
run itself says in its digits cannot be checked, and counts as passed if the command ends."""
from common import *
import random

rng, tally = random.Random(7), Tally()
before, _, _ = reference()
# Two runs, to be compared.
before["two"] = WORK / "before-two"
shutil.rmtree(before["two"], ignore_errors=True)
for name in ["small", "other"]:
    shutil.copytree(before["done"] / "small", before["two"] / name)
(WORK / "context.txt").write_text((TREE / "recipes/nano-llama/README.md").read_text()[:1500])
INFER = ["infer", "--mapper", "runs/small/export", "--context", str(WORK / "context.txt"), "--question", "What?", "--max-new-tokens", "8", "--json"]
PUSH, CHECKPOINT = ["push", "runs/small", "--repo", "me/mapper", "--json"], "checkpoints/step-000030"
inspect = lambda path: ["inspect", f"runs/small/{path}"]
# File, state of the run, commands, folders whose content counts.
CASES = [
    ("examples/examples-00002.parquet", "label", [["label"]], ["labels"]),
    ("examples/index.json", "label", [["label"]], ["labels"]),
    ("labels/labels-00003.parquet", "train", [["train"]], ["checkpoints"]),
    ("labels/labels-00003.parquet", "train", [inspect("labels")], []),
    ("labels/index.json", "train", [["train"]], ["checkpoints"]),
    ("features/features-00003.parquet", "train", [["train"]], ["checkpoints"]),
    ("features/index.json", "train", [["train"]], ["checkpoints"]),
    (f"{CHECKPOINT}/model.safetensors", "eval", [["train"], ["export"]], ["export"]),
    (f"{CHECKPOINT}/model.safetensors", "eval", [inspect(CHECKPOINT)], []),
    (f"{CHECKPOINT}/optimizer.safetensors", "eval", [["train"], ["export"]], ["export"]),
    (f"{CHECKPOINT}/optimizer.safetensors", "eval", [inspect(CHECKPOINT)], []),
    (f"{CHECKPOINT}/state.json", "eval", [["train"], ["export"]], ["export"]),
    ("train/metrics.jsonl", "done", [["report"]], []),
    ("run.json", "done", [["report"], inspect("")], []),
    ("eval/results.json", "done", [["eval"], ["report"]], []),
    ("eval/agreement.parquet", "two", [["compare", "small", "other", "--json"]], []),
    ("eval/answers.parquet", "two", [["compare", "small", "other", "--json"]], []),
    ("export/model.safetensors", "done", [INFER], []),
    ("export/model.safetensors", "done", [inspect("export")], []),
    ("export/config.json", "done", [INFER, PUSH], []),
    ("export/parity.safetensors", "done", [PUSH], []),
    ("export/README.md", "done", [PUSH], []),
    ("log.jsonl", "done", [["report"]], []),
    ("report.html", "done", [["report"]], []),
]

def damaged(kind, data):
    i = rng.randrange(len(data))
    if kind == "bit": return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1:]
    if kind == "byte": return data[:i] + bytes([data[i] ^ rng.randrange(1, 256)]) + data[i + 1:]
    if kind == "digit":
        i = rng.choice([i for i, c in enumerate(data) if 48 <= c <= 57])
        return data[:i] + bytes([48 + (data[i] - 48 + rng.randrange(1, 10)) % 10]) + data[i + 1:]
    return {"half": data[:len(data) // 2], "cut": data[:-1], "zeros": bytes(len(data)), "empty": b"", "longer": data + b"\0x", "gone": None}[kind]

def go(p, commands):
    ran = []
    for c in commands:
        ran.append(run(p, c, recipe=c[0] not in ("infer", "push", "inspect", "compare"), timeout=90))
        if ran[-1].code != 0: break
    return ran

for file, state, commands, folders in CASES:
    p = project("broken", before[state])
    ran = go(p, commands)
    assert all(r.code == 0 for r in ran), ran[-1].err
    want = results(p / "runs/small", folders)
    data = (before[state] / "small" / file).read_bytes()
    text = file.endswith((".json", ".jsonl"))
    for kind in ["bit", "byte"] * COUNT + ["digit"] * (COUNT if text else 0) + ["half", "cut", "zeros", "empty", "longer", "gone"]:
        p = project("broken", before[state])
        path, bad = p / "runs/small" / file, damaged(kind, data)
        path.unlink() if bad is None else path.write_bytes(bad)
        ran = go(p, commands)
        faults = [r.unsound() for r in ran if r.unsound()]
        silent = ran[-1].code == 0 and not any("WARN" in r.err for r in ran)
        # Tensors and tables have hashes: only a sound file, or one made anew, may pass without a word.
        if silent: faults += difference(want, results(p / "runs/small", folders))
        if silent and commands[0][0] in ("inspect", "infer") and not text: faults.append("not noticed")
        tally.add(f"{file}: {commands[0][0]}", faults, f"{kind}: {ran[-1].brief()}")
tally.end()
