"""COUNT minutes (30) of one `infer` that answers question after question and of one `label` of more documents than it can read in that
time. Every minute: resident memory and descriptors of both. Neither may grow after the third minute."""
from common import *
import re, threading

MINUTES, DOCUMENTS = int(sys.argv[2]) if len(sys.argv) > 2 else 30, int(os.environ.get("DOCUMENTS", 200_000))
tally = Tally()
before, _, _ = reference()


def usage(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    of = lambda key: int(re.search(key + r":\s+(\d+)", status).group(1))
    return of("VmRSS") // 1024, len(os.listdir(f"/proc/{pid}/fd")), of("Threads")


# Documents, all different, and a manifest of them.
p = project("soak", before["done"])
words = "lantern harbour garden tower bridge river castle market engine library".split()
with open(p / "many.jsonl", "w") as f:
    for i in range(DOCUMENTS):
        sentence = lambda k: f"The {words[(i * 3 + k) % 10]} of part {i * 31 + k * 7} stores the {words[(i + k * k) % 10]}."
        f.write(json.dumps({"text": " ".join(map(sentence, range(9)))}) + "\n")
many = [x for key in ["name=many", "data.files=[\"many.jsonl\"]", f"data.train={DOCUMENTS * 3 // 4}", "data.validation=10", "data.test=10",
                      "data.window_tokens=[96]", "data.shard_examples=64", "data.validation_share=0.05", "data.test_share=0.05"] for x in ("--set", key)]
r = run(p, ["prepare", *many], timeout=3600)
assert r.code == 0, r.err
print(f"prepare of {DOCUMENTS} documents: {r.secs:.0f} s", flush=True)

label = start(p, ["label", *many])
infer = subprocess.Popen(argv([*INFER[:5], "--questions", "-", "--max-new-tokens", "8", "--json"]), cwd=p, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
answered = 0


def read():
    global answered
    for _ in infer.stdout: answered += 1


def ask():
    n = 0
    while infer.poll() is None:
        n += 1
        # A line that is none is refused, and reading goes on.
        line = "{\"question\": 7}" if n % 50 == 0 else json.dumps({"question": f"Where is lantern {n}?"})
        try:
            infer.stdin.write(line.encode() + b"\n")
            infer.stdin.flush()
        except (OSError, ValueError):
            return
        time.sleep(0.2)


threading.Thread(target=read, daemon=True).start()
threading.Thread(target=ask, daemon=True).start()
# stderr of `label` is read, so that it never waits.
threading.Thread(target=lambda: label.stderr.read(), daemon=True).start()
curves = {"infer": [], "label": []}
for minute in range(1, MINUTES + 1):
    time.sleep(60)
    for name, proc in [("infer", infer), ("label", label)]:
        if proc.poll() is None: curves[name].append(usage(proc.pid))
    rows = len(list((p / "runs/many/labels").glob("*.parquet"))) * 64
    said = ", ".join(f"{name} {c[-1][0]} MB {c[-1][1]} descriptors {c[-1][2]} threads" for name, c in curves.items() if c)
    print(f"minute {minute}: {said}; {answered} lines of answers, {rows} rows of labels", flush=True)
for name, proc in [("infer", infer), ("label", label)]:
    faults, curve = [], curves[name][2:] or curves[name]
    if proc.poll() not in (None, 0): faults.append(f"it ended with {proc.poll()}")
    if len(curve) > 1:
        # What allocators keep varies by some MB.
        if max(c[0] for c in curve) > 1.1 * curve[0][0] + 8: faults.append(f"memory grows: {[c[0] for c in curve]} MB")
        if len({c[1] for c in curve}) > 1 and curve[-1][1] > curve[0][1]: faults.append(f"descriptors: {[c[1] for c in curve]}")
    tally.add(name, faults)
infer.stdin.close()
label.send_signal(signal.SIGTERM)
for proc in (infer, label): proc.wait(120)
tally.end()
