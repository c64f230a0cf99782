"""What the fault scripts share: a small project folder, the binary run in it, results that can be compared.

Every script: `python3 scripts/faults/NAME.py BINARY [COUNT]`; it works in a temporary folder (FAULTS_WORK sets another), on the
nano pair and the demo's documents; FAULTS_TREE is a checkout if the scripts lie elsewhere, JOBS (2) how many cases run at a time.
It prints a line for each group of cases, then `NAME: TRIED tried, FAILED failed`, and its exit code says whether any failed.
FAULTS_CASES is a file that gets a line for each case as it ends. Python 3 alone is needed; `storage.py` also compiles shim.c.

PART=K/N tries every Nth case alone, from the Kth (K = 1 ... N): N parts, in any order and on any machines, are all cases, and each part has
some of every group. SECONDS ends a script after that time, and says how many cases were left; SKIP passes over that many, which were tried before.
"""
import hashlib, json, multiprocessing, os, shutil, signal, subprocess, sys, tempfile, time, traceback
from multiprocessing.connection import wait
from pathlib import Path

TREE = Path(os.environ.get("FAULTS_TREE") or Path(__file__).resolve().parents[2])
BINARY = Path(sys.argv[1] if len(sys.argv) > 1 else TREE / "target/release/proxykv-train").resolve()
COUNT = int(sys.argv[2]) if len(sys.argv) > 2 else 4
WORK = Path(os.environ.get("FAULTS_WORK") or tempfile.mkdtemp(prefix="faults-"))
WORK.mkdir(parents=True, exist_ok=True)
NAME = Path(sys.argv[0]).stem
# What to try alone.
ONLY = list(filter(None, os.environ.get("ONLY", "").split(",")))
PART, PARTS = map(int, os.environ.get("PART", "1/1").split("/"))
assert 1 <= PART <= PARTS, "PART is K/N, with K from 1 to N"
BEGUN = time.time()
UNTIL = BEGUN + float(os.environ.get("SECONDS", "inf"))

RECIPE = '''
name = "small"
seed = 3
[target]
model = "recipes/nano-llama/target"
shape = { layers = 6, kv_heads = 2, query_heads = 4, head_dim = 32, hidden = 128, intermediate = 352, vocab = 4096 }
[proxy]
model = "recipes/nano-llama/proxy"
shape = { layers = 3, kv_heads = 1, query_heads = 2, head_dim = 32, hidden = 64, intermediate = 176, vocab = 4096 }
[data]
manifest = "data-manifests/demo.toml"
train = 40
validation = 4
test = 4
window_tokens = [96, 128]
min_tokens = 64
validation_share = 0.15
test_share = 0.15
shard_examples = 6
[mapper]
head_width = 8
width = 16
dilations = [1, 2]
cross_width = 8
cross_heads = 2
[train]
steps = 30
batch = 4
warmup_steps = 4
validate_every = 6
checkpoint_every = 3
log_every = 4
ema = 0.9
[eval]
ratios = [0.2, 0.05]
answer_ratios = [0.2, 0.05]
contexts = 3
context_tokens = 160
facts_per_context = 2
max_answer_tokens = 12
continuation_tokens = 16
bootstrap = 100
[export]
licence = "apache-2.0"
'''
STAGES = ["prepare", "label", "extract", "train", "eval", "export", "report"]
# The folders of each stage.
MADE_BY = {"prepare": ["examples"], "label": ["labels"], "extract": ["features"], "train": ["train", "checkpoints"],
           "eval": ["eval"], "export": ["export"], "report": []}


VARIANT = 'base = "../recipe.toml"\nname = "linear"\n[mapper]\nvariant = "linear"\n'
SWEEP = ["sweep", "--variants", "variants", "--recipe", "recipe.toml"]
# Features are made when they are read, and never kept.
TRANSIENT = [x for key in ("extract.missing=generate", "extract.after_use=delete", "train.cache_gb=0") for x in ("--set", key)]
INFER = ["infer", "--mapper", "runs/small/export", "--context", "context.txt", "--question", "What?", "--question", "Where?",
         "--max-new-tokens", "8", "--json", "--trace", "trace.json"]


