"""Places and surroundings that programs seldom meet: variables, limits, signals, closed streams, clocks, odd names, links and folders where
files are wanted, file systems that refuse a call, files of another user. Each case ends as it says: `same`, the results of an unbroken
run; `refused`, with a hint; `sound`, either. Then, in plain surroundings, the results are those of an unbroken run. ONLY names cases."""
from common import *
import pty, random, re, stat, struct, termios, fcntl

RECIPE = shorten()
tally = Tally()
before, _, _ = reference()
done = all_results(WORK / "reference")
SHIM = WORK / "shim.so"
subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", SHIM, Path(__file__).parent / "shim.c", "-ldl"], check=True)
# For files of another user.
WORK.chmod(0o755)
OTHER_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
CASES = []


class Ended(Ran):
    """A process that a signal may end, as its case says."""
    signals = ()

    def unsound(self):
        return None if -self.code in self.signals else super().unsound()


def odd(name, command="run", state="run", ends="same", env=None, drop=(), shell="", before=None, cwd=None, signals=(), then=None, says=(), **popen):
    """A case. `shell` runs before the program, `before` gets the project; `cwd` is a folder in it, `then` its further checks."""
    CASES.append((name, command, state, ends, env or {}, drop, shell, before, cwd, signals, then, says, popen))


def case(name, command, state, ends, env, drop, shell, prepare, cwd, signals, then, says, popen):
    p = project(jobs.folder(), before[state])
    p.chmod(0o777)
    try:
        line = argv(command(p) if callable(command) else command)
        if prepare: line = prepare(p) or line
        faults = []
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RUST_", "PKV_")) and k not in drop}
        surroundings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(WORK / "hf-home")} | {k: str(v) for k, v in env.items()}
        surroundings = {k: v for k, v in surroundings.items() if k not in drop}
        if shell: line = ["bash", "-c", shell + '\nexec "$@"', "--", *line]
        given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {k: v(p) if callable(v) else v for k, v in popen.items()}
        proc = subprocess.Popen(line, cwd="." if command == "here" else p / (cwd or "."), env=surroundings, **given)
        r = Ended(proc, 100)
        r.signals = signals
        if "sleep" in shell: time.sleep(2.2)
        if r.unsound(): faults.append(r.unsound())
        if ends == "same" and r.code not in (0, *(-s for s in signals)): faults.append(f"exit code {r.code}")
        if ends == "refused" and r.code == 0: faults.append("not refused")
        faults += [f"does not say `{x}`" for x in says if x not in r.err]
        subprocess.run(["chattr", "-R", "-i", p], stderr=subprocess.DEVNULL)
        if then: faults += then(p, r) or []
        again = run(p, "run")
        # A hint to make a stage again is followed.
        for _ in STAGES:
            stage = re.search(r"hint: .*`--redo (\w+)`", again.err)
            if again.code == 0 or not stage: break
            again = run(p, f"run --redo {stage[1]}")
        if again.code != 0: faults.append("does not go on: " + again.brief())
        else: faults += difference(done, {k: v for k, v in all_results(p).items() if k.startswith("small/")}) + temporary(p / "runs/small")
        tally.add(name, faults, f"{r.code}: {r.brief() or r.err[-300:]}")
    finally:
        subprocess.run(["chattr", "-R", "-i", p], stderr=subprocess.DEVNULL)


def shim(call, error, mode="stick", path="runs/", **more):
    return {"LD_PRELOAD": SHIM, "FAIL_OP": call, "FAIL_N": "1", "FAIL_ERRNO": error, "FAIL_MODE": mode, "FAIL_PATH": path, **more}


def terminal(rows, columns):
    """A pseudo-terminal of that size as a stream; what is written there is read and dropped."""
    def make(_):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ours)
        return theirs
    return make


