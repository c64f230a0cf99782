//! The command line: commands, arguments and their help. What they do is left to the commands.

mod bench;
mod launch;
mod pieces;
mod stage;

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueHint};
use pkv_core::{DtypeName, FailureKind, Policy};
use pkv_gpu::DeviceChoice;
use pkv_infer::RegimeName;
use pkv_recipe::plan::Machine;
use pkv_recipe::{Override, Recipe};
use pkv_run::session::load_recipe;
use pkv_shard::Stage;

pub use self::bench::{BenchCommand, Models as BenchModels};
pub use self::launch::{LaunchArgs, LaunchCommand};
pub use self::pieces::{Devices, PieceArgs};
pub use self::stage::StageCommand;

use crate::completion::values;

/// Train a mapper with which a small proxy model predicts which KV pairs of a big target's cache may be
/// evicted.
///
/// The labels are KVzip scores of the target, the features are attention statistics of the proxy or the
/// target, and the network is a HybridAxialMapper. One recipe describes a model pair; `run` runs all stages.
#[derive(Debug, Parser)]
#[command(name = "proxykv-train", version, max_term_width = 100, arg_required_else_help = true,
    after_help = exit_codes())]
pub struct Cli {
    /// Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1.
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE", add = values::devices())]
    pub device: DeviceChoice,

    /// Number of CPU threads of libtorch [default: all cores].
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<u32>,

    /// Folder that holds the run folders.
    #[arg(long, global = true, default_value = "runs", value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub runs: PathBuf,

    /// Print more to stderr: `-v` for details, `-vv` for debugging.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Print results as JSON on stdout, for programs.
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

/// Exit code of `infer` where answers came from the full cache, because the proxy failed.
pub const FELL_BACK: u8 = 3;

/// The table of exit codes in `--help`, which docs/guide.md has, too.
pub fn exit_codes() -> String {
    let mut codes = vec![
        (0, "done"),
        (FELL_BACK, "`infer` answered from the full cache, because the proxy or the mapper failed"),
    ];
    codes.extend(FailureKind::ALL.map(|kind| (kind.exit_code(), kind.meaning())));
    codes.sort_unstable();
    let lines: String = codes.iter().map(|(code, meaning)| format!("\n  {code:>3}  {meaning}")).collect();
    format!("Exit codes:{lines}")
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check libtorch, CUDA, memory, disk, the hub, and what a recipe needs.
    Doctor {
        /// Also check that this recipe's models and data are available and fit this machine.
        #[arg(long, value_name = "FILE", add = values::recipe())]
        recipe: Option<PathBuf>,
        /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE", add = values::assignment())]
        overrides: Vec<Override>,
    },
    /// List or show the recipes that come with the program, or write one for your own model pair.
    Recipes {
        #[command(subcommand)]
        what: RecipesCommand,
    },
    /// Print the JSON schema of recipes, for editors; with `--reference` every key as Markdown.
    Schema {
        /// Print the recipe reference, docs/recipes.md.
        #[arg(long)]
        reference: bool,
    },
    /// Validate a recipe and estimate tokens, bytes, FLOPs, memory and time of each stage; reads no weights.
    Plan {
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Print the resolved recipe as TOML, every key with its meaning and where its value was set, and
        /// exit.
        #[arg(long)]
        resolved: bool,
        /// Machine to plan for: this one, or the one that the run will use.
        #[arg(long, default_value = "here", value_parser = machines())]
        machine: String,
    },
    /// Download models and data into the Hugging Face cache and pin revisions and hashes.
    ///
    /// After Ctrl-C, the next fetch continues with what was downloaded. `HF_HOME`, `HF_HUB_CACHE`,
    /// `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` have
    /// the same meaning as for `huggingface_hub`.
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
    /// Run all stages in order; stages that are complete and match the recipe are skipped.
    Run(StageArgs),
    /// Run a recipe and variants of it, share what they have in common, and compare them.
    ///
    /// Examples, labels and features are made once for all runs whose choices for them are the same, in
    /// `shared/` beside the run folders. After a stop, the same command goes on.
    Sweep(SweepArgs),
    /// Run the stages on a cluster: as jobs of Slurm or Kubernetes, several workers for each.
    #[command(subcommand)]
    Launch(LaunchCommand),
    /// Read a context with both models, prune the target's cache once, and answer questions from it.
    #[command(after_help = exit_codes())]
    Infer(InferArgs),
    /// Compare evaluated runs of one target, with paired differences from the first.
    Compare(CompareArgs),
    /// Upload an export with its model card to a Hugging Face repository; without `--yes`, only show what
    /// would be sent.
    Push(PushArgs),
    /// Measure a stage's time per context, with a matrix product and a copy for comparison.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Show what a shard, stage folder, run folder, checkpoint or export contains.
    Inspect {
        path: PathBuf,
        /// Compare labels or features with those of another folder, made from the same examples with other
        /// settings: another dtype, device or preset.
        #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        against: Option<PathBuf>,
    },
    /// Write the manual pages of this command and its subcommands: `man FOLDER/proxykv-train.1` shows one.
    Man {
        /// Folder to write to; created if absent.
        #[arg(value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
    /// Print the script that lets a shell complete this command: `source <(proxykv-train completions bash)`.
    Completions { shell: clap_complete::Shell },
}

/// Arguments of `infer`.
#[derive(Clone, Debug, Args)]
pub struct InferArgs {
    /// Export of the mapper (`proxykv-train export`), the run folder that contains it, or a hub repository.
    #[arg(long, value_name = "FOLDER_OR_REPO", add = values::run_path())]
    pub mapper: PathBuf,
    /// Target: hub name or folder [default: the one that the mapper was trained for].
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub target: Option<String>,
    /// Proxy: hub name or folder [default: the one that the mapper was trained for].
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub proxy: Option<String>,
    /// Retention ratio: share of the context's KV pairs that is kept, above 0 and at most 1; `20%` means
    /// `0.2`.
    #[arg(long, value_name = "RATIO", conflicts_with = "budget", default_value_t = 0.2, value_parser = share)]
    pub retain: f64,
    /// Number of tokens to keep in every KV head; for every policy but `pair-uniform` and `token`, the same
    /// total of KV pairs.
    #[arg(long, value_name = "TOKENS")]
    pub budget: Option<usize>,
    /// Pruning policy: which KV pairs compete for the budget.
    #[arg(long, default_value = "pair-keydiff", value_parser = policy())]
    pub policy: Policy,
    /// Keep the newest N tokens of the context in every KV head, regardless of their scores, within the
    /// budget.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_recent: usize,
    /// Answer each question from the full cache as well, after one more prefill, and print both with tokens
    /// and memory.
    #[arg(long)]
    pub compare_full: bool,
    /// Order of proxy and target, and the devices they run on.
    #[arg(long, default_value = "sequential",
        value_parser = choice(&RegimeName::ALL, RegimeName::name, RegimeName::meaning))]
    pub regime: RegimeName,
    /// Device of proxy and mapper with `--regime dual` [default: the GPU after the target's].
    #[arg(long, value_name = "DEVICE", add = values::devices())]
    pub proxy_device: Option<DeviceChoice>,
    /// Run the mapper while the proxy reads, on each window of features as soon as it is final.
    #[arg(long)]
    pub overlap: bool,
    /// The context: a text file, or `-` for stdin.
    #[arg(long, value_name = "FILE", required_unless_present = "context_ids")]
    pub context: Option<PathBuf>,
    /// The context as a JSON list of token ids, instead of text.
    #[arg(long, value_name = "FILE", conflicts_with = "context")]
    pub context_ids: Option<PathBuf>,
    /// A question; may be repeated.
    #[arg(long = "question", value_name = "TEXT")]
    pub questions: Vec<String>,
    /// Questions as JSON lines, `{"question": "..."}` or strings; `-` for stdin, answered as they arrive. An
    /// invalid line is refused, and reading continues.
    #[arg(long = "questions", value_name = "FILE")]
    pub question_file: Option<PathBuf>,
    /// Maximum length of an answer in tokens.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_new_tokens: usize,
    /// Read special tokens that context and questions spell out, such as `<|im_end|>`, as plain text; for
    /// untrusted texts.
    #[arg(long)]
    pub special_tokens_as_text: bool,
    /// Dtype of the models.
    #[arg(long, default_value = "auto",
        value_parser = choice(&DtypeName::ALL, DtypeName::name, DtypeName::meaning))]
    pub dtype: DtypeName,
    /// Tokens per forward of the target's prefill [default: as when the mapper was trained].
    #[arg(long, value_name = "TOKENS")]
    pub chunk_tokens: Option<usize>,
    /// Number of positions that the mapper scores in one forward pass.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    pub window_tokens: usize,
    /// Write the phases as a trace for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// A share, as a number or in percent.
