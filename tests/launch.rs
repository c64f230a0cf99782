//! `launch`: what it prints and refuses, and Jobs of Kubernetes through a stand-in of kubectl.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use pkv_core::FailureKind;
use serde_json::Value;

use crate::sandbox::{Ran, Sandbox};

#[test]
fn what_cannot_be_launched_is_refused_with_its_key() {
    let s = Sandbox::new();
    s.write("site.toml", "[slurm]\npartitoin = \"gpu\"\n");
    s.write("two.toml", "[slurm]\npartition = \"a\\nb\"\n");
    s.write("text.toml", "environment = \"A=b\"\n");
    for (profile, parts) in [
        ("site.toml", ["cannot apply `--profile site.toml`", "did you mean `partition`?"]),
        ("two.toml", ["`launch.slurm.partition` is \"a\\nb\"", "one line"]),
        ("text.toml", ["cannot apply `--profile text.toml`", "a list has brackets"]),
        ("none.toml", ["cannot read profile `none.toml`", "`[launch]`"]),
    ] {
        s.run(&["launch", "slurm", "--dry-run", "--profile", profile]).fails_with(&parts);
    }
    s.run(&["launch", "k8s", "--dry-run", "--set", "launch.k8s.volumes=[\"runs\"]"])
        .fails_with(&["`launch.k8s.volumes[0]` is \"runs\"", "CLAIM:/PATH"]);
    assert_eq!(s.run(&["launch", "slurm", "--workers", "0"]).code, 2);
    assert!(!s.path("runs").exists(), "a refused launch writes nothing");
}

#[test]
fn a_dry_run_prints_what_would_be_submitted() {
    let s = Sandbox::new();
    s.write("site.toml", "[slurm]\npartition = \"gpu\"\n[k8s]\nimage = \"here/it:1\"\n");
    let profile = ["--profile", "site.toml", "--set", "launch.slurm.qos=low", "--set", "train.steps=9"];
    let ran =
        |args: &[&str]| s.run(&[args, &profile[..], &["--dry-run", "--workers", "3"]].concat()).ok().stdout;
    let chain = ran(&["launch", "slurm"]);
    for part in [
        "#SBATCH --partition=gpu\n#SBATCH --qos=low\n",
        "#SBATCH --array=0-2\n",
        "proxykv-train label --recipe recipe.toml --set 'train.steps=9' --runs runs --device cpu --threads 1 --task",
        "eval=$(sbatch --parsable --dependency=afterok:\"$train\"",
    ] {
        assert!(chain.contains(part), "{part}\n{chain}");
    }
    assert!(!chain.contains("launch.slurm.qos"), "workers read no `[launch]`:\n{chain}");
    let jobs: Value =
        serde_json::from_str(&ran(&["--json", "launch", "slurm", "--stages", "extract,label"])).unwrap();
    let stages: Vec<&Value> = jobs.as_array().unwrap().iter().map(|job| &job["stage"]).collect();
    assert_eq!(stages, ["label", "extract"], "stages run in their order");
    let list: Value = serde_json::from_str(&ran(&["launch", "k8s"])).unwrap();
    assert_eq!(list["items"][1]["spec"]["completions"], 3);
    assert_eq!(list["items"][1]["spec"]["template"]["spec"]["containers"][0]["image"], "here/it:1");
    assert!(!s.path("runs").exists(), "a dry run writes nothing");
}

#[test]
fn without_the_tools_of_a_cluster_the_hint_is_a_dry_run() {
    let s = Sandbox::new();
    for (cluster, tool) in [("slurm", "sbatch"), ("k8s", "kubectl")] {
        let mut command = s.command(&["launch", cluster, "--recipe", "recipe.toml"]);
        let ran = Ran::new(command.env("PATH", s.path("")).output().unwrap());
        ran.fails_as(FailureKind::Environment, &[&format!("`{tool}` does not start"), "`--dry-run`"]);
    }
}

/// kubectl as the coordinator uses it: Jobs are files in `jobs/`, which end the second time they are seen.
const KUBECTL: &str = r#"#!/bin/bash
echo "$*" >> calls
[ "$1" = --namespace ] && shift 2
case "$1" in
  get) [ -e "jobs/$3" ] || exit 0
    if [ -e "jobs/$3.seen" ]; then end=$(cat "jobs/$3.end" 2>/dev/null || echo Complete); else touch "jobs/$3.seen"; fi
    echo "{\"status\": {\"succeeded\": 1, \"conditions\": [{\"type\": \"${end:-Suspended}\", \"status\": \"True\",
      \"reason\": \"PodFailurePolicy\", \"message\": \"exit code 1\"}]}}" ;;
  apply) read -r job; name=${job#*\"name\":\"}; mkdir -p jobs; echo "$job" > "jobs/${name%%\"*}" ;;
  delete) rm "jobs/$3" "jobs/$3.seen" ;;
esac
"#;

#[test]
fn each_job_of_kubernetes_is_awaited_before_the_next_one() {
    let s = Sandbox::new();
    s.write("bin/kubectl", KUBECTL);
    fs::set_permissions(s.path("bin/kubectl"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", s.path("bin").display(), std::env::var("PATH").unwrap());
    let launch = |more: &[&str]| {
        let args = [&["launch", "k8s", "--recipe", "recipe.toml", "--set", "launch.k8s.namespace=lab"], more]
            .concat();
        Ran::new(s.command(&args).env("PATH", &path).output().unwrap())
    };
    let calls = || {
        let calls = fs::read_to_string(s.path("calls")).unwrap();
        fs::remove_file(s.path("calls")).unwrap();
        let verb = |line: &str| {
            line.replace("--namespace lab ", "").split(' ').take(3).collect::<Vec<_>>().join(" ")
        };
        let mut verbs: Vec<String> = calls.lines().map(verb).collect();
        assert!(calls.lines().all(|line| line.starts_with("--namespace lab ")), "{calls}");
        verbs.dedup();
        verbs
    };
    launch(&["--stages", "prepare,label"]).ok();
    let look = |stage: &str| format!("get job small-{stage}");
    let apply = || "apply -f -".to_owned();
    assert_eq!(calls(), [look("prepare"), apply(), look("prepare"), look("label"), apply(), look("label")]);
    // Ended Jobs are replaced: their workers find what is done.
    launch(&["--stages", "label"]).ok();
    assert_eq!(calls(), [look("label"), "delete job small-label".to_owned(), apply(), look("label")]);
    // A Job at work is not applied again; one that fails ends the chain with its reason.
    fs::remove_file(s.path("jobs/small-label.seen")).unwrap();
    s.write("jobs/small-label.end", "Failed");
    launch(&["--stages", "label,extract"]).fails_with(&[
        "the Job `small-label` failed",
        "PodFailurePolicy: exit code 1",
        "kubectl logs",
    ]);
    assert_eq!(calls(), [look("label")]);
}
