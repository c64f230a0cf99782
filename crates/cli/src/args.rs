//! The command line: commands, arguments and their help. What they do is left to the commands.

mod bench;
mod help;
mod infer;
mod launch;
pub mod pieces;
mod stage;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, FromArgMatches, Parser, Subcommand, ValueHint};
use pkv_core::{FailureKind, Policy, hinted};
use pkv_gpu::{DeviceChoice, DeviceGroup};
use pkv_recipe::plan::{Cluster, MachineChoice};
use pkv_recipe::{Override, Recipe};
use pkv_run::session::load_recipe;
use pkv_shard::Stage;
use tch::Device;

pub use self::bench::{BenchCommand, Models as BenchModels};
pub use self::help::{EVERYWHERE, command};
pub use self::infer::InferArgs;
pub use self::launch::{LaunchArgs, LaunchCommand};
pub use self::pieces::{Devices, PieceArgs};
pub use self::stage::{StageCommand, TrainArgs};

use crate::completion::values;

/// Train a mapper that predicts, while a context is read, which KV pairs of the target's cache may be
/// evicted.
///
/// The labels are KVzip scores of the target, the features are attention statistics of the proxy or the
/// target, and the network is a HybridAxialMapper. One recipe describes a model pair; `run` runs all stages.
#[derive(Debug, Parser)]
#[command(name = "proxykv-train", version, max_term_width = 100, arg_required_else_help = true,
    next_help_heading = EVERYWHERE)]
pub struct Cli {
    /// Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1; `cuda:0+cuda:1` lays the
    /// target's layers over both, as auto does where one has no room for it.
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE", value_parser = device_group,
        add = values::devices())]
    pub device: DeviceGroup,

    /// Number of CPU threads of libtorch [default: all cores].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,

    /// Folder that holds the run folders, or a bucket: s3://, gs:// or az://.
    #[arg(long, global = true, default_value = "runs", value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub runs: PathBuf,

    /// `--runs` as it was given, where that is a bucket: `runs` is then its working copy.
    #[arg(skip)]
    pub bucket: Option<PathBuf>,

    /// Print more to stderr: `-v` for details, `-vv` for debugging.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Print results as JSON on stdout, for programs.
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// `--runs` for other processes.
    pub fn runs_named(&self) -> &Path {
        self.bucket.as_deref().unwrap_or(&self.runs)
    }

    /// The device of a command that works on one.
    ///
    /// # Errors
    /// Several are named.
    pub fn single_device(&self, command: &str) -> Result<DeviceChoice> {
        single(&self.device, &format!("`{command}`"))
    }
}

/// The device of a worker that works on one.
///
/// # Errors
/// Several are named, or there is none of that name.
pub fn one_device(group: &DeviceGroup) -> Result<Device> {
    pkv_gpu::device(single(group, "a feature worker")?)
}

fn single(group: &DeviceGroup, who: &str) -> Result<DeviceChoice> {
    group.single().ok_or_else(|| {
        hinted(
            format!("{who} works on one device, not on `{group}`"),
            "name one; label, extract, eval, run, infer, plan and `bench label` lay a target over several",
        )
        .of(FailureKind::Usage)
        .into()
    })
}

fn device_group(text: &str) -> Result<DeviceGroup, String> {
    text.parse().map_err(|e| pieces::with_hint(&e))
}

/// Exit code of `infer` where answers came from the full cache, because the proxy failed.
pub const FELL_BACK: u8 = 3;

/// The table of exit codes in `--help`, which docs/guide.md has, too.
pub fn exit_codes() -> String {
    let mut codes = vec![
        (0, "done"),
        (FELL_BACK, "`infer` answered from the full cache: the proxy or the mapper failed"),
    ];
    codes.extend(FailureKind::ALL.map(|kind| (kind.exit_code(), kind.meaning())));
    codes.sort_unstable();
    let lines: String = codes.iter().map(|(code, meaning)| format!("\n  {code:>3}  {meaning}")).collect();
    format!("Exit codes:{lines}")
}

/// The command line that this process was started with.
///
/// # Errors
/// It is wrong, or asks for help.
pub fn parse() -> Result<Cli, clap::Error> {
    let mut command = command();
    let found = command.try_get_matches_from_mut(std::env::args_os()).map_err(with_recipe)?;
    let cli = Cli::from_arg_matches(&found).map_err(|e| e.format(&mut command))?;
    match cli.command.without_json() {
        Some((name, instead)) if cli.json => Err(command.error(
            ErrorKind::ArgumentConflict,
            format!("`{name}` prints text alone and has no `--json`\n\nhint: {instead}"),
        )),
        _ => Ok(cli),
    }
}