# Variables.
for name in ["HOME", "PATH", "TERM", "LANG", "USER", "SHELL"]: odd(f"no {name}", drop=[name])
for value in ["", "/nonexistent", "relative", "/dev/null", "/proc", "a\nb"]: odd(f"HOME={value!r}", env={"HOME": value}, drop=["HF_HOME"])
for value in ["", "/nonexistent", "/dev/null", "/proc/1", "~", "\udcff"]: odd(f"HF_HOME={value!r}", env={"HF_HOME": value})
for value in ["/nonexistent", "/dev/null", "/proc", ""]: odd(f"TMPDIR={value!r}", env={"TMPDIR": value})
for value in ["tr_TR.UTF-8", "de_DE.UTF-8", "C", "xx", "\udcff"]: odd(f"LC_ALL={value!r}", env={"LC_ALL": value})
for value in ["Asia/Kathmandu", "nonsense", "/dev/zero", ""]: odd(f"TZ={value!r}", env={"TZ": value})
for value in ["trace", "=,=[", "pkv_run=debug", "\udcff"]: odd(f"RUST_LOG={value!r}", env={"RUST_LOG": value})
for value in ["0", "-1", "x", ""]: odd(f"OMP_NUM_THREADS={value!r}", env={"OMP_NUM_THREADS": value})
for value in ["0", "100000", "x"]: odd(f"RAYON_NUM_THREADS={value!r}", env={"RAYON_NUM_THREADS": value})
for value in ["0", "1", "99999", "x"]: odd(f"COLUMNS={value!r}", env={"COLUMNS": value}, stderr=terminal(5, 20))
for key in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"]: odd(f"{key} that is no UTF-8", env={key: "\udcff\udcfe"}, ends="sound")
odd("a variable of 100 kB", env={"NOISE": "x" * 100_000})
odd("proxies that are none", env={"http_proxy": "::::", "https_proxy": "\udcff", "ALL_PROXY": "socks9://"})
odd("no variable at all but libraries", drop=[k for k in os.environ if k != "LD_LIBRARY_PATH"])
odd("a tracker's and a scheduler's variables", env={"SLURM_JOB_ID": "x", "SLURM_PROCID": "-1", "RANK": "7", "WORLD_SIZE": "0"})
# Streams.
for n, name in enumerate(["stdin", "stdout", "stderr"]): odd(f"{name} closed", shell=f"exec {n}{'<' if n == 0 else '>'}&-")
odd("all streams closed", shell="exec 0<&- 1>&- 2>&-")
odd("stderr full", stderr=lambda _: open("/dev/full", "w"))
odd("stdout full", stdout=lambda _: open("/dev/full", "w"), ends="sound")
odd("both full", stdout=lambda _: open("/dev/full", "w"), stderr=lambda _: open("/dev/full", "w"), signals=(-4,), ends="sound")
odd("stderr a pipe without a reader", shell="exec 2> >(exec 0<&-; sleep 0)")
odd("stdin endless", stdin=lambda _: open("/dev/zero"))
odd("stdin a folder", stdin=lambda _: os.open("/", os.O_RDONLY))
for rows, columns in [(0, 0), (1, 1), (2, 3), (1000, 65535)]: odd(f"a terminal of {rows} x {columns}", stdout=terminal(rows, columns), stderr=terminal(rows, columns))
# Limits.
for n in [4, 8, 12, 16, 24, 32, 64]: odd(f"ulimit -n {n}", shell=f"ulimit -n {n}", ends="sound" if n < 40 else "same")
for n in [0, 1, 8, 64, 512]: odd(f"ulimit -f {n}", shell=f"ulimit -f {n}", ends="sound", signals=(25,))
for n in [100, 256, 1024, "unlimited"]: odd(f"ulimit -s {n}", shell=f"ulimit -s {n}", ends="sound", signals=(9, 11))
odd("ulimit -t 1", shell="ulimit -t 1", ends="sound", signals=(9, 24))
odd("ulimit -l 0", shell="ulimit -l 0")
odd("ulimit -c unlimited", shell="ulimit -c unlimited")
odd("ulimit -q 0, -i 0, -x 0", shell="ulimit -q 0; ulimit -i 0; ulimit -x 0", ends="sound")
odd("nice 19", shell="renice -n 19 $$ >/dev/null")
for mask in ["000", "077", "222", "777"]: odd(f"umask {mask}", shell=f"umask {mask}", ends="same" if mask != "777" else "sound")
# Signals, those that programs seldom get among them.
for sig in ["HUP", "QUIT", "PIPE", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "WINCH", "URG", "CHLD", "IO", "CONT", "TTIN", "TTOU", "XCPU", "TERM", "INT"]:
    number = int(getattr(signal, f"SIG{sig}"))
    stops = sig in ("TTIN", "TTOU")
    odd(f"SIG{sig} at work", shell=f"(sleep 0.8; kill -{sig} $$; {'sleep 1; kill -CONT $$' if stops else ''}) >/dev/null 2>&1 &", signals=(number,), ends="sound")
