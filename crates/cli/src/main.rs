//! `proxykv-train`: the command. Reads arguments, runs stages, prints results and errors.
//!
//! stdout carries results (JSON with `--json`), stderr progress and logs. Everything that computes
//! lives in the crates below; this one wires them, and is the only one that prints.

// They panic when stdout is closed or full; `output` and `terminal` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod bench;
mod buckets;
mod compare;
mod completion;
mod fetch;
mod infer;
mod launch;
mod man;
mod memory;
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
mod wrapped;

use std::process::ExitCode;

use anyhow::Result;
use pkv_core::{FailureKind, NoProgress, Progress, Stop, Task, hinted};
use pkv_gpu::DeviceGroup;
use pkv_run::feature_workers::{FeatureWorkers, sources_of};
use pkv_run::session::{Choices, Session, choose_devices};
use pkv_run::stages::Part;
use pkv_run::stages::eval::EvalOptions;
use pkv_run::workers::{Said, Workers};
use pkv_run::{mapper_source, session, stages};
use pkv_shard::{Missing, Stage};

use crate::args::pieces;
use crate::args::{Cli, Command, Devices, RecipeArgs, StageArgs, StageCommand, TrainArgs};
use crate::terminal::Bar;

fn main() -> ExitCode {
    completion::answer();
    let mut cli = match args::parse() {
        Ok(cli) => cli,
        // Help and version are results.
        Err(e) if !e.use_stderr() => return end(output::check(e.print()).map(|()| ExitCode::SUCCESS)),
        Err(e) => e.exit(),
    };
    terminal::init_logs(cli.verbose);
    if let Err(e) = buckets::resolve(&mut cli) {
        return end(Err(e));
    }
    end(within_memory(&cli))
}

/// [`run`]; where a GPU's or the machine's memory runs out, an error.
fn within_memory(cli: &Cli) -> Result<ExitCode> {
    // Errors of `run` are its own business: only a panic of libtorch is looked at.
    pkv_gpu::unless_exhausted(|| Ok(run(cli)))?.unwrap_or_else(|| {
        let memory = hinted(
            "memory ran out, of the GPU or of this machine; what was written before is whole",
            "see what else uses it (`nvidia-smi`, `free -h`) and what each stage needs (`proxykv-train plan`); \
             then run the same command again, with smaller `train.batch`, `train.window_tokens`, \
             `label.prefill_chunk_tokens` or `extract.prefill_chunk_tokens`",
        );
        Err(memory.environment().into())
    })
}

