//! `proxykv-train`: the command. Reads arguments, runs stages, prints results and errors.
//!
//! stdout carries results (JSON with `--json`), stderr progress and logs. Everything that computes
//! lives in the crates below; this one wires them, and is the only one that prints.

// They panic when stdout is closed or full; `output` and `terminal` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod bench;
mod compare;
mod completion;
mod doctor;
mod fetch;
mod infer;
mod inspect;
mod man;
mod output;
mod plan;
mod push;
mod recipes;
mod render;
mod results;
mod schema;
mod show;
mod stop;
mod sweep;
mod terminal;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Parser;
use pkv_core::hinted;
use pkv_run::session::{Choices, Session, choose_device};
use pkv_run::stages::eval::EvalOptions;
use pkv_run::{mapper_source, pair, session, stages};
use pkv_shard::Stage;

use crate::args::{Cli, Command, RecipeArgs, StageArgs};
use crate::terminal::Bar;

fn main() -> ExitCode {
    completion::answer();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are results.
        Err(e) if !e.use_stderr() => return end(output::check(e.print()).map(|()| ExitCode::SUCCESS)),
        Err(e) => e.exit(),
    };
    terminal::init_logs(cli.verbose);
    end(within_memory(&cli))
}

/// [`run`]; where a GPU's or the machine's memory runs out, an error.
fn within_memory(cli: &Cli) -> Result<ExitCode> {
    // Errors of `run` are its own business: only a panic of libtorch is looked at.
    pkv_gpu::unless_exhausted(|| Ok(run(cli)))?.unwrap_or_else(|| {
        Err(hinted(
            "memory ran out, of the GPU or of this machine; what was written before is whole",
            "see what else uses it (`nvidia-smi`, `free -h`) and what each stage needs (`proxykv-train plan`); \
             then run the same command again, with smaller `train.batch`, `train.window_tokens`, \
             `label.prefill_chunk_tokens` or `extract.prefill_chunk_tokens`",
        )
        .into())
    })
}

fn end(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|e| {
        terminal::print(&render::error(&e));
        ExitCode::from(render::exit_code(&e))
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    // Until now the signal has no handler: reading the arguments needs no clean stop.
    let stop = stop::stop_on_signal()?;
    if cli.json
        && matches!(cli.command, Command::Inspect { .. } | Command::Man { .. } | Command::Completions { .. })
    {
        return Err(hinted("this command prints text alone", "leave `--json` out").into());
    }
    match &cli.command {
        Command::Doctor { recipe, overrides } => return doctor_command(cli, recipe.as_deref(), overrides),
        Command::Plan { recipe, resolved, machine } => plan::run(cli, recipe, *resolved, *machine)?,
        Command::Fetch { recipe, models_only } => fetch::run(cli, recipe, *models_only, stop)?,
        Command::Recipes { what } => recipes::run(cli, what, &stop)?,
        Command::Schema { reference } => schema::run(*reference)?,
        Command::Prepare { stage, show } => {
            let session = one(cli, stage, Stage::Prepare, stop, &EvalOptions::default())?;
            show.map_or(Ok(()), |n| show::examples(cli, &session, n))?;
        }
        Command::Label(a) => drop(one(cli, a, Stage::Label, stop, &EvalOptions::default())?),
        Command::Extract(a) => drop(one(cli, a, Stage::Extract, stop, &EvalOptions::default())?),
        Command::Train(a) => drop(one(cli, a, Stage::Train, stop, &EvalOptions::default())?),
        Command::Eval { stage, mapper, kept, show, choices } => {
            let mut stage = stage.clone();
            stage.recipe.sets.extend(choices.overrides());
            if let Some(n) = show {
                show::prompts(cli, &open(cli, &stage.recipe, stop)?, *n)?;
                return Ok(ExitCode::SUCCESS);
            }
            let mapper = mapper
                .as_deref()
                .map(|named| mapper_source::export_folder(named, &Bar::new(), &stop))
                .transpose()?;
            let options = EvalOptions { mapper, kept: *kept };
            one(cli, &stage, Stage::Eval, stop, &options)?;
        }
        Command::Export(a) => drop(one(cli, a, Stage::Export, stop, &EvalOptions::default())?),
        Command::Report(a) => drop(one(cli, a, Stage::Report, stop, &EvalOptions::default())?),
        Command::Run(a) => all(cli, a, stop)?,
        Command::Infer(a) => return infer::run(cli, a, stop),
        Command::Sweep(a) => sweep::run(cli, a, stop)?,
        Command::Compare(a) => compare::run(cli, a)?,
        Command::Push(a) => push::run(cli, a, stop)?,
        Command::Bench(a) => bench::run(cli, a, stop)?,
        Command::Inspect { path, against: None } => output::print(&inspect::inspect(path)?)?,
        Command::Inspect { path, against: Some(other) } => output::print(&inspect::against(path, other)?)?,
        Command::Man { folder } => man::run(folder)?,
        Command::Completions { shell } => output::print(&completion::script(*shell)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A run folder to work in, with its log.
fn open(cli: &Cli, args: &RecipeArgs, stop: Arc<AtomicBool>) -> Result<Session> {
    let recipe = session::load_recipe(&args.recipe, &args.overrides())?;
    let device = choose_device(cli.device, cli.threads)?;
    let session =
        Session::open(recipe, Choices { runs: &cli.runs, device, bar: Box::new(Bar::new()), stop })?;
    terminal::log_to(&session.run.log())?;
    Ok(session)
}

/// One stage on its own, and the session that it ran in.
fn one(
    cli: &Cli,
    args: &StageArgs,
    stage: Stage,
    stop: Arc<AtomicBool>,
    options: &EvalOptions,
) -> Result<Session> {
    if stage == Stage::Report {
        results::check_run(cli, &args.recipe)?;
    }
    let session = open(cli, &args.recipe, stop)?;
    stages::run(&session, stage, &args.redo, options)?;
    if stage == Stage::Eval {
        results::print(cli, &session, options)?;
    }
    Ok(session)
}

/// All stages in order, then what came of them.
fn all(cli: &Cli, args: &StageArgs, stop: Arc<AtomicBool>) -> Result<()> {
    let session = open(cli, &args.recipe, stop)?;
    let options = EvalOptions::default();
    let mut redo = args.redo.clone();
    for (at, stage) in Stage::ALL.into_iter().enumerate() {
        terminal::stage(at + 1, Stage::ALL.len(), stage.name());
        // Labels may bring features along: those that are made again go before that.
        if stage == Stage::Label && redo.contains(&Stage::Extract) {
            stages::throw_away(&session, Stage::Extract, &options)?;
            redo.retain(|&stage| stage != Stage::Extract);
        }
        stages::run(&session, stage, &redo, &options)?;
    }
    results::print_run(cli, &session, &options)
}

fn doctor_command(
    cli: &Cli,
    recipe: Option<&std::path::Path>,
    overrides: &[pkv_recipe::Override],
) -> Result<ExitCode> {
    let recipe = recipe.map(|path| session::load_recipe(path, overrides)).transpose()?;
    let device = pkv_gpu::device(cli.device)?;
    let checks = doctor::checks(recipe.as_ref(), device, &cli.runs);
    output::print_either(cli.json, &checks, || doctor::table(&checks))?;
    Ok(if doctor::all_well(&checks) { ExitCode::SUCCESS } else { ExitCode::from(render::REPAIRABLE) })
}
