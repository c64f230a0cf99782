"""Two processes in one run folder, COUNT times for every pair of stages, both as a first run and with `--redo`; at once or with a
delay. Each ends with success or a sentence and a hint; afterwards `run` gives the results of an unbroken run, and no stage's
record is lost."""
from common import *
import random

before, want, _ = reference()
rng, tally = random.Random(3), Tally()
again = lambda s: f"{s} --redo {s}"
pairs = [(before[s], s, s) for s in STAGES + ["run"]] + [(before[s], s, again(s)) for s in STAGES]
pairs += [(before["done"], again(a), again(b)) for i, a in enumerate(STAGES) for b in STAGES[i:]]
for runs, one, two in pairs:
    for i in range(COUNT):
        p, faults = project("broken", runs), []
        first = start(p, one)
        time.sleep(0 if i % 2 == 0 else rng.uniform(0.05, 1.5))
        for r in [Ran(x, 150) for x in (start(p, two), first)]:
            if r.unsound(): faults.append(f"{r.unsound()}: {r.brief()}")
        root = p / "runs/small"
        try:
            json.loads((root / "run.json").read_text())
        except ValueError as e:
            faults.append(f"run.json: {e}")
        # A stage that was made again leaves later ones stale; they are said to be, and made again.
        stale = [s for s in STAGES if f"--redo {s}" in one + two]
        r = run(p, ["run", *(x for s in STAGES[STAGES.index(stale[0]):] for x in ("--redo", s))] if stale else "run")
        if r.code != 0: faults.append("does not go on: " + r.brief())
        faults += difference(want, results(root)) + temporary(root)
        lost = [s for s in STAGES if s not in json.loads((root / "run.json").read_text())["stages"]]
        faults += [f"no record of {s}" for s in lost]
        tally.add(f"{one} beside {two}", faults)
tally.end()
