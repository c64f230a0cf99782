"""Run folders in a bucket of a server on the loopback interface, seen through a proxy that makes trouble.

    cargo build && cargo build -p pkv-bucket --example copy         # release for figures of throughput
    python3 scripts/buckets/run.py s3|gs|az target/debug/proxykv-train [target/debug/examples/copy [MIB]]

servers.py says what servers these are and where they come from. The nano pair goes through prepare, label and extract by two tasks
of two machines (caches), one of which is killed, train, eval, export and report, every request at the mercy of the proxy; then every
file is compared with those of a run on disk. With `copy`, a shard of MIB (512) goes into the bucket and out, straight and through the
proxy, beside curl with the same file and server (at Azurite, a client that puts blocks). Of EVERY (6) requests the proxy breaks one.
Exit code 0: all the same. Without a server the script says so, and exits with 0.
"""
import hashlib, json, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

from servers import BUCKET, KINDS, SECRET, port

TREE = Path(__file__).resolve().parents[2]
if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
    sys.exit(__doc__)
SERVER = KINDS[sys.argv[1]]()
BINARY = Path(sys.argv[2] if len(sys.argv) > 2 else TREE / "target/release/proxykv-train").resolve()
COPY = Path(sys.argv[3]).resolve() if len(sys.argv) > 3 else None
MIB = int(sys.argv[4]) if len(sys.argv) > 4 else 512
EVERY = int(os.environ.get("EVERY", "6"))
RUNS = f"{SERVER.scheme}://{BUCKET}/runs"
failed = []


def check(what, good):
    print(("ok      " if good else "FAILED  ") + what, flush=True)
    if not good:
        failed.append(what)


def environment(at, cache):
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return keep | SERVER.environment(at) | {"HOME": str(cache), "PKV_BUCKET_CACHE": str(cache), "PKV_BUCKET_TIMEOUT_S": "2",
                                            "PKV_BUCKET_LEASE_S": "4"}


said = []


def run(args, env, code=0, **kwargs):
    ran = subprocess.run([BINARY, "--device", "cpu", "-v", *args], cwd=TREE, env=env, capture_output=True, text=True, **kwargs)
    said.append(ran.stdout + ran.stderr)
    if code is not None and ran.returncode != code:
        print(ran.stderr[-3000:])
        check(f"{' '.join(map(str, args[:4]))}: exit code {ran.returncode}", False)
    return ran


def main():
    if SERVER.absent:
        print(f"SKIPPED: {SERVER.absent}")
        return
    work = Path(tempfile.mkdtemp(prefix="buckets-"))
    sys.path.insert(0, str(TREE / "scripts/faults"))
    sys.argv = [sys.argv[0], str(BINARY)]
    os.environ["FAULTS_WORK"] = str(work / "faults")
    from common import RECIPE
    recipe = work / "small.toml"
    recipe.write_text(RECIPE)
    SERVER.start(work)
    at = port()
    proxy = subprocess.Popen([sys.executable, str(Path(__file__).parent / "proxy.py"), str(at), str(SERVER.at), str(EVERY)],
                             stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)
        bench(work, at)
        pipeline(work, at, recipe)
    finally:
        proxy.terminate()
        print("the proxy:", proxy.communicate()[0].strip())
        SERVER.stop()
    if not failed:
        shutil.rmtree(work)
    print(f"buckets, {SERVER.name}: {len(failed)} failed" + (f"; see {work}" if failed else ""))
    sys.exit(1 if failed else 0)


