//! `launch slurm` on a real Slurm of one machine (`scripts/slurm/cluster.sh`), where workers are killed and
//! pre-empted, and the controller is killed; the run folder is on disk or in a bucket.
//!
//! Skipped, with a line that says so, where Slurm is not installed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use pkv_test_support::bucket::{Fault, Kind, Server};
use serde_json::Value;

use crate::sandbox::{Ran, Sandbox, root};
use crate::workers::{LONGER, program, same_as_one_process, sandbox, signatures};

/// A cluster that ends with the test. There is one at a time: its workers want all of the machine.
struct Cluster {
    folder: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// `None` where Slurm is not installed.
    fn start(s: &Sandbox, nodes: usize) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let this = Self { folder: s.path("slurm"), _alone };
        let out = this.control("start", &[&nodes.to_string()]);
        if out.status.code() == Some(3) {
            // Past the harness, which shows the output of failing tests only.
            let why = String::from_utf8_lossy(&out.stderr).replace('\n', " ");
            std::io::stderr().write_all(format!("SKIPPED: Slurm: {why}\n").as_bytes()).unwrap();
            return None;
        }
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(this)
    }

    fn control(&self, what: &str, more: &[&str]) -> Output {
        let script = root().join("scripts/slurm/cluster.sh");
        Command::new(script).arg(what).arg(&self.folder).args(more).output().unwrap()
    }

    fn configuration(&self) -> PathBuf {
        self.folder.join("slurm.conf")
    }

    /// stdout of one of Slurm's commands, which must succeed.
    fn ask(&self, name: &str, args: &[&str]) -> String {
        let out = Command::new(name).args(args).env("SLURM_CONF", self.configuration()).output().unwrap();
        assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Jobs that go back to the queue wait there for two minutes: not here.
    fn hurry(&self) {
        for line in self.ask("squeue", &["-h", "-r", "-t", "PD", "-o", "%A %r"]).lines() {
            if let Some((id, "BeginTime")) = line.split_once(' ') {
                self.ask("scontrol", &["update", &format!("JobId={id}"), "StartTime=now"]);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.configuration().exists() {
            let _ = Command::new("scancel").arg("--me").env("SLURM_CONF", self.configuration()).status();
            self.control("stop", &[]);
        }
    }
}

/// Wait for `what` until it is there.
fn await_some<T>(what: &str, secs: u64, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(secs), "{what}: not within {secs} s");
        sleep(Duration::from_millis(50));
    }
}

/// When each whole shard of labels was written.
fn written(s: &Sandbox) -> BTreeMap<String, SystemTime> {
    let entries = fs::read_dir(s.path("runs/small/labels")).into_iter().flatten().flatten();
    let shards = entries.filter(|e| e.path().extension().is_some_and(|e| e == "parquet"));
    shards
        .map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().modified().unwrap()))
        .collect()
}

/// The launched chain of the sandbox's run: its jobs.
struct Chain {
    jobs: Value,
}

impl Chain {
    /// What `launch` with `more` submits, in the environment `variables`.
    fn launch(s: &Sandbox, cluster: &Cluster, more: &[&str], variables: &[(&str, &str)]) -> Ran {
        let program = program();
        let own = ["launch", "slurm", "--json", "--recipe", "recipe.toml", "--profile", "site.toml"];
        let workers = ["--workers", "4", "--gpus-per-worker", "0", "--set", &program];
        let mut command = s.command(&[&own[..], &workers, &LONGER, more].concat());
        command.envs(variables.iter().copied()).env("SLURM_CONF", cluster.configuration());
        Ran::new(command.output().unwrap())
    }

    fn of(launched: Ran) -> Self {
        Self { jobs: serde_json::from_str(&launched.ok().stdout).unwrap() }
    }

    fn id_of(&self, stage: &str) -> String {
        let job = self.jobs.as_array().unwrap().iter().find(|job| job["stage"] == stage).unwrap();
        job["id"].as_str().unwrap().to_owned()
    }

    /// Kill a worker of `label`, pre-empt another one, kill the controller, and wait for the chain's end.
    /// `begun`: signatures of the processes that have a piece.
    fn disturb(&self, cluster: &Cluster, begun: &[Value]) {
        let label = self.id_of("label");
        // Worker 1 is killed, as by a machine without memory.
        let worker = begun.iter().find(|by| by["task"] == "1/4").expect("worker 1 has begun a piece");
        let worker = worker["pid"].to_string();
        assert!(Command::new("kill").args(["-9", &worker]).status().unwrap().success());
        // Worker 2 is pre-empted: its node goes to a job of higher priority.
        let node = cluster.ask("squeue", &["-h", "-r", "-j", &format!("{label}_2"), "-o", "%N"]);
        cluster.ask("sbatch", &["-p", "high", "-w", node.trim(), "-o", "/dev/null", "--wrap", "sleep 1"]);
        let restarts = |task: &str| {
            let shown = cluster.ask("scontrol", &["show", "job", &format!("{label}_{task}")]);
            let count = shown.split("Restarts=").nth(1).and_then(|rest| rest.split(' ').next());
            count.and_then(|n| n.parse::<u32>().ok()).unwrap_or(0)
        };
        for task in ["1", "2"] {
            await_some("a restart of the worker", 60, || (restarts(task) == 1).then_some(()));
        }
        assert_eq!((restarts("0"), restarts("3")), (0, 0));
        // The controller is killed, and comes back with what it had saved.
        let (seen, state) = (SystemTime::now(), cluster.folder.join("state/job_state"));
        let saved = || fs::metadata(&state).and_then(|m| m.modified()).is_ok_and(|when| when > seen);
        await_some("the controller's state on disk", 60, || saved().then_some(()));
        assert!(cluster.control("controller", &[]).status.success());

        await_some("the end of the chain", 400, || {
            cluster.hurry();
            sleep(Duration::from_millis(500));
            cluster.ask("squeue", &["-h"]).trim().is_empty().then_some(())
        });
        let report = cluster.ask("scontrol", &["show", "job", &self.id_of("report")]);
        assert!(report.contains("JobState=COMPLETED"), "{report}");
    }
}

