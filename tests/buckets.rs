//! Run folders in a bucket, of an S3 server on the loopback interface: the same bytes as on disk through
//! faults of the network, by several machines, killed or not; and no key in anything that is said or
//! written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pkv_core::FailureKind;
use pkv_test_support::bucket::{Fault, Kind, Server};
use pkv_test_support::files::files_below;
use serde_json::Value;
use tempfile::TempDir;

use crate::infer::trained;
use crate::sandbox::{Ran, Running, Sandbox, timeless};

const SECRET: &str = "secret-key-of-the-bucket";

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
            .env("AWS_ENDPOINT_URL", &self.server.endpoint)
            .env("AWS_ACCESS_KEY_ID", "key-of-the-bucket")
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            .env("AWS_REGION", "here")
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
        let all = [args, &["--recipe", "recipe.toml", "--runs", "s3://b/runs"]].concat();
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
    let (s, server) = (Sandbox::new(), Server::start(Kind::S3));
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
    m.run(&["sweep", "--vary", "train.steps=3,4"]).fails_as(usage, &["`sweep`", "links"]);
    m.run(&["launch", "slurm"]).fails_as(usage, &["`launch`", "--task K/N"]);
    for bad in ["s3://", "ftp://b/x", "s3://key:word@b/x"] {
        let ran = m.read(&["label", "--recipe", "recipe.toml", "--runs", bad]);
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
