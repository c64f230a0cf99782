//! The stages of a recipe as jobs of a cluster: written, submitted, and followed by their markers.
//!
//! A worker is this program with one stage and, where the stage is done in pieces, with `--task K/N`. What a
//! worker does is `run`'s; scheduling, restarts and logs are the cluster's.

pub mod k8s;
pub mod slurm;
pub mod status;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::Result;
use pkv_core::hinted;
use pkv_recipe::Recipe;
use pkv_shard::{RunLayout, Stage};

/// Seconds between SIGTERM and the end of a worker: one example takes less.
const GRACE_SECS: u32 = 30;

/// What is launched.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    pub recipe: &'a Recipe,
    pub run: &'a RunLayout,
    /// Folder of what jobs of Slurm print, which all nodes see.
    pub logs: PathBuf,
    /// In their order.
    pub stages: Vec<Stage>,
    /// Workers of each stage that is done in pieces.
    pub workers: usize,
    pub gpus_per_worker: usize,
    /// Arguments of every worker after the stage's name.
    pub arguments: Vec<String>,
}

impl Launch<'_> {
    /// Number of workers of a stage.
    fn workers(&self, stage: Stage) -> usize {
        if is_in_pieces(stage) { self.workers } else { 1 }
    }

    /// GPUs of each worker of a stage.
    fn gpus(&self, stage: Stage) -> usize {
        if matches!(stage, Stage::Prepare | Stage::Report) { 0 } else { self.gpus_per_worker }
    }

    /// The command of a worker without its task.
    fn command(&self, stage: Stage) -> Vec<&str> {
        let own = [self.recipe.launch.program.as_str(), stage.name()];
        let devices = self.arguments.iter().position(|argument| argument == "--device");
        let group =
            devices.map(|at| at + 1).filter(|&at| self.arguments.get(at).is_some_and(|d| d.contains('+')));
        // GPUs that share the target's layers have one worker together.
        let several: &[&str] = match is_in_pieces(stage) && self.gpus_per_worker > 1 && group.is_none() {
            true => &["--devices", "all"],
            false => &[],
        };
        let given = self.arguments.iter().enumerate().map(|(at, argument)| match group {
            Some(group) if group == at && self.gpus(stage) == 0 => "auto",
            _ => argument.as_str(),
        });
        own.into_iter().chain(given).chain(several.iter().copied()).collect()
    }
}

/// Whether several workers share a stage.
pub const fn is_in_pieces(stage: Stage) -> bool {
    matches!(stage, Stage::Label | Stage::Extract | Stage::Eval)
}

/// Run a tool of the cluster with `input` on its stdin.
///
/// # Errors
/// The tool is not installed; the error says that `what` failed.
fn tool(name: &str, args: &[&str], input: &str, what: &str) -> Result<Output> {
    let absent = |e: std::io::Error| {
        let hint = format!("run this where `{name}` is installed, or print the jobs with `--dry-run`");
        let absent = hinted(format!("cannot {what}: `{name}` does not start"), hint);
        // As text: a program that is absent is the machine's fault, as no file of the user's would be.
        anyhow::Error::msg(e.to_string()).context(absent.environment())
    };
    let mut command = Command::new(name);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(absent)?;
    // A tool that ends without reading says why on stderr.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    child.wait_with_output().map_err(absent)
}

/// stdout of a tool that must succeed.
///
/// # Errors
/// As of [`tool`], or it failed; what it said on stderr is the cause.
fn answer(name: &str, args: &[&str], input: &str, what: &str) -> Result<String> {
    let out = tool(name, args, input, what)?;
    let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    if !out.status.success() {
        let failed = hinted(
            format!("cannot {what}: `{name} {}` ended with {}", args.join(" "), out.status),
            "change what it names, in `[launch]` or the profile, and launch again",
        );
        return Err(anyhow::Error::msg(said).context(failed));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