odd("SIGTSTP and SIGCONT, ten times", shell="(for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.2; kill -TSTP $$; sleep 0.1; kill -CONT $$; done) >/dev/null 2>&1 &")
odd("SIGWINCH all the time", shell="(while sleep 0.01; do kill -WINCH $$ || exit; done) >/dev/null 2>&1 &", stderr=terminal(9, 90))
odd("nohup, and SIGHUP", shell="trap '' HUP; (sleep 0.8; kill -HUP $$) >/dev/null 2>&1 &")
odd("in the background of a script, and SIGINT", ends="sound", shell="trap '' INT; (sleep 0.8; kill -INT $$) >/dev/null 2>&1 &")
odd("SIGPIPE ignored, or not", shell="trap '' PIPE")
odd("SIGCHLD ignored", shell="trap '' CHLD")
odd("SIGTERM ignored, and sent", shell="trap '' TERM; (sleep 0.8; kill -TERM $$) >/dev/null 2>&1 &", ends="sound")
# Clocks.
for clock in ["back", "0", "-1", "-99999999999", "1", "253402300800", "99999999999999", "4102444800"]: odd(f"the clock: {clock}", env={"LD_PRELOAD": SHIM, "ODD_CLOCK": clock})
# File systems that refuse a call for good, or are odd.
for call, error, name in [("lock", 37, "ENOLCK"), ("lock", 95, "EOPNOTSUPP"), ("lock", 22, "EINVAL"), ("lock", 38, "ENOSYS"), ("lock", 13, "EACCES"), ("fsync", 22, "EINVAL"), ("fsync", 38, "ENOSYS"), ("rename", 18, "EXDEV"),
                          ("link", 1, "EPERM"), ("mmap", 19, "ENODEV"), ("mmap", 22, "EINVAL"), ("write", 122, "EDQUOT"), ("write", 27, "EFBIG"), ("open", 116, "ESTALE"), ("read", 116, "ESTALE"),
                          ("open", 13, "EACCES"), ("open", 40, "ELOOP"), ("open", 23, "ENFILE"), ("mkdir", 30, "EROFS"), ("open", 30, "EROFS"), ("rename", 1, "EPERM"), ("unlink", 1, "EPERM"), ("unlink", 16, "EBUSY"), ("ftruncate", 22, "EINVAL"), ("list", 12, "ENOMEM"),
                          ("stat", 13, "EACCES"), ("read", 21, "EISDIR"), ("write", 5, "EIO"), ("fsync", 28, "ENOSPC"), ("read", 125, "ECANCELED"), ("write", 11, "EAGAIN"), ("read", 11, "EAGAIN")]:
    odd(f"{call} never works: {name}", env=shim(call, error), ends="sound")
for call in ["read", "write", "open", "fsync", "lock", "ftruncate"]: odd(f"every other {call} is interrupted", env=shim(call, 4, "other"), ends="sound" if call in ("read", "lock") else "same")
for call in ["read", "write"]: odd(f"every {call} takes 7 bytes", env=shim(call, 0, "tiny"))
odd("every read of a model takes 7 bytes", env=shim("read", 0, "tiny", "nano-llama"))
odd("models cannot be mapped", env=shim("mmap", 19, path="nano-llama"), ends="sound")
odd("lists without kinds", env={"LD_PRELOAD": SHIM, "ODD_KINDS": "1"})
odd("lists without kinds, done", env={"LD_PRELOAD": SHIM, "ODD_KINDS": "1"}, state="done")


def small_disk(kilobytes, command=None):
    """`runs` on a file system of its own."""
    def make(p):
        (p / "small-disk").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", p / "small-disk"], check=True)
        subprocess.run(["cp", "-r", f"{p / 'runs'}/.", p / "small-disk"], check=True)
        return ["sh", "-c", 'cd "$1"; shift; "$@"; code=$?; umount -l small-disk; exit $code', "--", p, *argv(command or ["--runs", "small-disk", "run"])]
    return make


