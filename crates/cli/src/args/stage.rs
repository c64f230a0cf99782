//! Commands of the stages, one for each entry of the registry in `pkv_run`.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, Error, FromArgMatches, Subcommand, ValueHint};
use pkv_core::Policy;
use pkv_recipe::Override;
use pkv_run::stages::{REGISTRY, entry};
use pkv_shard::Stage;

use super::pieces::{Devices, devices};
use super::{PieceArgs, StageArgs, list, policy};
use crate::completion::values;

/// A stage on its own: what all of them take, and what this one takes besides.
#[derive(Clone, Debug)]
pub struct StageCommand {
    pub stage: Stage,
    pub args: StageArgs,
    pub prepare: Option<PrepareArgs>,
    pub train: Option<TrainArgs>,
    pub eval: Option<EvalArgs>,
    /// Of a stage that is made in pieces.
    pub pieces: Option<PieceArgs>,
}

/// Arguments of `prepare` alone.
#[derive(Clone, Debug, Args)]
pub struct PrepareArgs {
    /// Afterwards, show the first N examples as text, each with the facts planted in it.
    #[arg(long, value_name = "N")]
    pub show: Option<usize>,
}

/// Arguments of `train` alone.
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    /// Take features that the recipe does not store (`extract.after_use = "delete"`) from N processes, each
    /// with the models that features come from; the mapper is the same for any N [default: made in this
    /// process].
    ///
    /// A worker that dies is replaced once. Memory for rows that wait: 4 GB at most, and six rows for each
    /// worker.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=256))]
    pub feature_workers: Option<u64>,
    /// Devices of the feature workers, in turn, such as `cuda:1,cuda:2`, or `all` GPUs [default: the device
    /// that trains].
    #[arg(long, value_name = "DEVICE,...", value_parser = devices, requires = "feature_workers",
        add = values::devices())]
    pub devices: Option<Devices>,
    /// Make the features of these sources, for the process that started this one with `--feature-workers`.
    #[arg(long = "make-features", value_name = "SOURCE,...", hide = true)]
    pub make_features: Option<String>,
}

/// Arguments of `eval` alone.
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    /// Evaluate this export, run folder or hub repository instead of the run's best checkpoint.
    #[arg(long, value_name = "FOLDER_OR_REPO", value_hint = ValueHint::DirPath)]
    pub mapper: Option<PathBuf>,
    /// Write `kept.safetensors` beside the results, to test ports to other programs: tokens, features,
    /// scores and kept KV pairs of the first N contexts with facts.
    #[arg(long, value_name = "N")]
    pub kept: Option<usize>,
    /// Show the first N contexts of each task with the exact prompts, special tokens spelt out, and exit
    /// without measuring anything.
    #[arg(long, value_name = "N", conflicts_with_all = ["kept", "mapper"])]
    pub show: Option<usize>,
    #[command(flatten)]
    pub choices: EvalChoices,
}

impl Subcommand for StageCommand {
    fn augment_subcommands(command: Command) -> Command {
        REGISTRY.iter().fold(command, |command, entry| {
            let short = entry.about.split("\n\n").next().unwrap_or_default();
            let own = StageArgs::augment_args(Command::new(entry.stage.name()));
            let own = match entry.stage {
                Stage::Prepare => PrepareArgs::augment_args(own),
                Stage::Train => TrainArgs::augment_args(own),
                Stage::Eval => EvalArgs::augment_args(own),
                _ => own,
            };
            let own = if entry.in_pieces { PieceArgs::augment_args(own) } else { own };
            command.subcommand(own.about(short).long_about(entry.about))
        })
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        name.parse::<Stage>().is_ok()
    }
}

impl FromArgMatches for StageCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let (name, own) = matches.subcommand().ok_or_else(|| Error::new(ErrorKind::MissingSubcommand))?;
        let stage = name.parse::<Stage>().map_err(|e| Error::raw(ErrorKind::InvalidSubcommand, e))?;
        Ok(Self {
            stage,
            args: StageArgs::from_arg_matches(own)?,
            prepare: (stage == Stage::Prepare).then(|| PrepareArgs::from_arg_matches(own)).transpose()?,
            train: (stage == Stage::Train).then(|| TrainArgs::from_arg_matches(own)).transpose()?,
            eval: (stage == Stage::Eval).then(|| EvalArgs::from_arg_matches(own)).transpose()?,
            pieces: entry(stage).in_pieces.then(|| PieceArgs::from_arg_matches(own)).transpose()?,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What to evaluate: shorthands for keys of `[eval]`.
#[derive(Clone, Debug, Default, Args)]
pub struct EvalChoices {
    #[arg(long, value_delimiter = ',', value_name = "TASK,...", help = tasks_help(), add = values::tasks())]
    pub tasks: Vec<String>,
    /// Methods to use instead of the recipe's, such as mapper,kvzip,snapkv.
    #[arg(long, value_delimiter = ',', value_name = "METHOD,...", value_parser = method_names(), add = values::methods())]
    pub methods: Vec<String>,
    /// Policies to use instead of the recipe's, for the metrics against labels and for the tasks.
    #[arg(long, value_delimiter = ',', value_name = "POLICY,...", value_parser = policy())]
    pub policies: Vec<Policy>,
    /// Maximum number of contexts per task.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Keep the newest N tokens of a context in every KV head, regardless of their scores, within the
    /// budget.
    #[arg(long, value_name = "N")]
    pub keep_recent: Option<usize>,
}

fn tasks_help() -> String {
    let names: Vec<&str> = pkv_eval::tasks::names().collect();
    format!(
        "Tasks to use instead of the recipe's: {}; or single tasks of a benchmark, such as ruler/vt",
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
            let named = |all: bool| -> Vec<&str> {
                self.policies.iter().filter(|p| all || !p.needs_keys()).map(|p| p.name()).collect()
            };
            let said = format!("--policies {}", named(true).join(","));
            // Labels have no keys.
            if !named(false).is_empty() {
                out.push(by(&said, format!("eval.policies={}", list(&named(false)))));
            }
            out.push(by(&said, format!("eval.answer_policies={}", list(&named(true)))));
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

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
            "pair-uniform,pair-keydiff,pair-budget",
            "--limit",
            "7",
        ];
        let Command::Stage(StageCommand { eval: Some(EvalArgs { choices, .. }), .. }) =
            Cli::try_parse_from(args).unwrap().command
        else {
            panic!()
        };
        assert_eq!(
            choices.overrides().into_iter().map(|o| o.assignment).collect::<Vec<_>>(),
            [
                r#"eval.tasks=["facts", "ruler/vt", "ruler/cwe"]"#,
                r#"eval.methods=["mapper"]"#,
                r#"eval.policies=["pair-uniform", "pair-budget"]"#,
                r#"eval.answer_policies=["pair-uniform", "pair-keydiff", "pair-budget"]"#,
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
