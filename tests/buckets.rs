//! Run folders in a bucket, of servers as Amazon's, Google's and Azure's on the loopback interface: the same
//! bytes as on disk through faults of the network, by several machines, killed or not, launched or swept; and
//! no key in anything that is said or written.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pkv_core::FailureKind;
use pkv_test_support::bucket::{Fault, Kind, Server};
use pkv_test_support::files::files_below;
use serde_json::Value;
use tempfile::TempDir;

use crate::sandbox::{Ran, Running, Sandbox, timeless};
use crate::trained::trained;
use crate::workers::program;

/// Azure takes base64 alone.
const SECRET: &str = "c2VjcmV0LWtleS1vZi10aGUtYnVja2V0";

/// What networks and servers under load do, one after another.
const FAULTS: [Fault; 6] = [
    Fault::Status(500),
    Fault::Status(503),
    Fault::HangUp,
    Fault::LoseAnswer,
    Fault::HalfBody,
    Fault::Status(412),
];

/// A machine with a cache of its own.
struct Machine<'a> {
    s: &'a Sandbox,
    server: &'a Server,
    cache: TempDir,
    /// Seconds after which a claim ends.
    lease: &'static str,
}

impl<'a> Machine<'a> {
    fn new(s: &'a Sandbox, server: &'a Server) -> Self {
        Self { s, server, cache: TempDir::new().unwrap(), lease: "60" }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.s.command(args);
        command
            .env("HOME", self.cache.path())
            .envs(self.server.variables("key-of-the-bucket", SECRET))
            .env("PKV_BUCKET_CACHE", self.cache.path())
            .env("PKV_BUCKET_TIMEOUT_S", "5")
            .env("PKV_BUCKET_LEASE_S", self.lease);
        command
    }

    /// A command of the run in the bucket.
    fn run(&self, args: &[&str]) -> Ran {
        self.start(args).end()
    }

    fn start(&self, args: &[&str]) -> Running {
        let runs = format!("{}://b/runs", self.server.kind.scheme());
        let all = [args, &["--recipe", "recipe.toml", "--runs", &runs]].concat();
        Running::new(&mut self.command(&all))
    }

    /// A command that names the run by its address.
    fn read(&self, args: &[&str]) -> Ran {
        Ran::new(self.command(args).output().unwrap())
    }
}

/// Objects of the run below a folder.
fn objects(server: &Server, folder: &str) -> BTreeMap<String, Vec<u8>> {
    server.objects(&format!("/b/runs/small/{folder}/"))
}

/// Files of the run on disk below a folder.
fn on_disk(folder: &str) -> BTreeMap<String, Vec<u8>> {
    files_below(&trained().path("runs/small").join(folder))
}

/// What a folder and the bucket have of the same kind.
fn same(server: &Server, folder: &str, is_compared: impl Fn(&str) -> bool) {
    let mut disk = on_disk(folder);
    let mut there = objects(server, folder);
    disk.retain(|name, _| is_compared(name));
    there.retain(|name, _| is_compared(name));
    assert_eq!(there.keys().collect::<Vec<_>>(), disk.keys().collect::<Vec<_>>(), "{folder}");
    assert!(!disk.is_empty() && there == disk, "{folder}: other bytes");
}

const POLICIES: [&str; 2] =
    ["--set", "eval.answer_policies=[\"pair\",\"pair-floor\",\"pair-uniform\",\"pair-budget\"]"];