for kilobytes in [40, 100, 200, 400, 800, 1600]: odd(f"a disk of {kilobytes} kB", before=small_disk(kilobytes), ends="sound")


for option in ["--recipe", "--resolved"]:
    odd(f"a recipe in a folder that is no UTF-8, {option}", command=lambda p, option=option: ["run" if option == "--recipe" else "plan", *([option] if option == "--resolved" else []), "--json", "--recipe", "\udcff/recipe.toml"],
        before=lambda p: (p / "\udcff").mkdir() or shutil.copy(p / "recipe.toml", p / "\udcff/recipe.toml") and None, ends="sound")
# Names and places.
def named(name):
    """The project in a folder of that name."""
    def make(p):
        inner = p / "named"
        inner.mkdir()
        for f in list(p.iterdir()):
            if f != inner: f.rename(inner / f.name)
        at = p
        for part in Path(name).parts[:-1]:
            # Longer than a path may be.
            os.mkdir(at / part)
            os.chdir(at)
            at = Path(part)
        os.chdir(at)
        os.rename(inner, Path(name).name)
        os.chdir(Path(name).name)
        return ["sh", "-c", '"$@"; code=$?; cp -r . "$0"; exit $code', p, *argv("run")]
    return make


for name in ["with blanks", "line\nbreak", "tab\there", "ü", "u\u0308", "日本語", "🦀", "-dash", "--", "$HOME", "`x`", "'\"", "a;b", "*?[x]", "{a,b}", "%s%n", "~", "#hash", "&amp;<b>", "\u202ertl", "\u200b", "\x1b[31m", "\udcff\udcfe", "a" * 255, "/".join(["b" * 200] * 15), "trailing ", "trailing.", "con", "runs", "C:\\x", "s3:"]:
    odd(f"a folder {name[:20]!r}", command="here", before=named(name))
for name in ["with blanks", "ü", "日本語", "🦀", "-dash", "a" * 255, "a" * 200, "a" * 240, "..", ".", "", "a/b", "/abs", "a\nb", "a\0b", "shared", "CON", "run.json", " ", "ﬀ", "a.tmp", "x.lock"]:
    odd(f"the run's name {name[:20]!r}", command=lambda p, name=name: ["run", "--set", f"name={json.dumps(name)}"] if "\0" not in name else ["run", "--set", 'name="a\\u0000b"'], ends="sound")
for runs in ["-runs", "a/b/c/d", "./runs/../runs", "/dev/null", "/proc/self/fd", "recipe.toml", "runs/small", "file://runs", "~/x", "s3:/x", "a" * 300, "\udcff"]:
    odd(f"--runs {runs[:20]!r}", command=lambda p, runs=runs: [f"--runs={runs}", "run"], ends="sound")
odd("the working folder cannot be read", shell="chmod 311 .", before=lambda p: [*OTHER_USER, *argv("run")] if not (p / "runs").chmod(0o777) else None, then=lambda p, r: p.chmod(0o777), ends="sound")


# What lies where a file or folder is wanted.
def instead(path, make):
    def put(p):
        at = Path(os.path.normpath(p / "runs/small" / path))
        subprocess.run(["rm", "-rf", at])
        at.parent.mkdir(parents=True, exist_ok=True)
        make(at)
    return put


def back(place):
    """What was there is there again."""
    def put(p, r):
        at, was = (Path(os.path.normpath(x / "small" / place)) for x in (p / "runs", before["done"]))
        subprocess.run(["rm", "-rf", at])
        if was.exists(): subprocess.run(["cp", "-r", was, at], check=True)
        # Tables of results that could not be read are kept under other names.
        for table in (p / "runs/small/eval").glob("*-????????.parquet"): table.unlink()
    return put


THINGS = {"a folder": lambda at: (at / "x").mkdir(parents=True), "a link to nothing": lambda at: at.symlink_to("nothing"), "a link to itself": lambda at: at.symlink_to(at),
          "a pipe": os.mkfifo, "a socket": lambda at: os.mknod(at, stat.S_IFSOCK | 0o600),
          "a link to /dev/zero": lambda at: at.symlink_to("/dev/zero"), "a link to /dev/null": lambda at: at.symlink_to("/dev/null"), "a link to /dev/full": lambda at: at.symlink_to("/dev/full")}