def shorten():
    """Let projects have the least that has more than one shard and checkpoint: a fault is tried at each of its calls."""
    global RECIPE
    for was, now in [("train = 40", "train = 5"), ("validation = 4", "validation = 1"), ("test = 4", "test = 1"), ("shard_examples = 6", "shard_examples = 3"),
                     ("steps = 30", "steps = 6"), ("validate_every = 6", "validate_every = 3"), ("contexts = 3", "contexts = 1")]:
        assert was in RECIPE
        RECIPE = RECIPE.replace(f"\n{was}\n", f"\n{now}\n")
    return RECIPE


def project(name, runs=None):
    """A fresh folder with the recipe and a variant of it; `runs` is copied into it if given."""
    p = WORK / name
    shutil.rmtree(p, ignore_errors=True)
    p.mkdir(parents=True)
    for d in ["recipes", "data-manifests"]:
        (p / d).symlink_to(TREE / d)
    (p / "recipe.toml").write_text(RECIPE)
    (p / "variants").mkdir()
    (p / "variants/linear.toml").write_text(VARIANT)
    (p / "context.txt").write_text((TREE / "recipes/nano-llama/README.md").read_text()[:1500])
    if runs:
        shutil.copytree(runs, p / "runs", symlinks=True)
    return p


def reference():
    """An unbroken run, its results, and a copy of `runs/` before each stage and after all."""
    p, before, secs = project("reference"), {}, {}
    for stage in STAGES:
        before[stage] = WORK / f"before-{stage}"
        shutil.rmtree(before[stage], ignore_errors=True)
        shutil.copytree(p / "runs", before[stage]) if (p / "runs").exists() else before[stage].mkdir()
        r = run(p, stage)
        assert r.code == 0, r.err
        secs[stage] = r.secs
    before["run"], before["done"] = before["prepare"], p / "runs"
    return before, results(p / "runs/small"), secs


def argv(args, recipe=True):
    args = args.split() if isinstance(args, str) else args
    recipe = recipe and "--recipe" not in args and args[0] not in ("infer", "push", "inspect", "compare", "sweep", "schema")
    return [str(BINARY), "--device", "cpu", "--threads", "1", *args, *(["--recipe", "recipe.toml"] if recipe else [])]


