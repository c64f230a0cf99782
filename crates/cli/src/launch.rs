//! `launch`: the stages of a recipe as jobs of a cluster.

use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Result, bail};
use pkv_bucket::is_credential;
use pkv_core::{FailureKind, Stop, hinted};
use pkv_launch::status::Status;
use pkv_launch::{Launch, k8s, slurm};
use pkv_recipe::{Override, Recipe, profile};
use pkv_run::session::{load_recipe, manifest};
use pkv_shard::{RunLayout, Stage};

use crate::args::{Cli, LaunchArgs, LaunchCommand};
use crate::output;
use crate::terminal::Bar;

pub fn run(cli: &Cli, command: &LaunchCommand, stop: &Stop) -> Result<()> {
    match command {
        LaunchCommand::Slurm(args) => on(cli, args, |launch| {
            let jobs = slurm::jobs(launch)?;
            if args.dry_run {
                let script = slurm::chain(launch, &jobs)?;
                return output::print_either(cli.json, &jobs, || script);
            }
            let submitted = slurm::submit(launch, &jobs)?;
            output::print_either(cli.json, &submitted, || {
                let mut out = String::new();
                for job in &submitted {
                    let _ = writeln!(out, "{:<8} job {}, workers {}", job.stage, job.id, job.workers);
                }
                let run = cli.runs_named().join(&launch.recipe.name);
                let _ = writeln!(out, "logs in {}", launch.logs.display());
                let _ = writeln!(out, "next: proxykv-train launch status --run {}", run.display());
                out
            })
        }),
        LaunchCommand::K8s(args) => on(cli, args, |launch| {
            if args.dry_run {
                output::print_json(&k8s::list(launch))
            } else {
                k8s::run(launch, &Bar::new(), stop)?;
                let done: Vec<_> = launch.stages.iter().map(|stage| stage.name()).collect();
                if cli.json { output::print_json(&done) } else { Ok(()) }
            }
        }),
        LaunchCommand::Status { run } => {
            // A name is that of a run below `--runs`.
            let below = cli.runs.join(run);
            let run = if !run.exists() && below.exists() { below } else { run.clone() };
            let status = Status::read(&RunLayout::new(run), SystemTime::now())?;
            output::print_either(cli.json, &status, || status.to_string())
        }
    }
}

/// `act` on what `args` launch.
fn on(cli: &Cli, args: &LaunchArgs, act: impl FnOnce(&Launch) -> Result<()>) -> Result<()> {
    let overrides = args.recipe.overrides();
    let mut all = args.profile.as_deref().map(profile).transpose()?.unwrap_or_default();
    all.extend(overrides.iter().cloned());
    let recipe = load_recipe(&args.recipe.file.recipe, &all)?;
    // A manifest that cannot be read is a mistake worth hearing about now.
    manifest(&recipe)?;
    let run = RunLayout::new(cli.runs.join(&recipe.name));
    // What jobs print is a file from its first line on, which no bucket has.
    let here = RunLayout::new(Path::new(LOCAL_RUNS).join(&recipe.name));
    let logs = if cli.bucket.is_some() { here.launch() } else { run.launch() }.join("logs");
    if cli.bucket.is_some() {
        check_variables(&recipe)?;
    }
    let stages = Stage::ALL.into_iter().filter(|stage| args.stages.is_empty() || args.stages.contains(stage));
    act(&Launch {
        recipe: &recipe,
        run: &run,
        logs,
        stages: stages.collect(),
        workers: args.workers as usize,
        gpus_per_worker: args.gpus_per_worker as usize,
        arguments: arguments(cli, args, &overrides),
    })
}

/// Folder of the logs of runs in buckets: `--runs` where it is not given.
const LOCAL_RUNS: &str = "runs";

/// What `[launch]` sets is shown and kept: no credential of a bucket.
fn check_variables(recipe: &Recipe) -> Result<()> {
    if let Some((name, _)) = recipe.launch.variables().find(|(name, value)| is_credential(name, value)) {
        bail!(
            hinted(
                format!("`launch.environment` sets {name}: it would be shown, and kept in `run.json`"),
                "Slurm gives its jobs the environment of `launch slurm`, or `launch.slurm.lines` reads a file; Kubernetes has \
                 secrets, named by `launch.k8s.secrets`"
            )
            .of(FailureKind::Usage)
        );
    }
    Ok(())
}

/// What every worker is given: the same recipe, with the same changes, and the same choices of the machine.
fn arguments(cli: &Cli, args: &LaunchArgs, overrides: &[Override]) -> Vec<String> {
    let mut all = vec!["--recipe".to_owned(), args.recipe.file.recipe.display().to_string()];
    // What `[launch]` says is in the job already.
    for over in overrides.iter().filter(|over| !over.assignment.trim_start().starts_with("launch")) {
        all.extend(["--set".to_owned(), over.assignment.clone()]);
    }
    all.extend(["--runs".to_owned(), cli.runs_named().display().to_string()]);
    all.extend(["--device".to_owned(), cli.device.to_string()]);
    if let Some(threads) = cli.threads {
        all.extend(["--threads".to_owned(), threads.to_string()]);
    }
    all.extend((0..cli.verbose).map(|_| "-v".to_owned()));
    all
}