/// An error for want of `--recipe` says where recipes are; clap does not know that a name without the flag is
/// likely one.
fn with_recipe(mut e: clap::Error) -> clap::Error {
    let takes_one = |text: &str| text.contains("--recipe <FILE>");
    let is_about_it = match (e.kind(), e.get(ContextKind::InvalidArg)) {
        (ErrorKind::MissingRequiredArgument, Some(ContextValue::Strings(missing))) => {
            missing.iter().any(|arg| takes_one(arg))
        }
        (ErrorKind::UnknownArgument, Some(ContextValue::String(given))) => {
            !given.starts_with('-') && e.get(ContextKind::Usage).is_some_and(|u| takes_one(&u.to_string()))
        }
        _ => false,
    };
    if is_about_it {
        let tip =
            "name the recipe, such as `--recipe recipes/demo.toml`; `proxykv-train recipes ls` lists them";
        e.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    e
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check libtorch, GPU, memory, disk, hub, and what a recipe needs.
    Doctor {
        /// Also check that this recipe's models and data are available and fit this machine.
        #[arg(long, value_name = "FILE", add = values::recipe())]
        recipe: Option<PathBuf>,
        /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE", requires = "recipe", add = values::assignment())]
        overrides: Vec<Override>,
    },
    /// List or show recipes, or write one for your own model pair.
    Recipes {
        #[command(subcommand)]
        what: RecipesCommand,
    },
    /// Print the JSON schema of recipes, for editors.
    Schema {
        /// Print the recipe reference instead: every key as Markdown, docs/recipes.md.
        #[arg(long)]
        reference: bool,
    },
    /// Estimate time, memory, disk and cost of each stage.
    ///
    /// Validates the recipe and counts tokens, bytes and FLOPs from the shapes in it; reads no weights.
    Plan {
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Print the resolved recipe as TOML, every key with its meaning and where its value was set, and
        /// exit.
        #[arg(long)]
        resolved: bool,
        /// Machine to plan for: a name, or figures of its data sheet as `tflops=N,gb=N,gbps=N`; with
        /// `,usd_per_hour=N` after either, each stage has its price
        /// [default: here; with `--calibrate`, the machine of that run].
        #[arg(long, value_name = "MACHINE", value_parser = MachineParser)]
        machine: Option<MachineChoice>,
        /// Calibrate times by those of a past run.
        ///
        /// Of a run that is at work, its finished pieces count.
        #[arg(long, value_name = "RUN_FOLDER", conflicts_with = "resolved", add = values::run_path())]
        calibrate: Option<PathBuf>,
        /// Also plan `label`, `extract` and `eval` by each of these numbers of workers (docs/scale.md): time,
        /// price, idle share, and what they ask of the file system.
        #[arg(long, value_name = "N,...", value_delimiter = ',', conflicts_with = "resolved",
            value_parser = clap::value_parser!(u64).range(1..=100_000))]
        workers: Vec<u64>,
        /// Habits of the cluster: seconds until a worker has its model (`start`, 90) and in the queue
        /// (`queue`, 120), pre-emptions of a worker in an hour (`preemptions`, 0), spread of the times of
        /// contexts (`spread`, 0.3) and of workers (`node_spread`, 0.05).
        #[arg(long, value_name = "KEY=VALUE,...", requires = "workers", default_value = "start=90")]
        cluster: Cluster,
    },
    /// Download models and data, and pin revisions and hashes.
    ///
    /// They go to the Hugging Face cache. After Ctrl-C, the next fetch continues with what was downloaded.
    /// `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT` and
    /// `HF_HUB_DOWNLOAD_TIMEOUT` have the same meaning as for `huggingface_hub`.
    Fetch {
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Models only.
        #[arg(long)]
        models_only: bool,
    },
    /// One stage of `run`.
    #[command(flatten)]
    Stage(StageCommand),
    /// Run all stages in order; those that are complete are skipped.
    ///
    /// A stage is complete if its output matches the recipe. After a stop, the same command continues.
    Run(StageArgs),
    /// Run a recipe and variants of it, and compare them.
    ///
    /// Examples, labels and features are made once for all runs whose choices for them are the same, in
    /// `shared/` beside the run folders. After a stop, the same command goes on.
    Sweep(SweepArgs),
    /// Run the stages on a cluster, as jobs of Slurm or Kubernetes.
    ///
    /// Several workers share each stage that is done in pieces.
    #[command(subcommand)]
    Launch(LaunchCommand),
    /// Read a context, prune its cache once, and answer questions.
    ///
    /// Answers go to stdout as they are made; times and sizes to stderr.
    Infer(InferArgs),
    /// Compare evaluated runs, with paired differences from the first.
    Compare(CompareArgs),
    /// Upload an export with its model card to a hub repository.
    ///
    /// Without `--yes`, only shows what would be sent.
    Push(PushArgs),
    /// Measure a stage's time per context beside the device's peak.
    ///
    /// A matrix product and a copy are timed for comparison.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Show what a file or folder of a run contains.
    ///
    /// A shard, stage folder, run folder, checkpoint, export, record or event file, or a folder of runs.
    Inspect {
        /// Any file or folder that this program wrote.
        path: PathBuf,
        /// Compare labels or features with those of another folder, made from the same examples with other
        /// settings: another dtype, device or preset.
        #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        against: Option<PathBuf>,
    },
    /// Write the manual pages of all commands.
    Man {
        /// Folder to write to; created if absent.
        #[arg(value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
    /// Print the script with which TAB completes this command.
    Completions {
        /// Shell that reads the script.
        shell: clap_complete::Shell,
    },
}

