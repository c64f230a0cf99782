//! The command line: what may be said. What it means is decided by the commands.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use pkv_core::Policy;
use pkv_gpu::DeviceChoice;
use pkv_recipe::Override;

use crate::completion::values;

/// Train a mapper that lets a small proxy model tell which KV pairs of a big target's cache may be evicted.
///
/// KVzip scores of the target are the labels, attention statistics of the proxy the features, a
/// HybridAxialMapper the network between them. One recipe describes a pair; `run` does all stages.
#[derive(Debug, Parser)]
#[command(name = "proxykv-train", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1.
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE", add = values::devices())]
    pub device: DeviceChoice,

    /// CPU threads of libtorch; all cores if absent.
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<u32>,

    /// Folder that holds the run folders.
    #[arg(long, global = true, default_value = "runs", value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub runs: PathBuf,

    /// More on stderr: once for details, twice for debugging.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Print results as JSON on stdout, for programs.
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

const INFER_EXIT_CODES: &str = "Exit codes: 0 all questions were answered; 1 an argument, a file or a question was \
    refused, with a hint; 2 an unexpected error, or an option that does not exist; 3 answered from the full cache, because the \
    proxy failed; 130 interrupted.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check libtorch, CUDA, memory, disk, hub and what a recipe needs.
    Doctor {
        /// Also check that this recipe's models and data can be had and fit.
        #[arg(long, value_name = "FILE", add = values::recipe())]
        recipe: Option<PathBuf>,
        /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE", add = values::assignment())]
        overrides: Vec<Override>,
    },
    /// The recipes that come with the program, and a new one for your own pair.
    Recipes {
        #[command(subcommand)]
        what: RecipesCommand,
    },
    /// Print the JSON schema of recipes, for editors; with `--reference` every key as Markdown.
    Schema {
        /// The recipe reference, docs/recipes.md.
        #[arg(long)]
        reference: bool,
    },
    /// Validate a recipe and estimate tokens, bytes, FLOPs, memory and time of each stage; reads no weights.
    Plan {
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Print the resolved recipe as TOML, every key with its meaning and where its value was set, and stop.
        #[arg(long)]
        resolved: bool,
        /// The machine to plan for: what is here, or what the run will go to.
        #[arg(long, value_enum, default_value = "here")]
        machine: PlanMachine,
    },
    /// Download models and data into the Hugging Face cache and pin revisions and hashes.
    ///
    /// Ctrl-C keeps what has arrived; the next fetch goes on there. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`,
    /// `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` mean what they mean to
    /// `huggingface_hub`.
    Fetch {
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Models only.
        #[arg(long)]
        models_only: bool,
    },
    /// Documents to tokenized examples.
    Prepare {
        #[command(flatten)]
        stage: StageArgs,
        /// Then show the first N examples as text, each with the facts that were planted in it.
        #[arg(long, value_name = "N")]
        show: Option<usize>,
    },
    /// KVzip scores of the target.
    Label(StageArgs),
    /// Features of the proxy.
    Extract(StageArgs),
    /// The mapper, from labels and features.
    Train(StageArgs),
    /// Predictions against labels, and answers with a pruned cache, beside the baselines.
    ///
    /// Other tasks, methods, policies, ratios and limits add to what was measured with the same mapper; `--redo eval` drops it.
    Eval {
        #[command(flatten)]
        stage: StageArgs,
        /// Evaluate this export, run folder or repository of the hub in place of the run's best checkpoint.
        #[arg(long, value_name = "FOLDER_OR_REPO", value_hint = ValueHint::DirPath)]
        mapper: Option<PathBuf>,
        /// Write `kept.safetensors` beside the results: tokens, features, scores and what the mapper
        /// keeps of the first N contexts with facts, which a port is held against.
        #[arg(long, value_name = "N")]
        kept: Option<usize>,
        /// Show the first N contexts of each task with the exact prompts, special tokens spelt out, and stop: nothing is measured.
        #[arg(long, value_name = "N", conflicts_with_all = ["kept", "mapper"])]
        show: Option<usize>,
        #[command(flatten)]
        choices: EvalChoices,
    },
    /// The frozen mapper: safetensors, config.json, model card, parity vectors.
    Export(StageArgs),
    /// One self-contained HTML file about the run.
    Report(StageArgs),
    /// All stages in order; what is complete and matches the recipe is skipped.
    Run(StageArgs),
    /// Read a context with both models, prune the target's cache once, and answer questions from it.
    #[command(after_help = INFER_EXIT_CODES)]
    Infer(InferArgs),
    /// Put evaluated runs of one target side by side, with paired differences from the first.
    Compare(CompareArgs),
    /// Upload an export with its model card to a Hugging Face repository; only shows what it would do, unless `--yes`.
    Push(PushArgs),
    /// Time a stage's work per context, beside a matrix product and a copy measured in the same run.
    Bench(BenchArgs),
    /// What a shard, a stage folder, a run folder, a checkpoint or an export holds.
    Inspect {
        path: PathBuf,
        /// How far its labels or features are from those of another folder, made otherwise from the same examples: in another
        /// dtype, on another device, with another preset.
        #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        against: Option<PathBuf>,
    },
    /// Write the manual pages of this command and its subcommands: `man FOLDER/proxykv-train.1` shows one.
    Man {
        /// Made if it is not there.
        #[arg(value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
    /// Print the script that lets a shell complete this command: `source <(proxykv-train completions bash)`.
    Completions { shell: clap_complete::Shell },
}