#[test]
fn a_run_in_a_bucket_has_the_bytes_of_one_on_disk_and_no_key_is_said() {
    let (s, server) = (Sandbox::new(), Server::start(Kind::S3));
    let (a, b) = (Machine::new(&s, &server), Machine::new(&s, &server));
    server.every_nth(5, &FAULTS);
    let mut said = String::new();
    let mut hear = |ran: Ran| {
        said += &format!("{}{}", ran.stdout, ran.stderr);
        ran
    };
    for stage in ["prepare", "label", "extract", "train"] {
        hear(a.run(&[stage, "-vv"]).ok());
    }
    // A machine that has seen nothing of it goes on.
    hear(b.run(&[&["eval"][..], &POLICIES].concat()).ok());
    hear(b.run(&[&["export"][..], &POLICIES].concat()).ok());
    hear(a.run(&[&["report"][..], &POLICIES].concat()).ok());
    for folder in ["examples", "labels", "features"] {
        same(&server, folder, |name| !name.ends_with(".lock"));
    }
    same(&server, "checkpoints", |name| name.ends_with(".safetensors"));
    same(&server, "export", |name| name.ends_with(".safetensors"));
    let results = |all: BTreeMap<String, Vec<u8>>| timeless(&all["results.json"]);
    assert_eq!(results(objects(&server, "eval")), results(on_disk("eval")));
    assert!(server.objects("/b/runs/small/").contains_key("report.html"));
    let left: Vec<String> = server.objects("/b/").into_keys().collect();
    let is_of_here =
        |name: &String| [".lock", ".lease", ".tmp", "log.jsonl"].iter().any(|e| name.ends_with(e));
    assert!(!left.iter().any(is_of_here), "{left:?}");
    assert!(server.state().uploads.is_empty());

    // What is complete is skipped, wherever it was made.
    server.requests("");
    let again = hear(b.run(&["label"]).ok());
    assert!(again.stderr.contains("label: skipped"), "{}", again.stderr);
    assert!(server.requests(".parquet").is_empty(), "no shard is fetched for that");
    let c = Machine::new(&s, &server);
    let shown = hear(c.read(&["inspect", "s3://b/runs/small"]).ok());
    assert!(shown.stdout.contains("label"), "{}", shown.stdout);
    hear(c.read(&["inspect", "s3://b/runs/small/labels"]).ok());
    let status =
        hear(c.read(&["launch", "status", "--run", "small", "--runs", "s3://b/runs", "--json"]).ok());
    assert!(status.stdout.contains("\"done\""), "{}", status.stdout);
    s.write("context.txt", crate::sandbox::documents().split('\0').next().unwrap());
    let infer = ["infer", "--mapper", "s3://b/runs/small", "--context", "context.txt", "--question", "What?"];
    hear(c.read(&infer).ok());

    let mut written = said;
    for cache in [&a.cache, &b.cache, &c.cache] {
        for content in files_below(cache.path()).into_values() {
            written += &String::from_utf8_lossy(&content);
        }
    }
    let authorizations = std::mem::take(&mut server.state().seen_authorization);
    let signature =
        authorizations.iter().find_map(|a| Some(a.split_once("Signature=")?.1.to_owned())).unwrap();
    for secret in [SECRET, "key-of-the-bucket", "Signature=", signature.as_str()] {
        assert!(!written.contains(secret), "`{secret}` was said or written");
    }
}

/// Markers of a stage's pieces, by object.
fn markers(server: &Server, folder: &str) -> BTreeMap<String, Value> {
    let all = objects(server, &format!("{folder}/pieces"));
    let markers = all.into_iter().filter(|(name, _)| name.ends_with(".json") && name != "plan.json");
    markers.map(|(name, text)| (name, serde_json::from_slice(&text).unwrap())).collect()
}

#[test]
fn machines_share_a_stage_in_a_bucket_and_what_a_killed_one_finished_is_kept() {
    let (s, server) = (Sandbox::new(), Server::start(Kind::Google));
    let (mut a, mut b) = (Machine::new(&s, &server), Machine::new(&s, &server));
    a.run(&["prepare"]).ok();
    // A claim of a piece that is lost too early is work done twice, no more.
    (a.lease, b.lease) = ("2", "2");
    let mut killed = a.start(&["label", "--task", "0/1"]);
    assert!(killed.wait_until(|| !markers(&server, "labels").is_empty()), "it ended by itself");
    killed.kill_after(Duration::ZERO);
    let finished = markers(&server, "labels");
    server.every_nth(6, &FAULTS);
    // The half of another machine, while the first one's claim ends; then what the first one left.
    let half = b.run(&["label", "--task", "1/2"]).ok();
    assert!(half.stderr.contains("missing: ") || half.stderr.contains("label: done"), "{}", half.stderr);
    let now = markers(&server, "labels");
    if !now.is_empty() {
        for (name, marker) in &finished {
            assert_eq!(now.get(name), Some(marker), "a finished piece was made again");
        }
    }
    a.run(&["label", "--task", "0/2"]).ok();
    // The killed process's share of the folder stays until a process holds it alone, and counts for nothing.
    same(&server, "labels", |name| !name.ends_with(".lease"));
    // Features by workers that share a cache.
    let (one, other) = (a.start(&["extract", "--task", "0/2"]), b.run(&["extract", "--task", "1/2"]));
    other.ok();
    one.end().ok();
    a.run(&["extract", "--task", "0/1"]).ok();
    same(&server, "features", |name| !name.ends_with(".lease"));
}