impl Command {
    /// The command's name and what to do instead, where there is nothing to print as JSON.
    const fn without_json(&self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Inspect { .. } => (
                "inspect",
                "leave it out; `run.json`, `eval/results.json` and the `index.json` of a stage are JSON",
            ),
            Self::Recipes { what: RecipesCommand::Show { .. } } => {
                ("recipes show", "`plan --resolved --json` prints every value of a recipe as JSON")
            }
            Self::Schema { reference: true } => {
                ("schema --reference", "leave `--reference` out: the schema is JSON")
            }
            Self::Man { .. } => ("man", "leave it out"),
            Self::Completions { .. } => ("completions", "leave it out"),
            _ => return None,
        })
    }
}

/// Arguments of `compare`.
#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    /// Run folders, or names of run folders below `--runs`; differences are relative to the first.
    #[arg(value_name = "RUN", num_args = 2.., required = true, add = values::run_name())]
    pub folders: Vec<PathBuf>,
    /// Also write a self-contained HTML page.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `push`.
#[derive(Clone, Debug, Args)]
pub struct PushArgs {
    /// An export, or a run folder that contains one.
    #[arg(value_name = "RUN_OR_EXPORT", add = values::run_path())]
    pub source: PathBuf,
    /// Hub repository; created if absent.
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: String,
    /// Create the repository as private; an existing public one is refused.
    #[arg(long)]
    pub private: bool,
    /// Branch to commit to; created if absent.
    #[arg(long, value_name = "BRANCH", default_value = "main")]
    pub revision: String,
    /// Commit message.
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Upload. Without this flag nothing is sent.
    #[arg(long)]
    pub yes: bool,
}

/// Heading of what chooses a recipe and changes it.
const RECIPE: &str = "Recipe and documents";

/// `plan --machine`: the names are shown in help and completion.
#[derive(Clone)]
struct MachineParser;

impl TypedValueParser for MachineParser {
    type Value = MachineChoice;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<MachineChoice, clap::Error> {
        str::parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue>>> {
        Some(Box::new(MachineChoice::names().map(|(name, meaning)| PossibleValue::new(name).help(meaning))))
    }
}

/// A recipe and its overrides.
#[derive(Clone, Debug, Args)]
pub struct RecipeFile {
    /// Recipe (TOML) of the pair.
    #[arg(help_heading = RECIPE, long, value_name = "FILE", add = values::recipe())]
    pub recipe: PathBuf,
    /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
    #[arg(help_heading = RECIPE, long = "set", value_name = "KEY=VALUE", add = values::assignment())]
    pub sets: Vec<Override>,
}

/// A recipe whose documents are read.
#[derive(Clone, Debug, Args)]
pub struct RecipeArgs {
    #[command(flatten)]
    pub file: RecipeFile,
    /// Documents to use instead of the recipe's: text, jsonl or parquet files, as paths or quoted patterns
    /// such as 'my/*.txt'.
    #[arg(help_heading = RECIPE, long, value_name = "FILES", num_args = 1.., value_hint = ValueHint::FilePath)]
    pub data: Vec<String>,
}

impl RecipeArgs {
    /// All overrides of the recipe from the command line; shorthands win over `--set`.
    pub fn overrides(&self) -> Vec<Override> {
        let mut all = self.file.sets.clone();
        if !self.data.is_empty() {
            let said = format!("--data {}", self.data.join(" "));
            all.push(Override::by_flag(said, format!("data.files={}", list(&self.data))));
        }
        all
    }

