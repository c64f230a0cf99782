//! `plan`: what a run will cost, before anything is downloaded.

use anyhow::Result;
use pkv_recipe::plan::{Machine, Plan};
use tch::Device;

use crate::args::{Cli, PlanMachine, RecipeArgs};
use crate::output;
use crate::session::{choose_device, load_recipe, manifest_path};

pub fn run(cli: &Cli, args: &RecipeArgs, resolved: bool, machine: PlanMachine) -> Result<()> {
    let recipe = load_recipe(&args.recipe, &args.overrides)?;
    if resolved {
        return output::print(&recipe.to_toml());
    }
    // A manifest that cannot be read is a mistake worth hearing about now.
    pkv_recipe::load_manifest(&manifest_path(&recipe))?;
    let cpu = || Machine::cpu(tch::get_num_threads().max(1) as usize);
    let machine = match machine {
        PlanMachine::H200 => Machine::h200(),
        PlanMachine::Cpu => cpu(),
        PlanMachine::Here if choose_device(cli)? == Device::Cpu => cpu(),
        PlanMachine::Here => Machine::h200(),
    };
    let plan = Plan::new(&recipe, machine, &pkv_eval::tasks::work(&recipe));
    output::print_either(cli.json, &plan, || plan.table())
}
