//! `plan`: estimates the cost of a run before anything is downloaded.

use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_recipe::plan::{Machine, MachineChoice, PastRun, Plan};
use pkv_recipe::{Recipe, Steps, TaskName};
use pkv_results::{LABEL_METRICS, RESULTS_FILE, Results};
use pkv_run::session::{choose_device, load_recipe, load_with_origins, manifest};
use pkv_shard::{RunJson, RunLayout, Stage};
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
pub fn run(cli: &Cli, args: &RecipeArgs, machine: Option<&MachineChoice>, past: Option<&Path>) -> Result<()> {
    let recipe = load_recipe(&args.file.recipe, &args.overrides())?;
    // A manifest that cannot be read is a mistake worth hearing about now.
    manifest(&recipe)?;
    let past = past.map(|folder| past_run(folder, &recipe)).transpose()?;
    let here = || choose_device(cli.device, cli.threads).map(on_device);
    let cpu = || on_device(Device::Cpu);
    let machine = match (machine, &past) {
        (Some(machine), _) => machine.machine(here, cpu)?,
        (None, Some(past)) => past.machine().clone(),
        (None, None) => MachineChoice::here().machine(here, cpu)?,
    };
    let mut plan = Plan::new(&recipe, machine, &pkv_eval::tasks::work(&recipe));
    if let Some(past) = &past {
        plan = plan.calibrated(past);
    }
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
    let tasks = pkv_eval::tasks::work(&recipe);
    let mut past = PastRun::new(folder.display().to_string());
    for (name, record) in &run.stages {
        if name.parse::<Stage>().is_err() || !(record.secs > 0.0 && record.secs.is_finite()) {
            continue;
        }
        let machine = if record.gpus > 0 {
            Machine::gpu(Some(&record.device), None)
        } else {
            let threads = record.device.split(' ').next().and_then(|n| n.parse().ok());
            Machine::cpu(threads.unwrap_or_else(|| run.threads.unwrap_or(1) as usize))
        };
        past.add(name, record.secs, &Plan::new(&recipe, machine, &tasks));
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