PLACES = ["run.json", "log.jsonl", "report.html", "train.lock", "eval.lock", "export.lock", "examples/index.json", "labels/labels-00000.parquet", "labels/index.json", "features/features-00001.parquet", "checkpoints/step-000006/state.json",
          "checkpoints/step-000006/model.safetensors", "train/metrics.jsonl", "eval/results.json", "eval/agreement.parquet", "export/config.json", "export/model.safetensors", "export/README.md"]
for place in PLACES:
    for thing, make in THINGS.items(): odd(f"{thing} as {place}", state="done", before=instead(place, make), ends="sound", then=back(place))
for place in ["examples", "labels", "features", "train", "checkpoints", "eval", "export", "tb", "eval/contexts", "../small", "../../runs"]:
    for thing in ["a file", "a link to nothing", "a link to itself", "a pipe"]:
        make = (lambda at: at.write_text("x")) if thing == "a file" else THINGS[thing]
        odd(f"{thing} as {place}/", state="done", before=instead(place, make), ends="sound", then=back(place))


def moved(p, at):
    """A folder that is elsewhere, and linked."""
    (p / "elsewhere").mkdir()
    shutil.move(p / at, p / "elsewhere/it")
    (p / at).symlink_to(p / "elsewhere/it")


for place in ["runs", "runs/small", "runs/small/examples", "runs/small/labels", "runs/small/features", "runs/small/checkpoints", "runs/small/eval", "runs/small/export", "runs/small/train"]:
    odd(f"{place} is a link", state="done", before=lambda p, at=place: moved(p, at))
    odd(f"{place} is a link, and all is made again", command=["run", *(x for s in STAGES for x in ("--redo", s))], state="done", before=lambda p, at=place: moved(p, at))


# Other users, and what may not be written.
def as_nobody(command, mode=None, own=()):
    def make(p):
        p.chmod(0o777)
        if mode is not None: subprocess.run(["chmod", "-R", mode, p / "runs"], check=True)
        for path in own: subprocess.run(["chown", "-R", "65534:65534", p / path], check=True)
        return [*OTHER_USER, *argv(command)]
    return make


WRITERS = ["report", "run", "export", "train", "eval", "push"]
READERS = {"inspect runs/small": ["inspect", "runs/small"], "inspect labels": ["inspect", "runs/small/labels"], "inspect checkpoint": ["inspect", "runs/small/checkpoints/step-000006"], "infer": INFER[:-2], "plan": ["plan"], "plan --calibrate": ["plan", "--calibrate", "runs/small"], "eval --show": ["eval", "--show", "1"], "prepare --show": ["prepare", "--show", "1"], "report": ["report"], "run": ["run"], "export": ["export"], "train": ["train"], "eval": ["eval"],
           "push": ["push", "runs/small", "--repo", "me/mapper", "--json"]}
for name, command in READERS.items():
    odd(f"another user's run, {name}", state="done", before=as_nobody(command, "a+rX,og-w"), ends="sound" if name in WRITERS else "same")
    odd(f"another user's run that may not be read, {name}", state="done", before=as_nobody(command, "og-rwx"), ends="sound" if name in ("plan",) else "refused")
    odd(f"a run on a read-only file system, {name}", state="done", before=lambda p, command=command: subprocess.run(["mount", "--bind", p / "runs", p / "runs"], check=True) and subprocess.run(["mount", "-o", "remount,ro,bind", p / "runs"], check=True)
        and ["sh", "-c", 'r=$1; shift; "$@"; code=$?; umount -l "$r"; exit $code', "--", p / "runs", *argv(command)], ends="sound" if name in WRITERS else "same")
odd("another user's half-made run", state="train", before=as_nobody("run", "a+rX,og-w"), ends="refused")
odd("another user's run that all may write", state="train", before=as_nobody("run", "a+rwX"))
odd("a folder of one's own below another user's run", state="eval", before=lambda p: (p / "runs/small/eval").mkdir() or as_nobody("eval", "a+rX,og-w", ["runs/small/eval"])(p), ends="sound")
odd("files that cannot be changed (chattr +i)", command=["run", "--redo", "export"], state="done", before=lambda p: subprocess.run(["chattr", "-R", "+i", p / "runs/small/export"], check=True) and None, ends="refused")
odd("one file that cannot be changed", command=["run", "--redo", "export"], state="done", before=lambda p: subprocess.run(["chattr", "+i", p / "runs/small/export/config.json"], check=True) and None, ends="refused")
odd("a folder that takes no new names", command=["run", "--redo", "train", "--redo", "eval", "--redo", "export"], state="done", before=lambda p: subprocess.run(["chattr", "+i", p / "runs/small"], check=True) and None, ends="sound")


