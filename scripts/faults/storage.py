"""The n-th write, fsync, rename, open, mkdir or unlink in the run folder fails, is cut short, or is the process's last; for each
stage, COUNT of the calls spread over all of them. The failure must be named with a hint, what other stages made must stay, and
run again the results must be those of an unbroken run."""
from common import *

SHIM = WORK / "shim.so"
subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", SHIM, Path(__file__).parent / "shim.c", "-ldl"], check=True)
CALLS = {"once": ["write", "fsync", "rename", "open", "mkdir", "unlink"], "short": ["write"],
         "kill": ["write", "rename", "unlink", "mkdir"], "after": ["rename", "unlink", "mkdir"]}
ERRORS = {"write": [28, 5], "fsync": [5, 28], "rename": [5, 28], "open": [5, 24], "mkdir": [28, 5], "unlink": [5, 5]}

before, want, _ = reference()
tally = Tally()
for stage in STAGES:
    earlier = [f for s in STAGES[:STAGES.index(stage)] for f in MADE_BY[s]]
    of = lambda folders: {k: v for k, v in want.items() if k.split("/")[0] in folders}
    for mode, calls in CALLS.items():
        for call in calls:
            def shim(n, error, log):
                # run.json is written in small pieces and would hide the other files.
                return {"LD_PRELOAD": str(SHIM), "FAIL_OP": call, "FAIL_N": str(n), "FAIL_ERRNO": str(error), "FAIL_MODE": mode,
                        "FAIL_PATH": "runs/", "FAIL_NOT": "run.json", "FAIL_LOG": str(log)}
            log = WORK / "calls.log"
            log.unlink(missing_ok=True)
            r = run(project("broken", before[stage]), stage, extra=shim(0, 5, log))
            assert r.code == 0, r.err
            total = len(log.read_text().splitlines()) if log.exists() else 0
            for i in range(min(COUNT, total)):
                n = 1 + i * max(total - 1, 0) // max(min(COUNT, total) - 1, 1)
                p, root = project("broken", before[stage]), WORK / "broken/runs/small"
                r, faults = run(p, stage, extra=shim(n, ERRORS[call][i % 2], log)), []
                killed = mode in ("kill", "after")
                if r.unsound() and not (killed and r.code == -9): faults.append(r.unsound())
                if r.code == 0 and mode in ("once", "short") and call != "unlink" and "WARN" not in r.err: faults.append("not said")
                faults += [f"lost {x}" for x in difference(of(earlier), results(root, earlier))]
                again = run(p, stage)
                if again.code != 0: faults.append("does not go on: " + again.brief())
                faults += difference(of(MADE_BY[stage]), results(root, MADE_BY[stage])) + temporary(root)
                tally.add(f"{stage}, {call} {mode}", faults, f"call {n} of {total}: {r.brief()}")
tally.end()
