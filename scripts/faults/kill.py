"""SIGKILL, SIGTERM and SIGINT at random moments of each stage, of `run` (with stored features, and with features made when they are
read), of a `sweep` of two runs, of an evaluation by three processes, of stages as a whole that tasks take over, of tasks that other tasks
or a whole stage take over, and of `infer`, COUNT times each; every second time what goes on is killed as well. Run again, the results
must be those of an unbroken run. ONLY names the cases, by commas."""
from common import *
import random

shorten()
rng, tally = random.Random(1), Tally(lambda hits: f"{len(hits)} signals, {sum(hits)} to a live process")
before, _, secs = reference()
done = all_results(WORK / "reference")
of_stage = lambda s: {k: v for k, v in done.items() if k.split("/")[1] in MADE_BY[s]}
tasks = lambda s, n: [[s, "--task", f"{k}/{n}"] for k in range(n)]
# Name, state of the runs, commands that run together, those that go on, the wanted results, folders, seconds.
cases = [(s, before[s], [s], [s], of_stage(s), MADE_BY[s], secs[s]) for s in STAGES]
cases += [("run", before["run"], ["run"], ["run"], done, None, sum(secs.values()))]
cases += [("eval by three", before["eval"], ["eval"] * 3, ["eval"], {k: v for k, v in done.items() if "/export/" not in k}, None, secs["eval"])]
for s in ("label", "extract", "eval"):
    for name, first, on in [(f"{s} taken over by tasks", [s], tasks(s, 2)), (f"tasks of {s} taken over by others", tasks(s, 2), tasks(s, 3)),
                            (f"tasks of {s} taken over as a whole", tasks(s, 2), [s])]:
        cases.append((name, before[s], first, on, of_stage(s), MADE_BY[s], secs[s]))
for name, runs, command in [("run without stored features", before["run"], ["run", *TRANSIENT]), ("sweep", before["run"], [*SWEEP, "--jobs", "2"]),
                            ("infer", before["done"], INFER)]:
    p = project("unbroken", runs)
    r = run(p, command)
    assert r.code == 0, r.err
    cases.append((name, runs, [command], [command], all_results(p), None, r.secs))
    if name == "infer": answered = answers(r.out)



def case(name, runs, commands, on, want, folders, whole, sig, i, moments):
    p, faults, hits = project(jobs.folder(), runs), [], []
    for moment in moments:
        procs = [start(p, c) for c in commands]
        time.sleep(moment * whole)
        # One of several, or all of them.
        victims = procs if i % 3 else procs[:1]
        for proc in victims:
            hits.append(proc.poll() is None)
            proc.send_signal(sig)
        for proc in procs:
            r = Ran(proc, 100)
            if r.hung: faults.append("does not stop")
            elif sig != signal.SIGKILL and r.unsound() not in (None, f"signal {-r.code}"): faults.append(r.unsound())
            elif proc not in victims and r.code != 0: faults.append("takes others with it: " + r.brief())
    for r in (run(p, c) for c in on):
        if r.code != 0: faults.append("does not go on: " + r.brief())
    found = all_results(p, folders)
    faults += difference(want, found) + temporary(p / "runs")
    if name == "infer" and answers(r.out) != answered: faults.append("other answers")
    if name == "infer": json.loads((p / "trace.json").read_text())
    tally.add(f"{name}, {sig.name}", faults, more=hits)


with Jobs(tally) as jobs:
    for name, runs, commands, on, want, folders, whole in cases:
        if ONLY and name not in ONLY: continue
        for sig in [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]:
            for i in range(COUNT):
                moments = [rng.uniform(0.02, 1.0) * share for share in [0.95, 0.6][:1 + i % 2]]
                jobs.add(case, name, runs, commands, on, want, folders, whole, sig, i, moments)
tally.end()
