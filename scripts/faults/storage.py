"""Every call of each stage that writes, syncs, renames, opens, makes, removes, links, lists, locks, measures or reads a file of the runs
fails, is cut short, or is the process's last; and every one that opens or reads a file of a model. Writes also fail from each one on, as
on a disk that is full. Then the failure must be named with a hint, what other stages made must stay, and run again the results must be
those of an unbroken run. COUNT limits the calls of a kind, spread over all of them; 0, every call, those that are unlike others first.
ONLY names the commands."""
from common import *
import bisect, re

SHIM = WORK / "shim.so"
subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", SHIM, Path(__file__).parent / "shim.c", "-ldl"], check=True)
ENOENT, EIO, ENOMEM, EMFILE, ENOSPC, ENOLCK = 2, 5, 12, 24, 28, 37
# What fails: mode, call, errors.
KINDS = [("once", "write", [ENOSPC, EIO]), ("stick", "write", [ENOSPC]), ("short", "write", [ENOSPC]), ("kill", "write", [0]),
         ("once", "fsync", [EIO]), ("kill", "fsync", [0]), ("once", "open", [EMFILE, EIO]), ("stick", "open", [EMFILE]),
         ("once", "mkdir", [ENOSPC]), ("once", "link", [EIO]), ("once", "list", [EIO]), ("once", "lock", [ENOLCK]),
         ("once", "read", [EIO]), ("short", "read", [EIO]), ("once", "mmap", [ENOMEM]), ("once", "ftruncate", [EIO]), ("once", "stat", [EIO])]
KINDS += [(mode, call, [EIO]) for call in ("rename", "unlink", "mkdir", "link") for mode in ("once", "kill", "after") if (mode, call) != ("once", "mkdir")]
KINDS = list(dict.fromkeys((m, c, tuple(e)) for m, c, e in KINDS))
# Without effect: what is not removed is removed by the next run; without locks the last writer counts; files that are not there are no error.
QUIET = {"unlink", "lock", "stat", "list"}
shorten()
# Less to compute for the two commands that have all stages; the files are the same but smaller.
FEWER = [x for key in ('eval.answer_policies=["pair"]', "eval.answer_ratios=[0.2]", 'eval.methods=["mapper","kvzip","linear","random"]') for x in ("--set", key)]
SWEEP, RUN = [*SWEEP, *FEWER], ["run", *TRANSIENT, *FEWER]

before, want, _ = reference()
tally = Tally()
done = all_results(WORK / "reference")
p = project("swept", before["run"])
assert run(p, SWEEP).code == 0
swept = all_results(p)
COMMANDS = [(s, before[s], s) for s in STAGES] + [("sweep", before["run"], SWEEP), ("infer", before["done"], INFER), ("run without stored features", before["run"], RUN)]
assert run(project("unbroken", before["run"]), RUN).code == 0
unstored = all_results(WORK / "unbroken")


def shim(call, n, error, mode, path, log=""):
    return {"LD_PRELOAD": str(SHIM), "FAIL_OP": call, "FAIL_N": str(n), "FAIL_ERRNO": str(error), "FAIL_MODE": mode, "FAIL_PATH": path, "FAIL_LOG": str(log)}


def case(name, runs, command, mode, call, error, n, total, path, key):
    p = project(jobs.folder(), runs)
    r, faults = run(p, command, extra=shim(call, n, error, mode, path)), []
    killed = mode in ("kill", "after")
    if r.unsound() and not (killed and r.code == -9): faults.append(r.unsound())
    # A read that is short, and none after it, is no fault.
    quiet = call in QUIET or (mode, call, n) == ("short", "read", total)
    stage = name in STAGES
    earlier = [f for s in STAGES[:STAGES.index(name)] for f in MADE_BY[s]] if stage else []
    made = MADE_BY[name] if stage else None
    goal = done if stage or name == "infer" else swept if name == "sweep" else unstored
    of = lambda folders: {k: v for k, v in goal.items() if folders is None or k.split("/")[1] in folders}
    # Who has the results in spite of it did not need that call: rows that are read ahead, or a file that is read twice.
    needless = made != [] and name != "infer" and r.code == 0 and not difference(of(made), all_results(p, made))
    if r.code == 0 and not killed and not quiet and not needless and "WARN" not in r.err: faults.append("not said")
    if stage and (p / "runs").exists(): faults += [f"lost {x}" for x in difference(of(earlier), all_results(p, earlier))]
    again = run(p, command)
    if again.code != 0: faults.append("does not go on: " + again.brief())
    faults += difference(of(made), all_results(p, made)) + temporary(p / "runs")
    tally.add(f"{name}, {call} {mode}{'' if path == 'runs/' else ', models'}", faults, f"call {n} of {total}, error {error}, {key[0]}.{key[1]}: {r.brief()}")