/// What `infer` reads, keeps and answers.
#[derive(Clone, Debug, Args)]
pub struct InferArgs {
    /// Export of the mapper (`proxykv-train export`), the run folder that holds it, or a repository of the hub.
    #[arg(long, value_name = "FOLDER_OR_REPO", add = values::run_path())]
    pub mapper: PathBuf,
    /// Target: hub name or folder; the one that the mapper was made for if absent.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub target: Option<String>,
    /// Proxy: hub name or folder; the one that the mapper was made for if absent.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub proxy: Option<String>,
    /// Share of the context's KV pairs that stays, above 0, up to 1; `20%` is `0.2`.
    #[arg(long, value_name = "RATIO", conflicts_with = "budget", default_value_t = 0.2, value_parser = share)]
    pub retain: f64,
    /// Tokens that stay in every KV head, or as many KV pairs as these are together (`pair`,
    /// `pair-floor`, `pair-budget`).
    #[arg(long, value_name = "TOKENS")]
    pub budget: Option<usize>,
    /// Which KV pairs compete for a place.
    #[arg(long, value_enum, default_value = "pair-floor")]
    pub policy: PolicyName,
    /// Keep the newest N tokens of the context in every KV head, whatever their scores, as far as the budget reaches.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_recent: usize,
    /// Answer each question from the full cache as well, after one more prefill, and print both with tokens and memory.
    #[arg(long)]
    pub compare_full: bool,
    /// How proxy and target share the machine.
    #[arg(long, value_enum, default_value = "sequential")]
    pub regime: RegimeArg,
    /// Device of proxy and mapper, for `--regime dual`: the GPU behind the target's if absent.
    #[arg(long, value_name = "DEVICE", add = values::devices())]
    pub proxy_device: Option<DeviceChoice>,
    /// Let the mapper score windows of features as they become final, beside the proxy.
    #[arg(long)]
    pub overlap: bool,
    /// The context: a text file, or `-` for stdin.
    #[arg(long, value_name = "FILE", required_unless_present = "context_ids")]
    pub context: Option<PathBuf>,
    /// The context as token ids, a JSON list, in place of its text.
    #[arg(long, value_name = "FILE", conflicts_with = "context")]
    pub context_ids: Option<PathBuf>,
    /// A question; may be repeated.
    #[arg(long = "question", value_name = "TEXT")]
    pub questions: Vec<String>,
    /// Questions as JSON lines, `{"question": "..."}` or strings; `-` for stdin, answered as they come. A line that is no
    /// question is refused, and the next one is read.
    #[arg(long = "questions", value_name = "FILE")]
    pub question_file: Option<PathBuf>,
    /// Longest answer, tokens.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_new_tokens: usize,
    /// Read special tokens that context and questions spell out, such as `<|im_end|>`, as text: for texts that others wrote.
    #[arg(long)]
    pub special_tokens_as_text: bool,
    /// What the models compute in.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DtypeArg,
    /// Tokens per forward of the target's prefill; the scorer's when the mapper was trained if absent.
    #[arg(long, value_name = "TOKENS")]
    pub chunk_tokens: Option<usize>,
    /// Positions that the mapper scores in one forward.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    pub window_tokens: usize,
    /// Write the phases as a trace that ui.perfetto.dev shows.
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

/// What `compare` compares.
#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    /// Run folders, or names of folders below `--runs`; differences are from the first one.
    #[arg(value_name = "RUN", num_args = 2.., required = true, add = values::run_name())]
    pub folders: Vec<PathBuf>,
    /// Also write one self-contained HTML page.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What `push` sends where.
#[derive(Clone, Debug, Args)]
pub struct PushArgs {
    /// A run folder, whose export is meant, or an export.
    #[arg(value_name = "RUN_OR_EXPORT", add = values::run_path())]
    pub source: PathBuf,
    /// Repository on the hub; made if it is not there.
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: String,
    /// Make the repository private; one that is public is then refused.
    #[arg(long)]
    pub private: bool,
    /// Branch that the files go to; made if it is not there.
    #[arg(long, value_name = "BRANCH", default_value = "main")]
    pub revision: String,
    /// Message of the commit.
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Send it.
    #[arg(long)]
    pub yes: bool,
}

/// A policy, as `--policy` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyName {
    /// All KV pairs of the context with each other.
    Pair,
    /// The same, but every KV head keeps its best positions: at least a sixth of an even share.
    PairFloor,
    /// The positions of each KV head.
    PairUniform,
    /// The positions of each KV head, which keeps as many as the budget that the export has for it.
    PairBudget,
    /// Positions, the same in all KV heads.
    Token,
}

