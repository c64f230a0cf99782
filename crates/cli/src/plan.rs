//! `plan`: estimates the cost of a run before anything is downloaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_recipe::plan::{Cluster, Machine, MachineChoice, PastRun, Plan};
use pkv_recipe::{Recipe, Steps, TaskName};
use pkv_results::{LABEL_METRICS, RESULTS_FILE, Results};
use pkv_run::session::{self, Devices, load_recipe, load_with_origins, manifest};
use pkv_shard::{PiecesState, RunJson, RunLayout, Stage};
use tch::Device;

use pkv_doctor::on_device;

use crate::args::{Cli, RecipeArgs};
use crate::output;

/// Every key of the recipe, its meaning and origin.
///
/// # Errors
/// The recipe is invalid.
pub fn resolved(cli: &Cli, args: &RecipeArgs) -> Result<()> {
    let (recipe, origins) = load_with_origins(&args.file.recipe, &args.overrides())?;
    output::print_either(cli.json, &recipe.explained_json(&origins), || recipe.explained(&origins))
}

/// # Errors
/// The recipe or its manifest is invalid, the device is absent, or the past run cannot be read.
pub fn run(
    cli: &Cli,
    args: &RecipeArgs,
    machine: Option<&MachineChoice>,
    past: Option<&Path>,
    (workers, cluster): (&[u64], Cluster),
) -> Result<()> {
    let recipe = load_recipe(&args.file.recipe, &args.overrides())?;
    // A manifest that cannot be read is a mistake worth hearing about now.
    manifest(&recipe)?;
    let past = past.map(|folder| past_run(folder, &recipe)).transpose()?;
    let here = || -> Result<Machine> {
        let devices = session::devices(&cli.device, cli.threads)?;
        let visible = pkv_gpu::cuda_count().max(1);
        Ok(match devices {
            Devices::From(device) => on_device(device).of_gpus(visible),
            Devices::Named(devices) if devices[0].is_cuda() => on_device(devices[0]).of_gpus(devices.len()),
            Devices::Named(devices) => on_device(devices[0]),
        })
    };
    let cpu = || on_device(Device::Cpu);
    let machine = match (machine, &past) {
        (Some(machine), _) => machine.machine(here, cpu)?,
        (None, Some(past)) => past.machine().clone(),
        (None, None) => MachineChoice::here().machine(here, cpu)?,
    };
    let over = (cli.device.count() > 1).then(|| cli.device.count());
    let mut plan = Plan::over(&recipe, machine, &pkv_eval::work(&recipe), over);
    if let Some(past) = &past {
        plan = plan.calibrated(past);
    }
    plan = plan.with_workers(workers, recipe.data.shard_examples as u64, cluster);
    output::print_either(cli.json, &plan, || plan.table())
}

/// A run that was made, planned for the machine that made it; its times are for the plan of `now`.
fn past_run(folder: &Path, now: &Recipe) -> Result<PastRun> {
    let cannot = |why: &str| {
        hinted(
            format!("cannot calibrate by `{}`: {why}", folder.display()),
            "name the folder of a run whose stages are complete, such as `runs/demo`",
        )
    };
    let layout = RunLayout::new(folder);
    let run = RunJson::read(&layout)?.ok_or_else(|| cannot("there is no `run.json`"))?;
    let mut recipe: Recipe = serde_json::from_value(run.recipe)
        .with_context(|| cannot("`run.json` has no recipe that can be read"))?;
    recipe.check().with_context(|| cannot("the recipe in `run.json` is not valid"))?;
    // Steps that ended by themselves are planned as those that were made, answers as those that there are.
    let made = run.stages.get(Stage::Train.name()).and_then(|train| train.summary["step"].as_u64());
    if let (Steps::Auto, Some(steps)) = (recipe.train.steps, made.filter(|n| *n > 0)) {
        recipe.train.steps = Steps::Number(steps);
    }
    let results = Results::read(&layout.eval().join(RESULTS_FILE)).ok();
    if let Some(results) = &results {
        as_measured(&mut recipe, results);
    }
    let work = pkv_eval::work(&recipe);
    let mut past = PastRun::new(folder.display().to_string());
    let threads = run.threads.unwrap_or(1) as usize;
    let mut at_work = Vec::new();
    for (stage, folders) in shared(&layout, &recipe) {
        let Some((secs, device)) = by_pieces(&folders)? else { continue };
        at_work.push(stage.name());
        let machine =
            if device.starts_with("cuda") { Machine::gpu(None, None) } else { Machine::cpu(threads) };
        past.add(stage.name(), secs, &Plan::new(&recipe, machine, &work));
    }
    for (name, record) in &run.stages {
        // Pieces that many processes made: their time, and not that of the last process.
        let secs = record.summary["pieces_s"].as_f64().unwrap_or(record.secs);
        if name.parse::<Stage>().is_err()
            || !(secs > 0.0 && secs.is_finite())
            || at_work.contains(&name.as_str())
        {
            continue;
        }
        let machine = if record.gpus > 0 {
            Machine::gpu(Some(&record.device), None)
        } else {
            Machine::cpu(record.device.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(threads))
        };
        past.add(name, secs, &Plan::new(&recipe, machine, &work));
    }
    // Metrics against labels grow with the test split, which no question does.
    let labels = results.iter().flat_map(|r| &r.timings).find(|timing| timing.what == LABEL_METRICS);
    if let Some(labels) = labels {
        let tokens = |r: &Recipe| (r.data.test * r.data.longest_test_window()).max(1) as f64;
        past.set_apart(Stage::Eval.name(), labels.secs, labels.secs * tokens(now) / tokens(&recipe));
    }
    if past.is_empty() {
        return Err(cannot("none of its stages has a time").into());
    }
    Ok(past)
}

