//! `plan`: estimates the cost of a run before anything is downloaded.

use anyhow::Result;
use pkv_recipe::plan::{Machine, Plan};
use pkv_run::session::{choose_device, load_with_origins, manifest};
use tch::Device;

use crate::args::{Cli, RecipeArgs};
use crate::output;

pub fn run(cli: &Cli, args: &RecipeArgs, resolved: bool, machine: &str) -> Result<()> {
    let (recipe, origins) = load_with_origins(&args.file.recipe, &args.overrides())?;
    if resolved {
        let json = recipe.explained_json(&origins);
        return output::print_either(cli.json, &json, || recipe.explained(&origins));
    }
    // A manifest that cannot be read is a mistake worth hearing about now.
    manifest(&recipe)?;
    let cpu = || Machine::cpu(tch::get_num_threads().max(1) as usize);
    let machine = match machine {
        "cpu" => cpu(),
        "here" if choose_device(cli.device, cli.threads)? == Device::Cpu => cpu(),
        other => Machine::card(other).unwrap_or_else(Machine::h200),
    };
    let plan = Plan::new(&recipe, machine, &pkv_eval::tasks::work(&recipe));
    output::print_either(cli.json, &plan, || plan.table())
}