impl PolicyName {
    pub const fn policy(self) -> Policy {
        match self {
            Self::Pair => Policy::Pair,
            Self::PairFloor => Policy::PairFloor,
            Self::PairUniform => Policy::PairUniform,
            Self::PairBudget => Policy::PairBudget,
            Self::Token => Policy::Token,
        }
    }
}

/// A regime, as `--regime` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RegimeArg {
    /// Proxy and mapper first, then the target: the least memory.
    Sequential,
    /// Both at once on one GPU.
    Streams,
    /// Both at once, proxy and mapper on a GPU of their own.
    Dual,
}

/// A dtype, as `--dtype` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// bf16 on a GPU, f32 on a CPU.
    Auto,
    F32,
    Bf16,
}

/// What `bench` times, on what, and how often.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// The stage whose work is timed.
    #[arg(value_enum)]
    pub what: BenchWhat,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Models of the recipe's shapes with random weights, made on the device: no file is needed.
    #[arg(long)]
    pub random_weights: bool,
    /// Lengths of the contexts, tokens; the recipe's windows if absent.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub context: Vec<usize>,
    /// Runs of each piece of work, after one to warm up; `train` takes as many steps, five times.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeats: usize,
    /// No further run of a piece of work after this many seconds, but two at least.
    #[arg(long, default_value_t = 20.0, value_name = "SECONDS")]
    pub max_seconds: f64,
    /// Figures of `scripts/peer/time_kvpress.py` (`train`: `mapper_compile.py`, a line per run) for the same
    /// shape, to be printed beside ours.
    #[arg(long, value_name = "FILE")]
    pub peer: Option<PathBuf>,
    /// `decode`: sequences that decode together; several may be named.
    #[arg(long, default_value = "1", value_name = "N", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// `prefill`: the proxy's features that are timed; several may be named.
    #[arg(long, value_enum, value_name = "SET", value_delimiter = ',',
        default_values_t = [FeatureSet::Recipe, FeatureSet::Window, FeatureSet::Reconstruction])]
    pub features: Vec<FeatureSet>,
    /// `prefill`: write the phases of each regime as a trace that ui.perfetto.dev shows.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// Features, by where they come from and what they cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FeatureSet {
    /// The recipe's.
    Recipe,
    /// The proxy's: those of a window of queries.
    Window,
    /// The proxy's own KVzip scores.
    Reconstruction,
    /// The target's own prefill: the default channels, no surprisal.
    Target,
    /// The target's own prefill: those of a window of queries.
    TargetWindow,
    /// The target's own prefill: every channel that a target gives but those of the whole range.
    TargetUnrun,
    /// The target's own prefill: every channel that a target gives.
    TargetAll,
    /// The target's own prefill, and the proxy's with its KVzip scores.
    Both,
}

