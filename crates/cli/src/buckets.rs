//! Run folders in buckets: addresses on the command line become the paths of their working copies.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use pkv_bucket::{Address, brought, is_address, place};
use pkv_core::hinted;

use crate::args::{Cli, Command, LaunchCommand};

/// Mount the buckets that are named, and bring what is read of them.
///
/// # Errors
/// A bucket cannot be used, or `--runs` names a folder `~` below the working directory.
pub fn resolve(cli: &mut Cli) -> Result<()> {
    ensure!(
        !cli.runs.starts_with("~"),
        hinted(
            format!(
                "`--runs` is `{}`: the shell replaces `~` neither in quotes nor after `=`",
                cli.runs.display()
            ),
            "write `--runs ~/runs`, or `./~` for a folder of that name"
        )
    );
    let runs = is_address(&cli.runs).then(|| cli.runs.clone());
    cli.bucket = runs.clone();
    if let Some(runs) = &runs {
        if is_of_workers(&cli.command) {
            Address::parse(&runs.to_string_lossy())?;
            return Ok(());
        }
        cli.runs = place(runs)?;
        tracing::info!("`{}` has its working copy in `{}`", runs.display(), cli.runs.display());
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

/// Whether the workers alone use the bucket: where they are started there may be no credentials for it.
fn is_of_workers(command: &Command) -> bool {
    match command {
        Command::Launch(LaunchCommand::K8s(_)) => true,
        Command::Launch(LaunchCommand::Slurm(args)) => args.dry_run,
        _ => false,
    }
}
