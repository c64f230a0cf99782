//! `launch slurm` on a real Slurm of one machine (`scripts/slurm/cluster.sh`), where workers are killed and
//! pre-empted, and the controller is killed.
//!
//! Skipped, with a line that says so, where Slurm is not installed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::sandbox::{Ran, Sandbox, root};
use crate::workers::{LONGER, program, same_as_one_process, sandbox, signatures};

/// A cluster that ends with the test.
struct Cluster {
    folder: PathBuf,
}

impl Cluster {
    /// `None` where Slurm is not installed.
    fn start(s: &Sandbox, nodes: usize) -> Option<Self> {
        let this = Self { folder: s.path("slurm") };
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

#[test]
fn workers_killed_and_pre_empted_make_the_bytes_of_one_process() {
    let s = sandbox();
    let Some(cluster) = Cluster::start(&s, 4) else { return };
    let program = program();
    // What a line of `#SBATCH` would cut or split.
    let comment = "--comment=it's \"two\" # words; $(x)";
    let profile =
        format!("[slurm]\npartition = \"low\"\noptions = ['''{comment}''']\nlines = [\"export LINE=1\"]\n");
    s.write("site.toml", &profile);
    let launch = || {
        let own = [
            "launch",
            "slurm",
            "--json",
            "--recipe",
            "recipe.toml",
            "--profile",
            "site.toml",
            "--set",
            &program,
        ];
        let workers = ["--workers", "4", "--gpus-per-worker", "0"];
        let mut command = s.command(&[&own[..], &workers, &LONGER].concat());
        Ran::new(command.env("SLURM_CONF", cluster.configuration()).output().unwrap())
    };
    let submitted: Value = serde_json::from_str(&launch().ok().stdout).unwrap();
    let id_of = |stage: &str| {
        let job = submitted.as_array().unwrap().iter().find(|job| job["stage"] == stage).unwrap();
        job["id"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        cluster.ask("squeue", &["-h", "-j", &id_of("report"), "-o", "%k"]).trim(),
        &comment["--comment=".len()..]
    );
    launch().fails_with(&["is in the queue", "scancel"]);

    // Once every worker has a piece, and some pieces are done.
    let pieces = s.path("runs/small/labels/pieces");
    await_some("a piece of every worker", 120, || {
        let begun = signatures(&pieces);
        let all = (0..4).all(|k| begun.iter().any(|by| by["task"] == format!("{k}/4")));
        (all && written(&s).len() >= 3).then_some(())
    });
    let label = id_of("label");
    let whole = written(&s);
    // Worker 1 is killed, as by a machine without memory.
    let begun = signatures(&pieces);
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
    let report = cluster.ask("scontrol", &["show", "job", &id_of("report")]);
    assert!(report.contains("JobState=COMPLETED"), "{report}");
    same_as_one_process(&s);
    let after = written(&s);
    for (shard, when) in &whole {
        assert_eq!(after.get(shard), Some(when), "{shard} was whole, and was made again");
    }
    assert!(s.path("runs/small/report.html").exists());
}