#[test]
fn what_a_bucket_cannot_be_used_for_is_refused_with_what_to_do() {
    let (s, server) = (Sandbox::new(), Server::start(Kind::S3));
    let m = Machine::new(&s, &server);
    let usage = FailureKind::Usage;
    for cluster in ["slurm", "k8s"] {
        let key = format!("launch.environment=[\"AWS_SECRET_ACCESS_KEY={SECRET}\"]");
        let ran = m.run(&["launch", cluster, "--dry-run", "--set", &key]);
        assert!(!ran.stderr.contains(SECRET), "{}", ran.stderr);
        ran.fails_as(usage, &["AWS_SECRET_ACCESS_KEY", "launch.k8s.secrets"]);
    }
    for (bad, command) in [
        ("s3://", &["label"][..]),
        ("ftp://b/x", &["label"]),
        ("s3://key:word@b/x", &["label"]),
        ("s3://key:word@b/x", &["launch", "k8s", "--dry-run"]),
    ] {
        let ran = m.read(&[command, &["--recipe", "recipe.toml", "--runs", bad]].concat());
        assert!(!ran.stderr.contains("word@"), "{}", ran.stderr);
        ran.fails_as(usage, &["bucket"]);
    }
    m.read(&["inspect", "s3://b/runs/other"]).fails_with(&["other"]);
    let mut command = m.command(&["label", "--recipe", "recipe.toml", "--runs", "s3://b/runs"]);
    command.env_remove("AWS_ACCESS_KEY_ID").env("AWS_EC2_METADATA_DISABLED", "true");
    Ran::new(command.output().unwrap()).fails_with(&["no credentials", "AWS_PROFILE"]);
    // Nothing listens there.
    let mut command = m.command(&["label", "--recipe", "recipe.toml", "--runs", "s3://b/runs"]);
    command.env("AWS_ENDPOINT_URL", "http://127.0.0.1:1").env("PKV_BUCKET_TIMEOUT_S", "0.1");
    let ran = Ran::new(command.output().unwrap());
    assert!(!ran.stderr.contains(SECRET), "{}", ran.stderr);
    ran.fails_as(FailureKind::Environment, &["s3://b/runs/small"]);
    assert!(!Path::new(&s.path("s3:")).exists() && fs::read_dir(s.path(".")).is_ok());
}

