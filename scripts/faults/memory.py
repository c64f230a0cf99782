"""Memory that ends: each stage, `infer` and `sweep` with less and less address space, COUNT sizes each between what the program needs to
start and what the stage needs. An allocation that fails ends the process at once (SIGABRT), or is an error with a hint; what other
stages made must stay, and run again with enough the results must be those of an unbroken run."""
from common import *
import resource

shorten()
tally = Tally()
before, _, _ = reference()
done = all_results(WORK / "reference")
p = project("swept", before["run"])
assert run(p, SWEEP).code == 0
swept = all_results(p)


def limited(p, command, most):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return Ran(subprocess.Popen(argv(command), cwd=p, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=limit), 150)


def least(start, works):
    """The smallest of sizes, to a MB, that works."""
    low, high = start, 64 << 30
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


base = least(1 << 20, lambda most: limited(WORK, "schema", most).code == 0)
ends = {}
for name, runs, command, want in [(s, before[s], s, done) for s in STAGES] + [("infer", before["done"], INFER, done), ("sweep", before["run"], SWEEP, swept)]:
    needs = least(base, lambda most: limited(project("broken", runs), command, most).code == 0)
    for i in range(COUNT):
        p = project("broken", runs)
        r, faults = limited(p, command, base + (needs - base) * (i + 1) // (COUNT + 1)), []
        if r.code not in (0, -6) and r.unsound(): faults.append(r.unsound())
        ends[r.code] = ends.get(r.code, 0) + 1
        again = run(p, command)
        if again.code != 0: faults.append("does not go on: " + again.brief())
        folders = MADE_BY.get(name)
        earlier = [f for s in STAGES[:STAGES.index(name)] for f in MADE_BY[s]] if name in STAGES else None
        expected = {k: v for k, v in want.items() if folders is None or k.split("/")[1] in folders + earlier}
        faults += difference(expected, all_results(p, None if folders is None else folders + earlier)) + temporary(p / "runs")
        tally.add(name, faults, r.brief() or r.err[-200:])
    print(f"{name}: needs {needs >> 20} MB of address space, to start {base >> 20} MB", flush=True)
print(f"exit codes: {ends}")
tally.end()