/// Whether each of the four workers has begun a piece.
fn all_have_begun(begun: &[Value]) -> bool {
    (0..4).all(|k| begun.iter().any(|by| by["task"] == format!("{k}/4")))
}

#[test]
fn workers_killed_and_pre_empted_make_the_bytes_of_one_process() {
    let s = sandbox();
    let Some(cluster) = Cluster::start(&s, 4) else { return };
    // What a line of `#SBATCH` would cut or split.
    let comment = "--comment=it's \"two\" # words; $(x)";
    let profile =
        format!("[slurm]\npartition = \"low\"\noptions = ['''{comment}''']\nlines = [\"export LINE=1\"]\n");
    s.write("site.toml", &profile);
    let chain = Chain::of(Chain::launch(&s, &cluster, &[], &[]));
    assert_eq!(
        cluster.ask("squeue", &["-h", "-j", &chain.id_of("report"), "-o", "%k"]).trim(),
        &comment["--comment=".len()..]
    );
    Chain::launch(&s, &cluster, &[], &[]).fails_with(&["is in the queue", "scancel"]);

    // Once every worker has a piece, and some pieces are done.
    let begun = await_some("a piece of every worker", 120, || {
        let begun = signatures(&s.path("runs/small/labels/pieces"));
        (all_have_begun(&begun) && written(&s).len() >= 3).then_some(begun)
    });
    let whole = written(&s);
    chain.disturb(&cluster, &begun);
    same_as_one_process(&s);
    let after = written(&s);
    for (shard, when) in &whole {
        assert_eq!(after.get(shard), Some(when), "{shard} was whole, and was made again");
    }
    assert!(s.path("runs/small/report.html").exists());
}

#[test]
fn nodes_that_share_nothing_but_a_bucket_make_the_bytes_of_one_process() {
    let (s, server) = (sandbox(), Server::start(Kind::S3));
    let Some(cluster) = Cluster::start(&s, 4) else { return };
    // Each node has a cache of its own, as a machine.
    let line = "export PKV_BUCKET_CACHE=$PWD/caches/$SLURMD_NODENAME";
    s.write("site.toml", &format!("[slurm]\npartition = \"low\"\nlines = [{line:?}]\n"));
    let mut variables = server.variables("key-of-the-bucket", "secret-key-of-the-bucket");
    variables.extend([("PKV_BUCKET_LEASE_S", "5"), ("PKV_BUCKET_TIMEOUT_S", "5")]);
    let here = s.path("caches/here").display().to_string();
    variables.push(("PKV_BUCKET_CACHE", &here));
    server.every_nth(11, &[Fault::Status(503), Fault::HangUp, Fault::LoseAnswer, Fault::HalfBody]);
    let chain = Chain::of(Chain::launch(&s, &cluster, &["--runs", "s3://b/runs"], &variables));
    let shard = |name: &str| name.ends_with(".parquet");
    let labels = || server.objects("/b/runs/small/labels/");
    let begun = await_some("a piece of every worker", 120, || {
        let begun: Vec<Value> = (1..=4).flat_map(|node| at_work(&s, node)).collect();
        let whole = labels().keys().filter(|name| shard(name)).count();
        (all_have_begun(&begun) && whole >= 3).then_some(begun)
    });
    // What has a marker is whole.
    let marked = labels();
    let whole = |name: &str| {
        let number = name.trim_end_matches(".parquet").rsplit('-').next().unwrap();
        shard(name) && marked.contains_key(&format!("pieces/{number}.json"))
    };
    drop(server.requests(""));
    chain.disturb(&cluster, &begun);
    let again: Vec<String> = server.requests("PUT /b/runs/small/labels/labels-");
    for name in marked.keys().filter(|name| whole(name)) {
        assert!(!again.iter().any(|put| put.contains(name.as_str())), "{name} was whole, and was made again");
    }
    for (name, content) in server.objects("/b/runs/small/") {
        if !name.ends_with(".lease") {
            let path = s.path("runs/small").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }
    same_as_one_process(&s);
    assert!(s.path("runs/small/report.html").exists());
}

/// Signatures of the pieces of `label` in the cache of a node.
fn at_work(s: &Sandbox, node: usize) -> Vec<Value> {
    let folder = fs::read_dir(s.path(&format!("caches/n{node}"))).into_iter().flatten().flatten().next();
    folder.map_or_else(Vec::new, |folder| signatures(&folder.path().join("files/runs/small/labels/pieces")))
}