#[test]
fn what_is_launched_for_a_bucket_has_its_address_and_no_key() {
    let s = Sandbox::new();
    // Where jobs are printed there may be no credentials, and no server.
    let print = |args: &[&str]| {
        let secret = "launch.k8s.secrets=[\"bucket-key\"]";
        let region =
            "launch.environment=[\"AWS_REGION=here\", \"GOOGLE_APPLICATION_CREDENTIALS=/etc/key.json\"]";
        let own = [
            "--recipe",
            "recipe.toml",
            "--runs",
            "gs://b/runs",
            "--dry-run",
            "--set",
            secret,
            "--set",
            region,
        ];
        let mut command = s.command(&[&["launch"], args, &own].concat());
        let ran = Ran::new(command.env("GOOGLE_BEARER_TOKEN", SECRET).output().unwrap()).ok();
        assert!(!format!("{}{}", ran.stdout, ran.stderr).contains(SECRET), "{}", ran.stdout);
        ran.stdout
    };
    let chain = print(&["slurm", "--workers", "2"]);
    for part in ["--runs gs://b/runs --device", "mkdir -p runs/small/launch/logs", "export AWS_REGION=here"] {
        assert!(chain.contains(part), "{part}\n{chain}");
    }
    let list: Value = serde_json::from_str(&print(&["k8s"])).unwrap();
    let container = &list["items"][1]["spec"]["template"]["spec"]["containers"][0];
    assert!(container["command"].as_array().unwrap().contains(&"gs://b/runs".into()), "{container}");
    assert_eq!(container["envFrom"][0]["secretRef"]["name"], "bucket-key");
    assert!(!s.path("runs").exists() && !s.path("gs:").exists(), "a dry run writes nothing");
}

/// sbatch as `launch` uses it: the job runs at once, its tasks one after another.
const SBATCH: &str = r#"#!/bin/bash
id=$(($(cat count 2>/dev/null || echo 100) + 1)); echo $id > count
script=$(mktemp -p .); cat > $script
log=$(sed -n 's/^#SBATCH --output=//p' $script); last=$(sed -n 's/^#SBATCH --array=0-//p' $script)
for task in $(seq 0 ${last:-0}); do
  SLURM_ARRAY_TASK_ID=$task bash $script > "$(dirname "$log")/job-$id-$task.txt" 2>&1 || exit 1
done
echo $id
"#;