def later(seconds, script):
    """Something happens to the folder while the program is at work."""
    return f"(sleep {seconds}; {script}) >/dev/null 2>&1 &"


for seconds in [0.4, 0.8, 1.2, 2]:
    odd(f"the run folder is moved after {seconds} s", shell=later(seconds, "mv runs/small runs/other"), ends="sound", then=lambda p, r: subprocess.run(["rm", "-rf", p / "runs/other"]) and None)
    odd(f"runs is moved after {seconds} s, and a new one made", shell=later(seconds, "mv runs old; mkdir runs"), ends="sound")
    odd(f"the run folder is removed after {seconds} s", shell=later(seconds, "rm -rf runs/small"), ends="sound")
    odd(f"all files lose their rights after {seconds} s", shell=later(seconds, "chattr -R +i runs; sleep 1; chattr -R -i runs"), ends="sound")
    odd(f"all shards are emptied after {seconds} s", shell=later(seconds, "find runs -name '*.parquet' -exec truncate -s 0 {} +"), ends="sound", signals=(7,), then=lambda p, r: subprocess.run(["rm", "-rf", p / "runs/small"]) and None)
    odd(f"the models' files are moved after {seconds} s", before=lambda p: (p / "recipes").unlink() or shutil.copytree(TREE / "recipes/nano-llama", p / "recipes/nano-llama") and None, shell=later(seconds, "mv recipes/nano-llama gone; sleep 1; mv gone recipes/nano-llama"), ends="sound")
    odd(f"the recipe is emptied after {seconds} s", shell=later(seconds, "cp recipe.toml was; : >recipe.toml; sleep 1; cp was recipe.toml"), ends="sound", then=lambda p, r: (p / "recipe.toml").write_text(RECIPE) and None)
for stamp in ["1970-01-01", "2100-01-01", "1901-12-14"]: odd(f"files of {stamp}", command=["run", "--redo", "eval"], state="done", before=lambda p, stamp=stamp: subprocess.run(f"find runs -exec touch -h -d {stamp} {{}} +", shell=True, cwd=p) and None)
odd("hard links to another run", state="done", before=lambda p: subprocess.run("cp -al runs/small keep && cp -r keep was", shell=True, cwd=p) and None, command=["run", *(x for s in STAGES for x in ("--redo", s))],
    then=lambda p, r: ["the other run is changed"] if subprocess.run("for f in $(cd was; find . -type f | grep -v -e lock -e log.jsonl); do cmp -s keep/$f was/$f || exit 1; done", shell=True, cwd=p).returncode else [])
odd("stray files everywhere", state="done", before=lambda p: subprocess.run("for d in $(find runs -type d); do touch $d/.DS_Store $d/Thumbs.db $d/x~ $d/.nfs0001 $d/a.bak; mkdir -p $d/.ipynb_checkpoints; done", shell=True, cwd=p) and None,
    then=lambda p, r: subprocess.run("find runs \\( -name .DS_Store -o -name Thumbs.db -o -name x~ -o -name '.nfs*' -o -name a.bak -o -name .ipynb_checkpoints \\) -exec rm -rf {} +", shell=True, cwd=p) and None)
odd("10,000 stray files", state="done", before=lambda p: subprocess.run("cd runs/small/labels && seq 10000 | xargs touch", shell=True, cwd=p) and None, then=lambda p, r: subprocess.run("cd runs/small/labels && seq 10000 | xargs rm", shell=True, cwd=p) and None)

# A mount that was left is of no use to a folder that is made again.
random.Random(1).shuffle(CASES)
with Jobs(tally) as jobs:
    for name, *args in CASES:
        if not ONLY or any(x in name for x in ONLY): jobs.add(case, name, *args)
tally.end()
