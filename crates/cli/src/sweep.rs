//! `sweep`: a recipe and its variants, each run by a process of its own, and the table that compares them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pkv_core::{NoProgress, Progress as _, Stop, hinted};
use pkv_files::lock_work;
use pkv_gpu::device_name;
use pkv_run::session::{self, Choices, Devices, Session};
use pkv_run::stages::Part;
use pkv_run::sweep::{Member, SweepPlan};
use pkv_run::workers::{own_program, stop_all};
use pkv_run::{Variant, Variants};
use serde_json::json;
use tch::Device;

use crate::args::{Cli, CompareArgs, SweepArgs};
use crate::output;
use crate::terminal::Bar;

/// How often running processes are looked at.
const EVERY: Duration = Duration::from_millis(100);
/// In a bucket, where that takes a request for each output of a run that waits.
const EVERY_THERE: Duration = Duration::from_secs(2);

/// # Errors
/// There is no variant, a recipe is invalid, or a run failed.
pub fn run(cli: &Cli, args: &SweepArgs, stop: &Stop) -> Result<()> {
    let named = Variants {
        recipe: &args.recipe.file.recipe,
        overrides: &args.recipe.overrides(),
        files: &args.variants,
        vary: &args.vary,
        only: &args.only,
    };
    let variants = named.all()?;
    cli.single_device("sweep")?;
    let all = session::devices(&cli.device, cli.threads)?.list();
    let device = all[0];
    let member = |variant: &Variant| -> Result<Member> {
        let (bar, stop) = (Box::new(NoProgress), stop.clone());
        let choices = Choices {
            runs: &cli.runs,
            devices: Devices::Named(vec![device]),
            bar,
            stop,
            part: Part::default(),
        };
        Member::of(&Session::planned(variant.recipe.clone(), choices)?)
    };
    let members = variants.iter().map(member).collect::<Result<Vec<_>>>()?;
    members.iter().try_for_each(Member::bring)?;
    if args.dry_run {
        let plan = SweepPlan::of(&members)?;
        return output::print_either(cli.json, &plan, || plan.text());
    }
    fs::create_dir_all(cli.runs.join("logs"))
        .with_context(|| format!("cannot make folder `{}`", cli.runs.join("logs").display()))?;
    let doing = format!("runs a sweep in `{}`", cli.runs.display());
    let _lock = lock_work(&cli.runs.join("sweep.lock"), false, &doing)?;
    members.iter().try_for_each(Member::link)?;
    let work = Work { cli, device, jobs: args.jobs.max(1), variants: &variants, members: &members };
    let failed = work.run(stop)?;
    let folders: Vec<PathBuf> =
        members.iter().filter(|m| m.is_evaluated()).map(|m| m.run.root().to_path_buf()).collect();
    if folders.len() > 1 {
        crate::compare::run(cli, &CompareArgs { folders, out: args.out.clone() })?;
    } else {
        // Nothing to compare.
        let folders: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        let listed = || folders.iter().map(|folder| format!("{folder}\n")).collect();
        output::print_either(cli.json, &json!({"runs": folders}), listed)?;
    }
    ensure!(
        failed.is_empty(),
        hinted(
            format!("{} of {} runs failed: {}", failed.len(), members.len(), failed.join("; ")),
            "see their logs, and run the same command again: what is complete is kept"
        )
    );
    Ok(())
}

/// The runs of a sweep.
struct Work<'a> {
    cli: &'a Cli,
    device: Device,
    jobs: usize,
    variants: &'a [Variant],
    members: &'a [Member],
}

/// A run at work.
struct Running {
    index: usize,
    child: Child,
    begun: Instant,
}

impl Work<'_> {
    /// Start each run once no other makes what it shares; which failed, in words.
    fn run(&self, stop: &Stop) -> Result<Vec<String>> {
        let bar = Bar::new();
        bar.start("sweep", self.members.len() as u64, 0);
        let (mut waiting, mut running): (Vec<usize>, Vec<Running>) =
            ((0..self.members.len()).collect(), vec![]);
        let mut failed = Vec::new();
        while !waiting.is_empty() || !running.is_empty() {
            if let Err(interrupted) = stop.check() {
                stop_all(running.iter_mut().map(|one| &mut one.child));
                return Err(interrupted.into());
            }
            let mut still = Vec::new();
            for mut one in running {
                let Some(status) = one.child.try_wait().context("cannot wait for a run")? else {
                    still.push(one);
                    continue;
                };
                bar.advance(1);
                failed.extend(self.report(&one, status));
            }
            running = still;
            if running.len() < self.jobs
                && let Some(at) = self.next(&waiting, &running)?
            {
                running.push(self.start(waiting.remove(at))?);
                continue;
            }
            let looks_there = self.cli.bucket.is_some() && running.len() < self.jobs && !waiting.is_empty();
            sleep(if looks_there { EVERY_THERE } else { EVERY });
        }
        bar.finish();
        Ok(failed)
    }

    /// Place in `waiting` of the first run that may start now.
    fn next(&self, waiting: &[usize], running: &[Running]) -> Result<Option<usize>> {
        for (at, &index) in waiting.iter().enumerate() {
            let others = running.iter().map(|r| &self.members[r.index]);
            if self.members[index].may_start_beside(others)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    fn log(&self, index: usize) -> PathBuf {
        self.cli.runs.join("logs").join(format!("{}.txt", self.members[index].name))
    }

    fn start(&self, index: usize) -> Result<Running> {
        let (variant, name, path) = (&self.variants[index], &self.members[index].name, self.log(index));
        let log = File::create(&path).with_context(|| format!("cannot write `{}`", path.display()))?;
        let both = log.try_clone().with_context(|| format!("cannot write `{}`", path.display()))?;
        let cores = available_parallelism().map_or(1, usize::from);
        let threads = self.cli.threads.map_or((cores / self.jobs).max(1), |n| n as usize);
        let mut command = own_program()?;
        command.args(["run", "--device", &device_name(self.device), "--threads", &threads.to_string()]);
        command.arg("--runs").arg(self.cli.runs_named()).arg("--recipe").arg(&variant.recipe.path);
        for assignment in &variant.assignments {
            command.args(["--set", assignment]);
        }
        command.args((0..self.cli.verbose).map(|_| "-v"));
        command.stdin(Stdio::null()).stdout(log).stderr(both);
        tracing::info!("{name}: started, log in `{}`", path.display());
        let child = command.spawn().with_context(|| format!("cannot start the run of `{name}`"))?;
        Ok(Running { index, child, begun: Instant::now() })
    }

    /// Say how a run ended; in words if it failed.
    fn report(&self, one: &Running, status: ExitStatus) -> Option<String> {
        let name = &self.members[one.index].name;
        if status.success() {
            tracing::info!("{name}: done in {:.1} s", one.begun.elapsed().as_secs_f64());
            return None;
        }
        let log = self.log(one.index);
        let why = last_error(&log);
        tracing::error!("{name}: failed ({status}){why}; its log is `{}`", log.display());
        Some(format!("`{name}` ({status}, `{}`){why}", log.display()))
    }
}

/// The error with which a log ends, and its causes.
fn last_error(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let Some(at) = lines.iter().rposition(|line| line.starts_with("error: ")) else {
        return String::new();
    };
    let causes = lines[at + 1..].iter().map_while(|line| line.trim_start().strip_prefix("Caused by: "));
    let error = lines[at].trim_start_matches("error: ");
    [error].into_iter().chain(causes).map(|part| format!(": {part}")).collect()
}
