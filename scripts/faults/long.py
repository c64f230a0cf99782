"""Memory by size: one context of TOKENS (170,000) and an eighth of them through `prepare`, `label`, `extract`, `train` and `infer`; then
DOCUMENTS (10,000) documents and an eighth of them through `prepare`, `label`, `extract`, `train` and `eval`. For each the peak of resident
memory and the seconds. With the number of documents memory must stay as it is; with a context's length it grows by what the context holds:
its KV pairs, scores and features. DEVICE is where it runs (cpu), THREADS how many threads it has, SIZES alone `tokens` or `documents`."""
from common import *

TOKENS, DOCUMENTS = int(os.environ.get("TOKENS", 170_000)), int(os.environ.get("DOCUMENTS", 10_000))
DEVICE, THREADS = os.environ.get("DEVICE", "cpu"), os.environ.get("THREADS", str(os.cpu_count()))
SIZES = os.environ.get("SIZES", "tokens,documents").split(",")
tally = Tally()
WORDS = "lantern harbour garden tower bridge river castle market engine library".split()


def sentence(i):
    return f"The {WORDS[i % 10]} of part {i} stores the {WORDS[(i * 7 + i // 10) % 10]}."


def measured(p, args):
    """Exit code, seconds, peak of resident memory in MB, what it said."""
    line = [str(BINARY), "--device", DEVICE, "--threads", THREADS, *args]
    begun = time.time()
    with open(p / "said", "w") as said: proc = subprocess.Popen(line, cwd=p, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(proc.pid, 0)
    return os.waitstatus_to_exitcode(status), time.time() - begun, usage.ru_maxrss >> 10, (p / "said").read_text()


def steps(p, name, commands):
    peaks = {}
    for step, args in commands:
        code, secs, peak, said = measured(p, args)
        peaks[step] = peak
        print(f"{name}: {step} {peak} MB, {secs:.1f} s" + (f"; exit code {code}: {said[-1500:]}" if code else ""), flush=True)
        tally.add(step, [f"exit code {code}"] if code else [])
        if code: break
    return peaks


def stages(sets, names): return [(s, [s, "--recipe", "recipe.toml", *(x for key in sets for x in ("--set", key))]) for s in names]


def of_tokens(tokens):
    """The nano pair with a configuration that allows as many."""
    p = project(f"tokens-{tokens}")
    for which in ("target", "proxy"):
        shutil.copytree(TREE / "recipes/nano-llama" / which, p / which)
        config = json.loads((p / which / "config.json").read_text()) | {"max_position_embeddings": 2 * tokens}
        (p / which / "config.json").write_text(json.dumps(config))
    with open(p / "many.jsonl", "w") as f:
        # Three splits, a document or more for each; each has more tokens than are read.
        for i in range(12): f.write(json.dumps({"text": " ".join(sentence(i * 1_000_000 + k) for k in range(tokens // 8))}) + "\n")
    (p / "context.txt").write_text(" ".join(sentence(k) for k in range(tokens // 12)))
    sets = ["target.model=target", "proxy.model=proxy", 'data.files=["many.jsonl"]', "data.train=1", "data.validation=1", "data.test=1", f"data.window_tokens=[{tokens}]", "data.validation_share=0.3",
            "data.test_share=0.3", "train.batch=1", "train.steps=2", "train.warmup_steps=1", "train.validate_every=2", "train.checkpoint_every=2"]
    made = stages(sets, ["prepare", "label", "extract", "train", "export"])
    return steps(p, f"{tokens} tokens", [*made, ("infer", ["infer", "--mapper", "runs/small/export", "--context", "context.txt", "--question", "What?", "--max-new-tokens", "8", "--trace", "trace.json"])])


def of_documents(documents):
    p = project(f"documents-{documents}")
    with open(p / "many.jsonl", "w") as f:
        for i in range(documents): f.write(json.dumps({"text": " ".join(sentence(i * 31 + k * 7) for k in range(9))}) + "\n")
    share = documents * 3 // 4
    sets = ['data.files=["many.jsonl"]', f"data.train={share}", "data.validation=10", "data.test=10", "data.window_tokens=[96]", "data.shard_examples=64", "data.validation_share=0.05", "data.test_share=0.05",
            f"train.steps={share // 16}", "train.batch=16", "train.validate_every=100", "train.checkpoint_every=100", "eval.contexts=3",
            # Else features stay in memory up to that.
            "train.cache_gb=0"]
    return steps(p, f"{documents} documents", stages(sets, ["prepare", "label", "extract", "train", "eval"]))


for name, most, of in [("tokens", TOKENS, of_tokens), ("documents", DOCUMENTS, of_documents)]:
    if name not in SIZES: continue
    few, many = of(most // 8), of(most)
    for step, peak in many.items():
        each = (peak - few.get(step, 0)) * (1 << 20) / (most - most // 8)
        print(f"{name}: {step} {few.get(step)} MB, then {peak} MB: {each:.0f} bytes for each more", flush=True)
        # What allocators keep varies by some MB.
        if name == "documents": tally.add(f"{step}, flat", [f"{few.get(step)} MB, then {peak} MB"] if peak > 1.15 * few.get(step, 0) + 16 else [])
tally.end()