fn share(text: &str) -> Result<f64, String> {
    let text = text.trim();
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |percent| (percent.trim_end(), 100.0));
    let share: f64 = number.parse().map_err(|_| format!("`{text}` is no share: write `0.2` to keep 20%"))?;
    Ok(share / unit)
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

/// Machines that `plan` knows.
fn machines() -> PossibleValuesParser {
    let measured = [
        ("here", "An H200 if there is a GPU, else this CPU".to_owned()),
        ("cpu", "This CPU".to_owned()),
        ("h200", "As measured".to_owned()),
    ];
    let by_data_sheet = Machine::cards().map(|(name, title)| (name, format!("{title}, by its data sheet")));
    let all = measured.into_iter().chain(by_data_sheet);
    PossibleValuesParser::new(all.map(|(name, meaning)| PossibleValue::new(name).help(meaning)))
}

/// A recipe and its overrides.
#[derive(Clone, Debug, Args)]
pub struct RecipeFile {
    /// Recipe (TOML) of the pair.
    #[arg(long, value_name = "FILE", add = values::recipe())]
    pub recipe: PathBuf,
    /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", add = values::assignment())]
    pub sets: Vec<Override>,
}

/// A recipe whose documents are read.
#[derive(Clone, Debug, Args)]
pub struct RecipeArgs {
    #[command(flatten)]
    pub file: RecipeFile,
    /// Documents to use instead of the recipe's: text, jsonl or parquet files, as paths or quoted patterns
    /// such as 'my/*.txt'.
    #[arg(long, value_name = "FILES", num_args = 1.., value_hint = ValueHint::FilePath)]
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
        #[arg(value_name = "NAME")]
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
    #[arg(long, value_name = "FILES", num_args = 1..)]
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
    /// Delete this stage's output and compute it again; may be repeated.
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
    #[arg(long, value_name = "KEY=VALUE,...")]
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
    fn a_share_may_be_in_percent() {
        for (text, expected) in [("0.2", 0.2), ("20%", 0.2), (" 2.5 %", 0.025), ("1", 1.0), ("200%", 2.0)] {
            assert_eq!(share(text), Ok(expected), "{text}");
        }
        for text in ["", "%", "20%%", "half"] {
            assert!(share(text).unwrap_err().contains("`0.2`"), "{text}");
        }
    }

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