#[test]
fn jobs_of_a_launch_work_in_the_bucket_and_any_machine_sees_how_far_they_are() {
    let (s, server) = (Sandbox::new(), Server::start(Kind::S3));
    let (a, b) = (Machine::new(&s, &server), Machine::new(&s, &server));
    for (name, script) in [("sbatch", SBATCH), ("squeue", "#!/bin/bash\ncat queue 2>/dev/null\n")] {
        s.write(&format!("bin/{name}"), script);
        fs::set_permissions(s.path(&format!("bin/{name}")), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", s.path("bin").display(), std::env::var("PATH").unwrap());
    let launch = |machine: &Machine, stages: &str| {
        let own = ["launch", "slurm", "--workers", "2", "--gpus-per-worker", "0", "--stages", stages];
        let more = ["--recipe", "recipe.toml", "--runs", "s3://b/runs", "--set", &program()];
        let mut command = machine.command(&[&own[..], &more].concat());
        Ran::new(command.env("PATH", &path).output().unwrap())
    };
    let mut said = launch(&a, "prepare,label").ok().stdout;
    assert!(said.contains("logs in runs/small/launch/logs"), "{said}");
    assert!(said.contains("launch status --run s3://b/runs/small"), "{said}");
    for folder in ["examples", "labels"] {
        same(&server, folder, |name| !name.ends_with(".lock"));
    }
    let logs = files_below(&s.path("runs/small/launch/logs"));
    assert_eq!(logs.keys().collect::<Vec<_>>(), ["job-101-0.txt", "job-102-0.txt", "job-102-1.txt"]);
    let status = b.read(&["launch", "status", "--run", "s3://b/runs/small", "--json"]).ok().stdout;
    let status: Value = serde_json::from_str(&status).unwrap();
    let state = |stage: &str| {
        let all = status["stages"].as_array().unwrap().iter();
        all.filter(|s| s["stage"] == stage).map(|s| s["state"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((state("label"), state("train")), (vec!["done".into()], vec!["not_begun".into()]), "{status}");
    assert_eq!(status["jobs"][1]["id"], "102");
    // Jobs that one machine submitted are known to another.
    s.write("queue", "102 small-label\n");
    launch(&b, "label").fails_with(&["job 102", "is in the queue"]);
    for content in files_below(&s.path("")).into_values() {
        said += &String::from_utf8_lossy(&content);
    }
    for secret in [SECRET, "key-of-the-bucket", "Signature="] {
        assert!(!said.contains(secret), "`{secret}` was said or written");
    }
}

#[test]
fn a_sweep_in_a_bucket_makes_what_is_the_same_once() {
    let (s, server) = (Sandbox::new(), Server::start(Kind::Azure));
    let (a, b) = (Machine::new(&s, &server), Machine::new(&s, &server));
    let sweep = ["sweep", "--vary", "train.steps=6,12", "--set", "eval.contexts=1"];
    // What one run has made on its own becomes the others' too.
    for stage in ["prepare", "label"] {
        a.run(&[stage]).ok();
    }
    let before = objects(&server, "labels");
    server.every_nth(7, &FAULTS);
    let ran = a.run(&sweep).ok();
    server.every_nth(usize::MAX, &FAULTS);
    assert!(ran.stdout.contains("3 runs for"), "{}", ran.stdout);
    let there = server.objects("/b/runs/");
    let keys = |part: &str| there.keys().filter(|key| key.contains(part)).cloned().collect::<Vec<_>>();
    for run in ["small", "small-steps-6", "small-steps-12"] {
        for folder in ["examples", "labels", "features"] {
            let all = keys(&format!("{run}/{folder}/"));
            assert_eq!(all, [format!("{run}/{folder}/shared.link")]);
        }
        let link: Value = serde_json::from_slice(&there[&format!("{run}/labels/shared.link")]).unwrap();
        let folder = link["link"].as_str().unwrap().trim_start_matches("../");
        let labels = server.objects(&format!("/b/runs/{folder}/"));
        assert!(
            !before.is_empty() && labels == before,
            "the labels of `{run}` are not those that were there"
        );
    }
    let mut shared: Vec<String> =
        keys("shared/").iter().map(|key| key.split('/').nth(1).unwrap().into()).collect();
    shared.retain(|name| !name.ends_with(".link"));
    shared.sort();
    shared.dedup();
    let kinds: Vec<&str> = shared.iter().map(|name| name.split('-').next().unwrap()).collect();
    assert_eq!(kinds, ["examples", "features", "labels"], "{shared:?}");

    // A sweep on disk has the same.
    let disk = Sandbox::new();
    disk.run(&sweep).ok();
    for run in ["small", "small-steps-6", "small-steps-12"] {
        let name = "export/model.safetensors";
        assert!(
            there[&format!("{run}/{name}")] == fs::read(disk.path(&format!("runs/{run}/{name}"))).unwrap()
        );
    }
    for name in &shared {
        let mut there = server.objects(&format!("/b/runs/shared/{name}/"));
        there.retain(|file, _| !file.ends_with(".lease"));
        let mut here = files_below(&disk.path(&format!("runs/shared/{name}")));
        here.retain(|file, _| !file.ends_with(".lock"));
        assert!(!here.is_empty() && there == here, "{name}: other bytes");
    }

    // Another machine sees what is there, and makes the labels of one run anew: the others keep theirs.
    let plan = b.run(&[&sweep[..], &["--dry-run"]].concat()).ok().stdout;
    assert!(plan.contains("labels are there") && !plan.contains("to "), "{plan}");
    let shown = b.read(&["inspect", "az://b/runs/small-steps-6/labels"]).ok().stdout;
    assert!(shown.contains("label"), "{shown}");
    let own = ["--set", "name=small-steps-6", "--set", "train.steps=6", "--set", "eval.contexts=1"];
    b.run(&[&["label", "--redo", "label"][..], &own].concat()).ok();
    let now = server.objects("/b/runs/");
    assert!(!now.contains_key("small-steps-6/labels/shared.link"));
    let labels = server.objects("/b/runs/small-steps-6/labels/");
    assert!(labels.keys().eq(before.keys()) && labels["index.json"] == before["index.json"]);
    assert!(
        now.iter().filter(|(key, _)| key.starts_with("shared/")).all(|(key, bytes)| there[key] == *bytes)
    );
    // The first machine finds the labels of that run where they are now.
    let again = a.run(&[&["label"][..], &own].concat()).ok();
    assert!(again.stderr.contains("label: skipped"), "{}", again.stderr);
}