fn end(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|e| {
        terminal::print(&terminal::fitted(&render::error(&e)));
        ExitCode::from(FailureKind::of(&e).exit_code())
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    // Until now the signal has no handler: reading the arguments needs no clean stop.
    let stop = stop::stop_on_signal()?;
    match &cli.command {
        Command::Doctor { recipe, overrides } => return doctor_command(cli, recipe.as_deref(), overrides),
        Command::Plan { recipe, resolved: true, .. } => plan::resolved(cli, recipe)?,
        Command::Plan { recipe, machine, calibrate, workers, cluster, .. } => {
            plan::run(cli, recipe, machine.as_ref(), calibrate.as_deref(), (workers, *cluster))?;
        }
        Command::Fetch { recipe, models_only } => fetch::run(cli, recipe, *models_only, &stop)?,
        Command::Recipes { what } => recipes::run(cli, what, &stop)?,
        Command::Schema { reference } => schema::run(*reference)?,
        Command::Stage(command) => one(cli, command, stop)?,
        Command::Run(a) => all(cli, a, stop)?,
        Command::Infer(a) => return infer::run(cli, a, &stop),
        Command::Launch(a) => launch::run(cli, a, &stop)?,
        Command::Sweep(a) => sweep::run(cli, a, &stop)?,
        Command::Compare(a) => compare::run(cli, a)?,
        Command::Push(a) => push::run(cli, a, &stop)?,
        Command::Bench(a) => bench::run(cli, a, &stop)?,
        Command::Inspect { path, against: None } => output::print(&pkv_inspect::inspect(path)?)?,
        Command::Inspect { path, against: Some(other) } => {
            output::print(&pkv_inspect::against(path, other)?)?
        }
        Command::Man { folder } => man::run(folder)?,
        Command::Completions { shell } => output::print(&completion::script(*shell)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A run folder to work in, with its log.
fn open(cli: &Cli, args: &RecipeArgs, stop: Stop) -> Result<Session> {
    open_part(cli, &cli.device, args, stop, Part::default(), Box::new(Bar::new()))
}

/// As [`open`], for a part of a stage, on devices of its own.
fn open_part(
    cli: &Cli,
    devices: &DeviceGroup,
    args: &RecipeArgs,
    stop: Stop,
    part: Part,
    bar: Box<dyn Progress>,
) -> Result<Session> {
    let recipe = args.load()?;
    let devices = choose_devices(devices, cli.threads)?;
    let session = Session::open(recipe, Choices { runs: &cli.runs, devices, bar, stop, part })?;
    terminal::log_to(&session.run.log())?;
    tracing::debug!(secs = pkv_gpu::process_secs(), "started");
    Ok(session)
}

/// One stage on its own, and what its command shows.
fn one(cli: &Cli, command: &StageCommand, stop: Stop) -> Result<()> {
    let StageCommand { stage, args, prepare, train, eval, pieces } = command;
    if let Some(sources) = train.as_ref().and_then(|train| train.make_features.as_ref()) {
        return make_features(cli, &args.recipe, sources, stop);
    }
    if *stage == Stage::Report {
        results::check_run(cli, &args.recipe)?;
    }
    let mut recipe = args.recipe.clone();
    let mut options = EvalOptions::default();
    if let Some(eval) = eval {
        recipe.file.sets.extend(eval.choices.overrides());
        if let Some(n) = eval.show {
            return show::prompts(cli, &open(cli, &recipe, stop)?, n);
        }
        let export = |named| mapper_source::export_folder(named, &Bar::new(), &stop);
        options = EvalOptions { mapper: eval.mapper.as_deref().map(export).transpose()?, kept: eval.kept };
    }
    let part = pieces.as_ref().map(|pieces| pieces.part(!args.redo.is_empty())).transpose()?;
    let is_worker = pieces.as_ref().is_some_and(|pieces| pieces.worker);
    let bar: Box<dyn Progress> = if is_worker { Box::new(Said { print: say }) } else { Box::new(Bar::new()) };
    let devices =
        pieces.as_ref().and_then(|pieces| pieces.devices.as_ref()).map(Devices::list).transpose()?;
    // Workers have the devices: this process takes no memory of a GPU that none of them has.
    let own = devices.as_ref().and_then(|all| all.first()).unwrap_or(&cli.device);
    let mut session = open_part(cli, own, &recipe, stop, part.unwrap_or_default(), bar)?;
    session.feature_workers =
        train.as_ref().map(|train| feature_workers(cli, &session, train)).transpose()?.flatten();
    let is_complete = match &devices {
        Some(devices) => on_devices(cli, &session, command, devices, &options)?,
        None => stages::run(&session, *stage, &args.redo, &options)?,
    };
    if is_worker || !is_complete {
        return Ok(());
    }
    match prepare.as_ref().and_then(|prepare| prepare.show) {
        Some(n) => show::examples(cli, &session, n),
        None if eval.is_some() => results::print(cli, &session, &options, &args.recipe, &[*stage]),
        None if cli.json => results::print_stage(&session, *stage),
        None => Ok(()),
    }
}

/// The workers that make features while this process trains.
fn feature_workers(cli: &Cli, session: &Session, args: &TrainArgs) -> Result<Option<FeatureWorkers>> {
    let Some(count) = args.feature_workers.filter(|n| *n > 0) else { return Ok(None) };
    let devices = match &args.devices {
        Some(devices) => devices.list()?.iter().map(args::one_device).collect::<Result<Vec<_>>>()?,
        None => vec![session.device],
    };
    Ok(Some(FeatureWorkers {
        arguments: pieces::of_worker(std::env::args_os().skip(1)),
        devices: devices.into_iter().cycle().take(count as usize).collect(),
        is_verbose: cli.verbose > 0,
        print: terminal::print_line,
    }))
}

/// The work of a feature worker. It writes nothing, and ends with the process that started it: a signal to
/// all of them is that process's business.
fn make_features(cli: &Cli, args: &RecipeArgs, sources: &str, stop: Stop) -> Result<()> {
    let devices = choose_devices(&cli.device, cli.threads)?;
    let (bar, part) = (Box::new(NoProgress), Part::default());
    let session = Session::planned(args.load()?, Choices { runs: &cli.runs, devices, bar, stop, part })?;
    stages::answer_stdin(&session, &sources_of(sources)?)
}

/// What a worker says. If the process that reads it has gone, so does this one.
fn say(line: &str) {
    let _ = output::print(line);
}

/// One stage by a worker on each of `devices`. Whether it is complete.
fn on_devices(
    cli: &Cli,
    session: &Session,
    command: &StageCommand,
    devices: &[DeviceGroup],
    options: &EvalOptions,
) -> Result<bool> {
    // A device that is absent is reported here and not by each worker.
    devices.iter().try_for_each(|group| group.devices().map(drop))?;
    let stage = command.stage;
    if command.args.redo.contains(&stage) {
        stages::throw_away(session, stage, options)?;
    }
    let task = session.part.task.unwrap_or(Task::ALL);
    let workers = Workers {
        arguments: pieces::of_worker(std::env::args_os().skip(1)),
        stage,
        task,
        devices,
        threads: cli.threads.map(|n| n as usize),
        // Warnings, errors and what became of the rows are shown in any case.
        is_verbose: cli.verbose > 0,
        print: terminal::print_line,
        bar: session.bar.as_ref(),
        stop: &session.stop,
    };
    let missing = workers.run(&stages::folders(session, stage, options))?;
    if let Some(Missing { what, command }) = &missing {
        tracing::info!("{}: this part is done; {what}\nhint: {command}", stage.name());
    }
    Ok(missing.is_none())
}

/// All stages in order, then what came of them.
fn all(cli: &Cli, args: &StageArgs, stop: Stop) -> Result<()> {
    let session = open(cli, &args.recipe, stop)?;
    let options = EvalOptions::default();
    let begin = |stage: Stage| terminal::stage(stage as usize + 1, Stage::ALL.len(), stage.name());
    stages::run_all(&session, &args.redo, &options, &begin)?;
    results::print(cli, &session, &options, &args.recipe, &Stage::ALL)
}

fn doctor_command(
    cli: &Cli,
    recipe: Option<&std::path::Path>,
    overrides: &[pkv_recipe::Override],
) -> Result<ExitCode> {
    let recipe = recipe.map(|path| session::load_recipe(path, overrides)).transpose()?;
    let device = pkv_gpu::device(cli.single_device("doctor")?)?;
    let checks = pkv_doctor::checks(recipe.as_ref(), device, &cli.runs);
    if cli.json {
        output::print_json(&checks)?;
    } else {
        output::print_styled(&pkv_doctor::table(&checks, terminal::has_color(&std::io::stdout())))?;
    }
    Ok(if pkv_doctor::all_well(&checks) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FailureKind::Input.exit_code())
    })
}
