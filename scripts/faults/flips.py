"""A file of a finished run, a file that a sweep shares, a recipe, manifest or lock file is damaged (bits and bytes flipped, COUNT each;
digits; cut, emptied, zeroed, longer, absent), then whatever reads it runs. The damage must be refused with a hint, passed over with a
warning, or change nothing. What a user writes has no hash: a recipe or manifest with another digit is another one, and passes if
the commands end."""
from common import *
import random

RECIPE = shorten()
rng, tally = random.Random(7), Tally()
before, _, _ = reference()
# Two runs, to be compared.
before["two"] = WORK / "before-two"
shutil.rmtree(before["two"], ignore_errors=True)
for name in ["small", "other"]:
    shutil.copytree(before["done"] / "small", before["two"] / name)
BUDGETED = [*INFER, "--policy", "pair-budget"]
PUSH, CHECKPOINT = ["push", "runs/small", "--repo", "me/mapper", "--json"], "checkpoints/step-000006"
inspect = lambda path: ["inspect", f"runs/small/{path}"]
# A sweep of which one run is to be trained and evaluated again from what it shares.
p = project("swept", before["run"])
assert run(p, SWEEP).code == 0
before["swept"] = p / "runs"
for folder in ["train", "checkpoints", "eval", "export"]: shutil.rmtree(p / "runs/linear" / folder)
shared = {name: next(p for p in (before["swept"] / "shared").iterdir() if p.name.startswith(name)).name for name in ["examples", "labels", "features"]}
# Models and documents from a hub's cache, pinned by lock files.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
for kind, name, source in [("models", "target", "recipes/nano-llama/target"), ("models", "proxy", "recipes/nano-llama/proxy"), ("datasets", "texts", "data-manifests/demo")]:
    cache = WORK / f"hf-home/hub/{kind}--me--{name}"
    shutil.copytree(TREE / source, cache / f"snapshots/{COMMIT}", dirs_exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs/main").write_text(COMMIT)
PINNED = {"recipe.toml": RECIPE.replace("recipes/nano-llama/", "me/").replace("data-manifests/demo.toml", "manifest.toml"),
          "manifest.toml": (TREE / "data-manifests/demo.toml").read_text().replace('files = ["demo/', 'hub = "me/texts"\nhub_files = ["')}
p = project("pinned")
for name, content in PINNED.items(): (p / name).write_text(content)
r = run(p, "fetch")
assert r.code == 0, r.err
PINNED |= {name: (p / name).read_text() for name in ["recipe.lock.toml", "manifest.lock.toml"]}
before["pinned"] = before["run"]
# File, state of the run, commands, folders whose content counts.
CASES = [
    ("examples/examples-00001.parquet", "label", [["label"]], ["labels"]),
    ("examples/index.json", "label", [["label"]], ["labels"]),
    ("labels/labels-00001.parquet", "train", [["train"]], ["checkpoints"]),
    ("labels/labels-00001.parquet", "train", [inspect("labels")], []),
    ("labels/index.json", "train", [["train"]], ["checkpoints"]),
    ("features/features-00001.parquet", "train", [["train"]], ["checkpoints"]),
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
    ("export/budgets.json", "done", [BUDGETED, PUSH], []),
    ("run.json", "done", [["run"]], []),
    ("train.lock", "done", [["train"]], []),
    ("eval.lock", "done", [["eval"]], []),
    (f"../shared/{shared['examples']}/examples-00001.parquet", "swept", [SWEEP], ["checkpoints", "eval"]),
    (f"../shared/{shared['labels']}/labels-00001.parquet", "swept", [SWEEP], ["checkpoints", "eval"]),
    (f"../shared/{shared['features']}/features-00001.parquet", "swept", [SWEEP], ["checkpoints", "eval"]),
    (f"../shared/{shared['labels']}/index.json", "swept", [SWEEP], ["checkpoints", "eval"]),
    *((f"../../{name}", "pinned", [["prepare"], ["label"]], ["examples", "labels"] if "lock" in name else []) for name in PINNED),
]
# The stored outcomes of an evaluation: what is damaged is measured anew.
for task in sorted((before["done"] / "small/eval/contexts").iterdir()):
    # That of the methods holds times alone.
    if task.is_dir(): CASES.append((f"eval/contexts/{task.name}/00000.json", "done", [["eval"]], [] if task.name.startswith("methods") else ["eval"]))
CASES += [(str(f.relative_to(before["done"] / "small")), "done", [["eval"]], ["eval"]) for f in sorted((before["done"] / "small/eval/scorers").rglob("*")) if f.is_file()]

def damaged(kind, data):
    if not data: return None if kind == "gone" else b"\0x"
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
        ran.append(run(p, c, timeout=90))
        if ran[-1].code != 0: break
    return ran

def fresh(state):
    p = project("broken", before[state])
    for name, content in PINNED.items() if state == "pinned" else (): (p / name).write_text(content)
    (p / "runs/small").mkdir(parents=True, exist_ok=True)
    return p

only = os.environ.get("ONLY", "")
for file, state, commands, folders in CASES:
    if only not in file: continue
    p = fresh(state)
    data = (p / "runs/small" / file).read_bytes()
    ran = go(p, commands)
    assert all(r.code == 0 for r in ran), ran[-1].err
    run_name = "linear" if state == "swept" else "small"
    want = results(p / "runs" / run_name, folders)
    text = file.endswith((".json", ".jsonl", ".toml"))
    # Records that hold their own hash.
    hashes = data.count(b'"sha256"') if file.endswith(("run.json", "state.json", "config.json", "results.json", "budgets.json")) else 0
    for kind in ["bit", "byte"] * COUNT + ["digit"] * (COUNT if text else 0) + ["half", "cut", "zeros", "empty", "longer", "gone"]:
        p = fresh(state)
        path, bad = p / "runs/small" / file, damaged(kind, data)
        path.unlink() if bad is None else path.write_bytes(bad)
        ran = go(p, commands)
        faults = [r.unsound() for r in ran if r.unsound()]
        silent = ran[-1].code == 0 and not any("WARN" in r.err for r in ran)
        # Tensors and tables have hashes: only a sound file, or one made anew, may pass without a word.
        if silent: faults += difference(want, results(p / "runs" / run_name, folders))
        if silent and kind == "digit" and not folders and hashes and bad.count(b'"sha256"') == hashes: faults.append("not noticed")
        if silent and commands[0][0] in ("inspect", "infer") and not text: faults.append("not noticed")
        tally.add(f"{file}: {commands[0][0]}", faults, f"{kind}: {ran[-1].brief()}")
tally.end()
