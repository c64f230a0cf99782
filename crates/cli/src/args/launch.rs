//! Arguments of `launch`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use pkv_shard::Stage;

use super::{RecipeArgs, choice};
use crate::completion::values;

/// Subcommands of `launch`.
#[derive(Clone, Debug, Subcommand)]
pub enum LaunchCommand {
    /// Submit a chain of jobs to Slurm, each after the one before, and return.
    Slurm(LaunchArgs),
    /// Apply a Job for each stage to Kubernetes with kubectl, and wait for it before the next.
    ///
    /// Recipe, documents and run folder are found in the workers' containers under the paths given here. What
    /// is applied goes on without this command; after a stop, the same command continues.
    K8s(LaunchArgs),
    /// Show how far a run is: pieces done, at work and failed, rate and remaining time.
    Status {
        /// Run folder, or the name of one below `--runs`.
        #[arg(long, value_name = "FOLDER", add = values::run_path())]
        run: PathBuf,
    },
}

/// What to launch.
#[derive(Clone, Debug, Args)]
pub struct LaunchArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Number of workers that share `label`, `extract` and `eval`; each takes its part of the pieces.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub workers: u32,
    /// GPUs of each worker; 0 for CPUs alone.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gpus_per_worker: u32,
    /// Only these stages [default: all].
    #[arg(long, value_name = "STAGE,...", value_delimiter = ',',
        value_parser = choice(&Stage::ALL, Stage::name, Stage::meaning))]
    pub stages: Vec<Stage>,
    /// Keys of the recipe's `[launch]`, for this cluster; `--set launch.KEY=VALUE` wins over them.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub profile: Option<PathBuf>,
    /// Print what would be submitted, and exit: a shell script that submits it, or Jobs as JSON.
    #[arg(long)]
    pub dry_run: bool,
}
