"""SIGKILL, SIGTERM and SIGINT at random moments of each stage and of `run`, COUNT times each; every second time what goes on is
killed as well. Run again, the results must be those of an unbroken run."""
from common import *
import random

before, want, secs = reference()
secs["run"] = sum(secs.values())
rng, tally = random.Random(1), Tally()
for stage in STAGES + ["run"]:
    for sig in [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]:
        for i in range(COUNT):
            p, faults, hit = project("broken", before[stage]), [], 0
            for share in [0.95, 0.6][:1 + i % 2]:
                proc = start(p, stage)
                time.sleep(rng.uniform(0.02, 1.0) * secs[stage] * share)
                hit += proc.poll() is None
                proc.send_signal(sig)
                r = Ran(proc, 60)
                if r.hung: faults.append("does not stop")
                elif sig != signal.SIGKILL and r.unsound() not in (None, f"signal {-r.code}"): faults.append(r.unsound())
            r = run(p, stage)
            if r.code != 0: faults.append("does not go on: " + r.brief())
            root = p / "runs/small"
            folders = MADE_BY.get(stage)
            expected = {k: v for k, v in want.items() if folders is None or k.split("/")[0] in folders}
            faults += difference(expected, results(root, folders)) + temporary(root)
            tally.add(f"{stage}, {sig.name}", faults, f"{hit} hit a live process")
tally.end()
