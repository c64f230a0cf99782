"""Two processes in one folder of runs, COUNT times for every pair of stages: as a first run, with `--redo` of one or both, beside `run`
and `sweep`; at once or with a delay. Each ends with success or a sentence and a hint; afterwards the same commands give the results
of an unbroken run, and no stage's record is lost."""
from common import *
import random

shorten()
before, _, _ = reference()
done = all_results(WORK / "reference")
rng, tally = random.Random(3), Tally()
again = lambda s: f"{s} --redo {s}"
p = project("swept", before["run"])
r = run(p, SWEEP)
assert r.code == 0, r.err
swept = all_results(p)

pairs = [(before[s], s, s) for s in STAGES + ["run"]] + [(before[s], s, again(s)) for s in STAGES]
# One stage beside a later one, which has nothing to read yet.
pairs += [(before[a], a, b) for i, a in enumerate(STAGES) for b in STAGES[i + 1:]] + [(before["run"], "run", s) for s in STAGES]
pairs += [(before["done"], again(a), again(b)) for i, a in enumerate(STAGES) for b in STAGES[i:]]
pairs += [(before["done"], again(a), b) for a in STAGES for b in STAGES + ["run"] if a != b]
pairs += [(before["done"], again(a), INFER) for a in STAGES]
pairs += [(before["run"], SWEEP, x) for x in [SWEEP, "run", *STAGES]] + [(p / "runs", SWEEP, x) for x in [SWEEP, "run", *map(again, STAGES)]]


def case(runs, one, two, pause):
    p, faults = project(jobs.folder(), runs), []
    first = start(p, one)
    time.sleep(pause)
    for r in [Ran(x, 150) for x in (start(p, two), first)]:
        if r.unsound(): faults.append(f"{r.unsound()}: {r.brief()}")
    root = p / "runs/small"
    try:
        json.loads((root / "run.json").read_text()) if root.exists() else None
    except (OSError, ValueError) as e:
        faults.append(f"run.json: {e}")
    # A stage that was made again leaves later ones stale; they are said to be, and made again.
    stale = [s for s in STAGES if f"--redo {s}" in f"{one} {two}"]
    r = run(p, ["run", *(x for s in STAGES[STAGES.index(stale[0]):] for x in ("--redo", s))] if stale else "run")
    if r.code != 0: faults.append("does not go on: " + r.brief())
    if one == SWEEP:
        r = run(p, SWEEP)
        if r.code != 0: faults.append("does not go on: " + r.brief())
    faults += difference(swept if one == SWEEP else done, all_results(p)) + temporary(p / "runs")
    lost = [s for s in STAGES if s not in json.loads((root / "run.json").read_text())["stages"]]
    faults += [f"no record of {s}" for s in lost]
    tally.add(" beside ".join(x if isinstance(x, str) else x[0] for x in (one, two)), faults)


with Jobs(tally) as jobs:
    for runs, one, two in pairs:
        for i in range(COUNT): jobs.add(case, runs, one, two, 0 if i % 2 == 0 else rng.uniform(0.05, 1.5))
tally.end()
