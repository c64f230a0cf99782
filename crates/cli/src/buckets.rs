//! Run folders in buckets: addresses on the command line become the paths of their working copies, and what
//! needs a file system that others see is refused.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use pkv_bucket::{brought, is_address, place};
use pkv_core::{FailureKind, hinted};

use crate::args::{Cli, Command, LaunchCommand};

/// Mount the buckets that are named, and bring what is read of them.
///
/// # Errors
/// A bucket cannot be used, or the command cannot use one.
pub fn resolve(cli: &mut Cli) -> Result<()> {
    let runs = is_address(&cli.runs).then(|| cli.runs.clone());
    if runs.is_some() {
        refuse(&cli.command)?;
        cli.runs = place(&cli.runs)?;
        tracing::info!("`{}` has its working copy in `{}`", shown(runs.as_deref()), cli.runs.display());
    }
    // A name is that of a run below `--runs`.
    let below = |named: &PathBuf| match &runs {
        Some(runs) if !is_address(named) && !named.exists() => brought(&runs.join(named)),
        _ => brought(named),
    };
    match &mut cli.command {
        Command::Plan { calibrate: Some(path), .. }
        | Command::Push(crate::args::PushArgs { source: path, .. }) => {
            *path = brought(path)?;
        }
        Command::Inspect { path, against } => {
            *path = brought(path)?;
            *against = against.as_deref().map(brought).transpose()?;
        }
        Command::Compare(args) => args.folders = args.folders.iter().map(below).collect::<Result<_>>()?,
        Command::Launch(LaunchCommand::Status { run }) => *run = below(run)?,
        Command::Infer(args) => args.mapper = brought(&args.mapper)?,
        Command::Stage(command) => {
            if let Some(mapper) = command.eval.as_mut().and_then(|eval| eval.mapper.as_mut()) {
                *mapper = brought(mapper)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn shown(runs: Option<&Path>) -> String {
    runs.map(|runs| runs.display().to_string()).unwrap_or_default()
}

/// Refuse the commands that need more than a working copy.
fn refuse(command: &Command) -> Result<()> {
    let (what, hint) = match command {
        Command::Sweep(_) => (
            "`sweep` shares outputs by links between run folders, which a bucket does not have",
            "sweep into a folder, or run each variant with `--runs` and a `name` of its own",
        ),
        Command::Launch(LaunchCommand::Slurm(_) | LaunchCommand::K8s(_)) => (
            "`launch` keeps scripts and logs of its jobs in the run folder, which a bucket cannot serve them from",
            "start `proxykv-train STAGE --task K/N --runs s3://...` in the jobs of an array or an indexed Job: it takes its \
             task from the scheduler's variables; docs/scale.md shows one",
        ),
        _ => return Ok(()),
    };
    bail!(hinted(format!("`--runs` is a bucket: {what}"), hint).of(FailureKind::Usage))
}