/// Folders of the stages whose times are those of their pieces while they are at work.
fn shared(layout: &RunLayout, recipe: &Recipe) -> [(Stage, Vec<PathBuf>); 2] {
    let features = recipe.extract.from.iter().map(|&source| layout.features(source)).collect();
    [(Stage::Label, vec![layout.labels()]), (Stage::Extract, features)]
}

/// Seconds of a stage by the pieces of all its folders that are done, and a device that made them; `None` if
/// one of the folders has none.
fn by_pieces(folders: &[PathBuf]) -> Result<Option<(f64, String)>> {
    let mut of_all = None;
    for folder in folders {
        let Some(state) = PiecesState::read(folder)? else { return Ok(None) };
        let done: Vec<_> = state.markers.iter().filter(|m| m.is_done() && m.secs > 0.0).collect();
        let (secs, rows) = done.iter().fold((0.0, 0), |(secs, rows), m| (secs + m.secs, rows + m.rows));
        let Some(device) = done.first().map(|m| m.by.device.clone()).filter(|_| rows > 0) else {
            return Ok(None);
        };
        let secs = secs / rows as f64 * state.plan.rows as f64;
        let (before, _) = of_all.take().unwrap_or((0.0, String::new()));
        of_all = Some((before + secs, device));
    }
    Ok(of_all)
}

/// Let `recipe` ask what `results` hold: its last evaluation may have asked less, or else.
fn as_measured(recipe: &mut Recipe, results: &Results) {
    let eval = &mut recipe.eval;
    let answers = || results.facts.iter().chain(&results.benchmarks);
    eval.tasks.clear();
    if let Some(facts) = &results.facts {
        eval.tasks.push(TaskName::FACTS);
        eval.contexts = facts.contexts;
    }
    if let Some(perplexity) = &results.perplexity {
        eval.tasks.push(TaskName::PERPLEXITY);
        eval.contexts = eval.contexts.max(perplexity.contexts);
    }
    for task in &results.benchmarks {
        // One that mixes kinds of questions has a row for each.
        let single = task.task.split('/').next().unwrap_or_default();
        let name = TaskName::new(&format!("{}/{single}", task.suite));
        if !eval.tasks.contains(&name) {
            eval.tasks.push(name);
        }
    }
    if let Some(most) = results.benchmarks.iter().map(|task| task.contexts).max() {
        eval.benchmark.examples = most;
    }
    let cells: Vec<_> = answers().flat_map(|task| &task.cells).collect();
    if !cells.is_empty() {
        eval.methods.clear();
        eval.answer_policies.clear();
        eval.answer_ratios.clear();
    }
    for cell in cells {
        if !eval.methods.contains(&cell.method) {
            eval.methods.push(cell.method);
        }
        if !eval.answer_policies.contains(&cell.policy) {
            eval.answer_policies.push(cell.policy);
        }
        if !eval.answer_ratios.contains(&cell.ratio) {
            eval.answer_ratios.push(cell.ratio);
        }
    }
}