def own_code():
    """Where the project's own functions begin and end in the program; nothing of a program without symbols, whose file with `.own` at the
    end of its name is read instead, if it is there."""
    kept = Path(f"{BINARY}.own")
    if kept.exists(): return json.loads(kept.read_text())
    rows = sorted((int(row[0], 16), "pkv_" in row[2]) for row in (line.split(" ", 2) for line in subprocess.run(["nm", BINARY], capture_output=True, text=True).stdout.splitlines()) if row[0] and row[1] in "tTwW")
    return [at for (at, own), (_, before) in zip(rows, [(0, False), *rows]) if own != before]


def calls(runs, command):
    """The calls of a run, by whose files they are on and by kind: for each the way through the program, that through the project's own
    functions, and what it is on."""
    log = WORK / "calls.log"
    log.unlink(missing_ok=True)
    p = project("counted", runs)
    assert run(p, command, extra=shim("all", 0, 0, "once", "", log)).code == 0
    rows = sorted((int(n), *rest) for n, *rest in (line.split(" ", 3) for line in log.read_text().splitlines()))
    own = lambda way: ",".join(a for a in way.split(",") if a and bisect.bisect(OWN, int(a, 16)) % 2)
    of = lambda part, call: [(way, own(way), re.sub("[0-9a-f]{8,}|[0-9]+", "#", path)) for _, c, way, path in rows if c == call and part in path]
    return {part: {call: of(part, call) for call in dict.fromkeys(c for _, c, _ in KINDS)} for part in ("runs/", "nano-llama")}


def spread(count):
    """The numbers below `count`: the first, the last, and then each in the middle of the longest stretch without one."""
    out, left = [0, count - 1][:count], [(0, count - 1)]
    for a, z in left:
        if z - a > 1:
            out.append((a + z) // 2)
            left += [(a, out[-1]), (out[-1], z)]
    return out


def order(calls):
    """For each call a key to sort by, of those that are unlike others to those that are like them. 0: of the calls to which one way through
    the project's own functions leads, on files of one kind (that differ in numbers alone: shards, checkpoints, contexts), the first.
    1: of those to which one way through the libraries leads too, the first. 2: the others, last ones first."""
    def ranks(whole):
        alike = {}
        for i, (way, own, path) in enumerate(calls): alike.setdefault((way if whole else own, path), []).append(i)
        return [rank for _, rank in sorted((all[k], rank) for all in alike.values() for rank, k in enumerate(spread(len(all))))]
    return [(0 if own == 0 else 1 if way == 0 else 2, own) for way, own in zip(ranks(True), ranks(False))]


OWN, cases = own_code(), []
for name, runs, command in COMMANDS:
    if ONLY and name not in ONLY: continue
    found = calls(runs, command)
    for part, kinds in [("runs/", KINDS), ("nano-llama", [k for k in KINDS if k[1] in ("open", "read", "mmap", "stat") and k[0] == "once"])]:
        for mode, call, errors in kinds:
            keys = order(found[part][call])
            total = len(keys)
            chosen = {1 + i * max(total - 1, 0) // max(min(COUNT, total) - 1, 1) for i in range(min(COUNT, total))} if COUNT else range(1, total + 1)
            chosen = sorted(chosen, key=lambda n: keys[n - 1])
            # Half-way through its part of the cases, each kind of call is half-way through.
            cases += [((*keys[n - 1], i / len(chosen)), name, runs, command, mode, call, error, n, total, part) for error in errors for i, n in enumerate(chosen)]
    said = ", ".join(f"{call} {len(paths)}{'' if part == 'runs/' else ' of models'}" for part, all in found.items() for call, paths in all.items() if paths)
    print(f"{name}: calls {said}", flush=True)
# The commands that have all stages last: they take the longest, and repeat the code of the others.
cases.sort(key=lambda c: (c[1] in ("sweep", "run without stored features"), c[0][0], c[0][2]))
print(f"{len(cases)} cases, of calls more and less unlike others: {', '.join(str(sum(c[0][0] == i for c in cases)) for i in range(3))}", flush=True)
with Jobs(tally) as jobs:
    for key, *args in cases: jobs.add(case, *args, key)
tally.end()
