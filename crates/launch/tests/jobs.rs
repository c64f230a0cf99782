//! The jobs of the demo, compared with stored files: `UPDATE_GOLDEN=1` writes them anew.

use std::fs;
use std::path::{Path, PathBuf};

use pkv_launch::{Launch, k8s, slurm};
use pkv_recipe::{Recipe, load, profile};
use pkv_shard::{RunLayout, Stage};
use serde_json::Value;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The demo on the cluster of `goldens/profile.toml`.
pub fn demo() -> Recipe {
    let recipe = pkv_test_support::files::root().join("recipes/demo-nano.toml");
    load(&recipe, &profile(&goldens().join("profile.toml")).unwrap()).unwrap()
}

pub fn launch<'a>(recipe: &'a Recipe, run: &'a RunLayout, arguments: &[&str]) -> Launch<'a> {
    Launch {
        recipe,
        run,
        logs: run.launch().join("logs"),
        stages: Stage::ALL.to_vec(),
        workers: 4,
        gpus_per_worker: 1,
        arguments: arguments.iter().map(ToString::to_string).collect(),
    }
}

const ARGUMENTS: [&str; 6] = ["--recipe", "recipes/demo-nano.toml", "--runs", "runs", "--device", "auto"];

fn same(name: &str, written: &str) {
    let path = goldens().join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, written).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap();
    assert!(kept == written, "{name} differs from what is written now:\n{written}");
}

#[test]
fn jobs_are_those_of_the_stored_files() {
    let (recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
    let launch = launch(&recipe, &run, &ARGUMENTS);
    same("chain.sh", &slurm::chain(&launch, &slurm::jobs(&launch).unwrap()).unwrap());
    same("jobs.json", &format!("{:#}\n", k8s::list(&launch)));
}

#[test]
fn stages_and_gpus_are_the_chosen_ones() {
    let (recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
    let some = Launch {
        stages: vec![Stage::Extract, Stage::Report],
        gpus_per_worker: 0,
        ..launch(&recipe, &run, &ARGUMENTS)
    };
    let jobs = slurm::jobs(&some).unwrap();
    let told: Vec<_> = jobs.iter().map(|job| (job.name.as_str(), job.workers)).collect();
    assert_eq!(told, [("demo-nano-extract", 4), ("demo-nano-report", 1)]);
    assert!(!jobs.iter().any(|job| job.script.contains("--gres")), "{jobs:?}");
    assert!(jobs[0].script.contains("#SBATCH --array=0-3\n") && !jobs[1].script.contains("--array"));
    let several = Launch { gpus_per_worker: 2, ..some.clone() };
    let words = |job: &slurm::Job| job.script.matches("--devices all --task").count();
    assert_eq!(slurm::jobs(&several).unwrap().iter().map(words).collect::<Vec<_>>(), [1, 0]);
    // GPUs that share a target's layers have one worker; where there is no GPU, there is no such group.
    let group = ["--recipe", "r.toml", "--device", "cuda:0+cuda:1"].map(str::to_owned).into();
    let grouped = slurm::jobs(&Launch { arguments: group, ..several.clone() }).unwrap();
    assert_eq!(grouped.iter().map(words).collect::<Vec<_>>(), [0, 0]);
    let has = |job: &slurm::Job, device: &str| job.script.contains(&format!("--device {device}"));
    assert!(has(&grouped[0], "cuda:0+cuda:1") && has(&grouped[1], "auto"), "{grouped:?}");
    let list = k8s::list(&some);
    let limits = |i: usize| {
        list["items"][i]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].clone()
    };
    assert_eq!((limits(0), limits(1)), (serde_json::json!({"memory": "64Gi"}), limits(0)));
}

#[test]
fn names_are_those_that_kubernetes_takes() {
    let run = RunLayout::new("runs/x");
    for (given, name) in [
        ("Qwen3-8B_v1.2", "qwen3-8b-v1-2-label"),
        ("-4b-", "run-4b-label"),
        ("...", "run-label"),
        (&"a.".repeat(60), &format!("{}-label", "a-".repeat(20).trim_end_matches('-'))),
    ] {
        let recipe = Recipe { name: given.to_owned(), ..demo() };
        let launch = Launch { stages: vec![Stage::Label], ..launch(&recipe, &run, &ARGUMENTS) };
        let job = &k8s::list(&launch)["items"][0];
        assert_eq!(job["metadata"]["name"], name, "{given}");
    }
}

/// The API server checks these rules, and no schema has them.
#[test]
fn failures_are_counted_as_they_should_be() {
    let (recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
    for job in k8s::list(&launch(&recipe, &run, &ARGUMENTS))["items"].as_array().unwrap() {
        let spec = &job["spec"];
        assert_eq!(spec["template"]["spec"]["restartPolicy"], "Never", "podFailurePolicy needs it");
        assert_eq!(spec["completionMode"], "Indexed", "backoffLimitPerIndex needs it");
        for rule in spec["podFailurePolicy"]["rules"].as_array().unwrap() {
            let codes: Vec<i64> = rule["onExitCodes"]["values"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_i64)
                .collect();
            assert!(codes.is_sorted() && !codes.contains(&0), "{codes:?}");
        }
        let name = job["metadata"]["name"].as_str().unwrap();
        assert!(name.len() + "-9999".len() <= 63, "{name}");
    }
}
