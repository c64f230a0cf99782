"""Every call of each stage that writes, syncs, renames, opens, makes, removes, links, lists, locks, measures or reads a file of the runs
fails, is cut short, or is the process's last; and every one that opens or reads a file of a model. Writes also fail from each one on, as
on a disk that is full. Then the failure must be named with a hint, what other stages made must stay, and run again the results must be
those of an unbroken run. COUNT limits the calls of a kind, spread over all of them; 0, every call. ONLY names the commands."""
from common import *

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

before, want, _ = reference()
tally = Tally()
done = all_results(WORK / "reference")
p = project("swept", before["run"])
assert run(p, SWEEP).code == 0
swept = all_results(p)
COMMANDS = [(s, before[s], s) for s in STAGES] + [("sweep", before["run"], SWEEP), ("infer", before["done"], INFER), ("run without stored features", before["run"], ["run", *TRANSIENT])]
r = run(project("unbroken", before["run"]), ["run", *TRANSIENT])
unstored = all_results(WORK / "unbroken")


def shim(call, n, error, mode, path, log=""):
    return {"LD_PRELOAD": str(SHIM), "FAIL_OP": call, "FAIL_N": str(n), "FAIL_ERRNO": str(error), "FAIL_MODE": mode, "FAIL_PATH": path, "FAIL_LOG": str(log)}


def case(name, runs, command, mode, call, error, n, total, path):
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
    tally.add(f"{name}, {call} {mode}{'' if path == 'runs/' else ', models'}", faults, f"call {n} of {total}, error {error}: {r.brief()}")


with Jobs() as jobs:
    for name, runs, command in COMMANDS:
        if ONLY and name not in ONLY: continue
        totals = {}
        for path, kinds in [("runs/", KINDS), ("nano-llama", [k for k in KINDS if k[1] in ("open", "read", "mmap", "stat") and k[0] == "once"])]:
            for mode, call, errors in kinds:
                if (path, call) not in totals:
                    log = WORK / "calls.log"
                    log.unlink(missing_ok=True)
                    assert run(project("counted", runs), command, extra=shim(call, 0, 0, "once", path, log)).code == 0
                    totals[path, call] = len(log.read_text().splitlines()) if log.exists() else 0
                total = totals[path, call]
                calls = sorted({1 + i * max(total - 1, 0) // max(min(COUNT, total) - 1, 1) for i in range(min(COUNT, total))}) if COUNT else range(1, total + 1)
                for error in errors:
                    for n in calls: jobs.add(case, name, runs, command, mode, call, error, n, total, path)
        print(f"{name}: calls {', '.join(f'{call} {n}' + ('' if path == 'runs/' else ' of models') for (path, call), n in totals.items() if n)}", flush=True)
tally.end()