def pipeline(work, at, recipe):
    common = ["--recipe", recipe]
    disk = {k: v for k, v in os.environ.items()}
    run(["run", "--runs", work / "disk", *common], disk)
    a, b, c = (environment(at, work / f"cache-{name}") for name in "abc")
    for env in (a, b, c):
        Path(env["HOME"]).mkdir()
    runs = ["--runs", RUNS]
    begun = time.time()
    run(["prepare", *runs, *common], a)
    for stage in ("label", "extract"):
        # One machine is killed in the middle; another does its own part, and what the first one left.
        first = subprocess.Popen([BINARY, "--device", "cpu", stage, "--task", "0/2", *runs, *common], cwd=TREE, env=a,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(4)
        first.send_signal(signal.SIGKILL)
        first.wait()
        run([stage, "--task", "1/2", *runs, *common], b)
        run([stage, "--task", "0/2", *runs, *common], c)
        status = run(["launch", "status", "--run", f"{RUNS}/small", "--json"], b)
        state = {s["stage"]: s["state"] for s in json.loads(status.stdout or "{}").get("stages", [])}
        check(f"{stage}: {state.get(stage)}", state.get(stage) == "done")
    run(["train", *runs, *common], b)
    # A machine that has seen nothing of it goes on.
    for stage in ("eval", "export", "report"):
        run([stage, *runs, *common], c)
    print(f"all stages by two tasks, through the proxy: {time.time() - begun:.0f} s")
    run(["inspect", f"{RUNS}/small"], a)
    run(["infer", "--mapper", f"{RUNS}/small", "--context", TREE / "README.md", "--question", "What is it?",
         "--max-new-tokens", "4"], a, code=None)

    # What a machine that has nothing has of it, straight from the bucket.
    d = environment(at, work / "cache-d")
    Path(d["HOME"]).mkdir()
    run(["inspect", f"{RUNS}/small"], d)
    folder = next((work / "cache-c").glob(f"{SERVER.scheme}-{BUCKET}-*/files/runs/small"))
    kinds = ["examples/*", "labels/*", "features/*", "checkpoints/*/*.safetensors", "export/*.safetensors"]
    for kind in kinds:
        names = sorted(p.relative_to(work / "disk/small") for p in (work / "disk/small").glob(kind) if p.is_file())
        names = [name for name in names if not str(name).endswith(".lock")]
        differ = [str(name) for name in names if there(f"runs/small/{name}") != digest(work / "disk/small" / name)]
        check(f"{len(names)} files of {kind} have the bytes of the run on disk", names and not differ)
        if differ:
            print("   ", differ[:5])
    results = [json.loads((f / "eval/results.json").read_text()) for f in (work / "disk/small", folder)]
    for r in results:
        [r.pop(key, None) for key in ("timings", "sha256")]
    check("the evaluation has the same results", results[0] == results[1])
    everything = "".join(said) + "".join(p.read_text(errors="replace") for p in work.glob("cache-*/**/*.json*") if p.is_file())
    check("no secret in any output, log or record", SECRET not in everything and "Signature=" not in everything)


def there(key):
    return hashlib.sha256(SERVER.curl(SERVER.at, key) or b"absent").hexdigest()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bench(work, at):
    if not COPY:
        return
    big = work / "big"
    with open(big, "wb") as f:
        for _ in range(MIB):
            f.write(os.urandom(1 << 20))
    rates = {}
    for again in range(3):
        begun = time.time()
        SERVER.put(SERVER.at, "plain", big)
        put = time.time() - begun
        begun = time.time()
        SERVER.curl(SERVER.at, "plain", "-o", work / "back")
        got = time.time() - begun
        for name, secs in (("curl put", put), ("curl get", got)):
            rates[name] = max(rates.get(name, 0), MIB * 1.048576 / secs)
        for kind, where in (("", SERVER.at), (" through the proxy", at)):
            cache = work / f"cache-bench{again}{bool(kind)}"
            cache.mkdir()
            env = environment(where, cache)
            address = f"{SERVER.scheme}://{BUCKET}/x/big-0000{again}.parquet"
            for how in ("put", "get"):
                if how == "get":
                    shutil.rmtree(cache), cache.mkdir()
                args = [COPY, how, big, address] if how == "put" else [COPY, how, address, big]
                ran = subprocess.run(args, env=env, capture_output=True, text=True)
                if ran.returncode:
                    check(f"{how} of {MIB} MiB{kind}: {ran.stderr}", False)
                    continue
                secs, peak = ran.stdout.split()
                name = f"{how}{kind}"
                rates[name] = max(rates.get(name, 0), MIB * 1.048576 / float(secs))
                rates[name + " MiB"] = max(rates.get(name + " MiB", 0), int(peak) / 1024)
            shutil.rmtree(cache)
    big.unlink(), (work / "back").unlink()
    for how in ("put", "get"):
        share = rates.get(how, 0) / rates[f"curl {how}"]
        check(f"{how}: {rates.get(how, 0):.0f} MB/s, {share:.0%} of the plain client's {rates[f'curl {how}']:.0f} MB/s; through the proxy "
              f"{rates.get(how + ' through the proxy', 0):.0f} MB/s", share >= 0.7)
        peak = max(rates.get(f"{how}{kind} MiB", 0) for kind in ("", " through the proxy"))
        check(f"{how}: at most {peak:.0f} MiB of memory for {MIB} MiB", 0 < peak < 160)


if __name__ == "__main__":
    main()