    /// As it was given, for another command.
    pub fn said(&self) -> String {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,".contains(c);
        let overrides = self.overrides();
        let said = overrides.iter().map(|over| match over.said.strip_prefix("--set ") {
            Some(set) if !set.chars().all(is_plain) => format!(" --set '{set}'"),
            _ => format!(" {}", over.said),
        });
        format!("--recipe {}{}", self.file.recipe.display(), said.collect::<String>())
    }

    /// # Errors
    /// The recipe is invalid, or names an unknown method or task.
    pub fn load(&self) -> Result<Recipe> {
        load_recipe(&self.file.recipe, &self.overrides())
    }
}

/// A choice by name from a list, whose meanings are shown in help and completion.
fn choice<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(T) -> &'static str,
    meaning: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(|&v| PossibleValue::new(name(v)).help(meaning(v))))
        .map(move |chosen| *all.iter().find(|&&v| name(v) == chosen).expect("the parser accepted its name"))
}

/// Texts as a TOML list.
fn list(items: &[impl AsRef<str>]) -> String {
    let quoted: Vec<String> = items.iter().map(|i| serde_json::Value::from(i.as_ref()).to_string()).collect();
    format!("[{}]", quoted.join(", "))
}

/// Subcommands of `recipes`.
#[derive(Clone, Debug, Subcommand)]
pub enum RecipesCommand {
    /// List the recipes below `recipes/` with their model pairs.
    Ls,
    /// Print a recipe.
    Show {
        /// Recipe name as printed by `ls`, or a file.
        #[arg(value_name = "NAME", add = values::recipe_name())]
        name: String,
    },
    /// Write a recipe for your own model pair; shapes are read from the models' config.json.
    Init(InitArgs),
}

/// Arguments of `recipes init`.
#[derive(Clone, Debug, Args)]
pub struct InitArgs {
    /// The model that you serve (the target): folder or hub name.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub target: String,
    /// A small model of the same family (the proxy), whose prefill gives the features
    /// [default: features come from the target's own prefill].
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub proxy: Option<String>,
    /// Documents to train on: text, jsonl or parquet files, as paths or quoted patterns
    /// [default: a manifest].
    #[arg(long, value_name = "FILES", num_args = 1.., value_hint = ValueHint::FilePath)]
    pub data: Vec<String>,
    /// Name of the pair and of its run folder.
    #[arg(long)]
    pub name: Option<String>,
    /// File to write, `-` for stdout; existing files are never overwritten [default: recipes/NAME.toml].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of every stage.
#[derive(Clone, Debug, Args)]
pub struct StageArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Delete this stage's output and compute it again; may be repeated. The mapper of `train` is kept in
    /// before-redo/ of the run folder until the new one is trained.
    #[arg(long, value_name = "STAGE", value_parser = choice(&Stage::ALL, Stage::name, Stage::meaning))]
    pub redo: Vec<Stage>,
}

/// Arguments of `sweep`.
#[derive(Clone, Debug, Args)]
pub struct SweepArgs {
    /// The recipe that the variants are compared with; its overrides are those of all runs.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Recipes of variants, or folders of them, such as recipes/ablations.
    #[arg(long, value_name = "FILE_OR_FOLDER", num_args = 1.., value_hint = ValueHint::AnyPath)]
    pub variants: Vec<PathBuf>,
    /// Make a variant for each value of a key, such as `train.steps=500,1000`; several keys give every
    /// combination.
    #[arg(long, value_name = "KEY=VALUE,...", add = values::assignment())]
    pub vary: Vec<String>,
    /// Only these variants, by the names of their files or runs.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Number of runs at a time; those on one device share it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,
    /// Show what would run and what is shared, and exit.
    #[arg(long)]
    pub dry_run: bool,
    /// Also write the comparison as a self-contained HTML page.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

fn policy() -> impl TypedValueParser<Value = Policy> {
    choice(&Policy::ALL, Policy::name, Policy::meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_and_guide_have_the_same_exit_codes() {
        let guide = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide.md");
        let guide = std::fs::read_to_string(guide).unwrap();
        let help = exit_codes();
        let codes: Vec<&str> = help.lines().skip(1).collect();
        assert_eq!(codes.len(), 2 + FailureKind::ALL.len());
        for line in codes {
            let (code, meaning) = line.trim().split_once("  ").unwrap();
            assert!(
                guide.contains(&format!("| {code} | {meaning} |")),
                "docs/guide.md lacks {code}: {meaning}"
            );
        }
    }
}