def start(p, args, recipe=True, extra=None):
    """The process. Interrupts reach it even where the shell has them ignored."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RUST_", "PKV_"))}
    env.update({"HF_HUB_OFFLINE": "1", "HF_HOME": str(WORK / "hf-home"), **(extra or {})})
    return subprocess.Popen(argv(args, recipe), cwd=p, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


class Ran:
    def __init__(self, proc, timeout):
        begun = time.time()
        try:
            out, err = proc.communicate(timeout=timeout)
            self.hung = False
        except subprocess.TimeoutExpired:
            proc.kill()
            out, err = proc.communicate()
            self.hung = True
        self.code, self.secs = proc.returncode, time.time() - begun
        self.out, self.err = ((text or b"").decode(errors="replace") for text in (out, err))

    def unsound(self):
        """No orderly end: it hangs, panics, is ended by a signal, or fails without a hint."""
        if self.hung: return "hangs"
        if "panicked at" in self.err: return "panics"
        if self.code < 0: return f"signal {-self.code}"
        if self.code not in (0, 3, 130, 141) and "\nhint: " not in self.err: return "no hint"
        return None

    def brief(self):
        return " | ".join(l.strip() for l in self.err.splitlines() if l.startswith(("error", "  Caused", "hint")) or "panicked" in l)[:400]


def run(p, args, recipe=True, extra=None, timeout=150):
    return Ran(start(p, args, recipe, extra), timeout)


def timeless(x):
    """JSON without what differs between two runs by right: times, and a record's hash of itself, which covers them."""
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if k not in ("timings", "secs", "ms_per_step", "tokens_per_s", "measured", "sha256")}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def results(root, folders=None):
    """Hash of every file whose content must not depend on interruptions, by its path."""
    out, root = {}, Path(root)
    for folder in folders if folders is not None else [f for s in STAGES for f in MADE_BY[s]]:
        for f in sorted((root / folder).rglob("*")):
            # The card holds the stages' times.
            if not f.is_file() or f.suffix == ".lock" or f.name == "README.md": continue
            data = f.read_bytes()
            if f.suffix in (".json", ".jsonl") and folder in ("train", "eval"):
                try:
                    lines = data.decode().splitlines() if f.suffix == ".jsonl" else [data.decode()]
                    data = json.dumps([timeless(json.loads(line)) for line in lines]).encode()
                except ValueError:
                    pass
            out[str(f.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return out


def difference(want, found):
    """Files that differ. Beyond those that are wanted, only a checkpoint may lie there: its removal was the call that failed."""
    return sorted(k for k in {*want, *found} if want.get(k) != found.get(k) and (k in want or "checkpoints/" not in k))


def answers(out):
    """The tokens that `infer --json` printed, by question."""
    events = [json.loads(line) for line in out.splitlines()]
    return [(e["question"], e["text"]) for e in events if e["event"] == "token"]


def all_results(p, folders=None):
    """`results` of every run of a project."""
    runs = [r for r in sorted((p / "runs").iterdir()) if r.is_dir() and r.name != "shared"]
    return {f"{r.name}/{k}": v for r in runs for k, v in results(r, folders).items()}


def temporary(root):
    """What an interrupted process should not leave for good."""
    return sorted(str(f.relative_to(root)) for f in Path(root).rglob("*") if ".tmp" in f.name)


class Jobs:
    """Cases of this part, in the order in which they were added, at work beside each other: in processes that are forked when all are
    added, each with a folder of its own. What they tally is tallied here. Leaving it waits for all."""
    def __init__(self, tally):
        self.tally, self.all, self.cases = tally, [], 0

    def folder(self): return f"broken-{self.number}"

    def add(self, case, *args):
        self.cases += 1
        if self.cases % PARTS == PART % PARTS: self.all.append((case, args))

    def work(self, number, taken, out):
        self.number, self.tally.add = number, lambda *a, **k: out.send((a, k))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while time.time() < UNTIL:
            with taken.get_lock(): i, taken.value = taken.value, taken.value + 1
            if i >= len(self.all): break
            try: self.all[i][0](*self.all[i][1])
            except Exception: out.send(traceback.format_exc())
        out.send(None)

    def __enter__(self): return self

    def __exit__(self, kind, *_):
        if kind: return
        fork, tried = multiprocessing.get_context("fork"), 0
        taken, pipes = fork.Value("i", int(os.environ.get("SKIP", "0"))), []
        for number in range(min(int(os.environ.get("JOBS", "2")), len(self.all))):
            end, out = fork.Pipe(duplex=False)
            fork.Process(target=self.work, args=(number, taken, out), daemon=True).start()
            out.close()
            pipes.append(end)
        while pipes:
            for end in wait(pipes):
                try: said = end.recv()
                except EOFError: said = "a process of the script ended before its time"
                if isinstance(said, tuple):
                    tried += 1
                    self.tally.add(*said[0], **said[1])
                    continue
                if said: self.tally.add("the script itself", [said])
                if not said or "\n" not in said: pipes.remove(end)
        if PARTS > 1: print(f"part {PART} of {PARTS}: {len(self.all)} of {self.cases} cases")
        if tried < len(self.all): print(f"{len(self.all) - tried} cases left, of which SKIP passed over {os.environ.get('SKIP', '0')}")


class Tally:
    """Counts cases of groups, prints what failed, and ends the script. SIGTERM ends it with what was counted so far. `note` makes one more
    line at the end of what the cases gave as `more`."""
    def __init__(self, note=None):
        self.groups, self.failed, self.note, self.more = {}, 0, note, []
        self.cases = open(os.environ["FAULTS_CASES"], "a") if "FAULTS_CASES" in os.environ else None
        signal.signal(signal.SIGTERM, lambda *_: self.end())

    def add(self, group, faults, detail="", more=()):
        tried, failed = self.groups.get(group, (0, 0))
        self.groups[group] = (tried + 1, failed + bool(faults))
        self.failed += bool(faults)
        self.more += more
        if faults: print(f"FAILED {group}: {faults} {detail}", flush=True)
        if self.cases: print(f"FAILED {group}: {faults} {detail}" if faults else f"ok {group}: {detail.split(': ')[0]}, {time.time() - BEGUN:.1f} s", file=self.cases, flush=True)

    def end(self):
        for group, (tried, failed) in self.groups.items():
            print(f"  {group}: {tried} tried, {failed} failed")
        if self.note: print(self.note(self.more))
        print(f"{NAME}: {sum(t for t, _ in self.groups.values())} tried, {self.failed} failed")
        sys.stdout.flush()
        # Cases that still run are not waited for.
        for process in multiprocessing.active_children(): process.terminate()
        os._exit(1 if self.failed else 0)