impl FeatureSet {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Recipe => "recipe",
            Self::Window => "window",
            Self::Reconstruction => "reconstruction",
            Self::Target => "target",
            Self::TargetWindow => "target window",
            Self::TargetUnrun => "target unrun",
            Self::TargetAll => "target all",
            Self::Both => "both",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchWhat {
    /// Target: prefill, and prefill with KVzip scoring.
    Label,
    /// Proxy: prefill, and the features by what they cost.
    Extract,
    /// Mapper: steps through the loader, and on a batch that is on the device already.
    Train,
    /// Both models: a context to a pruned cache, by the target alone, by KVzip, and by ProxyKV in every regime.
    Prefill,
    /// Target: tokens per second from full and from pruned caches.
    Decode,
}

impl BenchWhat {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Label => "label",
            Self::Extract => "extract",
            Self::Train => "train",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// What `plan` plans for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanMachine {
    /// An H200 if there is a GPU, else this CPU.
    Here,
    Cpu,
    H200,
}

/// The recipe and its overrides.
#[derive(Clone, Debug, Args)]
pub struct RecipeArgs {
    /// Recipe (TOML) of the pair.
    #[arg(long, value_name = "FILE", add = values::recipe())]
    pub recipe: PathBuf,
    /// Override a key of the recipe, such as `train.steps=500`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", add = values::assignment())]
    pub sets: Vec<Override>,
    /// Documents in place of the recipe's: text, jsonl or parquet files, as paths or quoted patterns such as 'my/*.txt'.
    #[arg(long, value_name = "FILES", num_args = 1.., value_hint = ValueHint::FilePath)]
    pub data: Vec<String>,
}

impl RecipeArgs {
    /// All that the command line says of the recipe; shorthands win over `--set`.
    pub fn overrides(&self) -> Vec<Override> {
        let mut all = self.sets.clone();
        if !self.data.is_empty() {
            let said = format!("--data {}", self.data.join(" "));
            all.push(Override::by_flag(said, format!("data.files={}", list(&self.data))));
        }
        all
    }
}

/// Texts as a TOML list.
fn list(items: &[impl AsRef<str>]) -> String {
    let quoted: Vec<String> = items.iter().map(|i| serde_json::Value::from(i.as_ref()).to_string()).collect();
    format!("[{}]", quoted.join(", "))
}

/// What `recipes` does.
#[derive(Clone, Debug, Subcommand)]
pub enum RecipesCommand {
    /// Every recipe below `recipes/` with its pair, in a line.
    Ls,
    /// The text of a recipe.
    Show {
        /// A name that `ls` prints, or a file.
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Write a recipe for your own pair; shapes are read from the models' config.json.
    Init(InitArgs),
}

/// What `recipes init` writes.
#[derive(Clone, Debug, Args)]
pub struct InitArgs {
    /// The model that you serve: folder or hub name.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub target: String,
    /// A small model of its family, for features of its prefill; without one, the target's own prefill gives them.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub proxy: Option<String>,
    /// Documents to train on: text, jsonl or parquet files, as paths or quoted patterns; without them, a manifest is named.
    #[arg(long, value_name = "FILES", num_args = 1..)]
    pub data: Vec<String>,
    /// Name of the pair and of its run folder.
    #[arg(long)]
    pub name: Option<String>,
    /// File to write, `-` for stdout; `recipes/NAME.toml` if absent. A file that is there is never overwritten.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What every stage takes.
#[derive(Clone, Debug, Args)]
pub struct StageArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Throw this stage's output away and make it again; may be repeated.
    #[arg(long, value_name = "STAGE")]
    pub redo: Vec<Stage>,
}

/// What is evaluated: shorthands for keys of `[eval]`.
#[derive(Clone, Debug, Default, Args)]
pub struct EvalChoices {
    #[arg(long, value_delimiter = ',', value_name = "TASK,...", help = tasks_help(), add = values::tasks())]
    pub tasks: Vec<String>,
    /// Methods in place of the recipe's, such as mapper,kvzip,snapkv.
    #[arg(long, value_delimiter = ',', value_name = "METHOD,...", value_parser = method_names(), add = values::methods())]
    pub methods: Vec<String>,
    /// Policies in place of the recipe's, of the metrics against labels and of the tasks.
    #[arg(long, value_delimiter = ',', value_name = "POLICY,...", value_enum)]
    pub policies: Vec<PolicyName>,
    /// At most this many contexts of each task.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Keep the newest N tokens of a context in every KV head, whatever their scores, as far as the budget reaches.
    #[arg(long, value_name = "N")]
    pub keep_recent: Option<usize>,
}

fn tasks_help() -> String {
    let names: Vec<&str> = pkv_eval::tasks::names().collect();
    format!(
        "Tasks in place of the recipe's: {}; or single tasks of a benchmark, such as ruler/vt",
        names.join(", ")
    )
}

/// The names that `--methods` takes, for help, completion and the hint after a misspelled one.
fn method_names() -> PossibleValuesParser {
    let name = |m: &pkv_eval::methods::Method| PossibleValue::new(m.name.name()).help(m.meaning);
    PossibleValuesParser::new(pkv_eval::methods::REGISTRY.iter().map(name))
}

impl EvalChoices {
    /// The same as `--set` would say it.
    pub fn overrides(&self) -> Vec<Override> {
        let mut out = Vec::new();
        let by = |said: &str, assignment: String| Override::by_flag(said, assignment);
        if !self.tasks.is_empty() {
            let said = format!("--tasks {}", self.tasks.join(","));
            out.push(by(&said, format!("eval.tasks={}", list(&self.tasks))));
        }
        if !self.methods.is_empty() {
            let said = format!("--methods {}", self.methods.join(","));
            out.push(by(&said, format!("eval.methods={}", list(&self.methods))));
        }
        if !self.policies.is_empty() {
            let names: Vec<&str> = self.policies.iter().map(|p| p.policy().name()).collect();
            let (said, policies) = (format!("--policies {}", names.join(",")), list(&names));
            out.push(by(&said, format!("eval.policies={policies}")));
            out.push(by(&said, format!("eval.answer_policies={policies}")));
        }
        if let Some(n) = self.keep_recent {
            out.push(by(&format!("--keep-recent {n}"), format!("eval.keep_recent={n}")));
        }
        if let Some(n) = self.limit {
            let said = format!("--limit {n}");
            out.push(by(&said, format!("eval.contexts={n}")));
            out.push(by(&said, format!("eval.benchmark.examples={n}")));
        }
        out
    }
}

/// The stages of `run`, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Stage {
    Prepare,
    Label,
    Extract,
    Train,
    Eval,
    Export,
    Report,
}

impl Stage {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Label => "label",
            Self::Extract => "extract",
            Self::Train => "train",
            Self::Eval => "eval",
            Self::Export => "export",
            Self::Report => "report",
        }
    }
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
    fn choices_are_overrides() {
        let args = [
            "proxykv-train",
            "eval",
            "--recipe",
            "r.toml",
            "--tasks",
            "facts,ruler/vt,ruler/cwe",
            "--methods",
            "mapper",
            "--policies",
            "pair-uniform,pair-budget",
            "--limit",
            "7",
        ];
        let Command::Eval { choices, .. } = Cli::try_parse_from(args).unwrap().command else { panic!() };
        assert_eq!(
            choices.overrides().into_iter().map(|o| o.assignment).collect::<Vec<_>>(),
            [
                r#"eval.tasks=["facts", "ruler/vt", "ruler/cwe"]"#,
                r#"eval.methods=["mapper"]"#,
                r#"eval.policies=["pair-uniform", "pair-budget"]"#,
                r#"eval.answer_policies=["pair-uniform", "pair-budget"]"#,
                "eval.contexts=7",
                "eval.benchmark.examples=7",
            ]
        );
        assert!(EvalChoices::default().overrides().is_empty());
        let misspelled = ["proxykv-train", "eval", "--recipe", "r.toml", "--methods", "mapper,snapvk"];
        let error = Cli::try_parse_from(misspelled).unwrap_err().to_string();
        assert!(error.contains("'snapvk'") && error.contains("'snapkv'"), "{error}");
    }
}
