//! What `eval` and `report` say to the user.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use pkv_eval::{RESULTS_FILE, Results};
use pkv_run::session::{Session, load_recipe};
use pkv_run::stages::eval::{EvalOptions, folder};
use pkv_shard::RunLayout;

use crate::args::{Cli, RecipeArgs};
use crate::output;

/// The results on stdout: tables, or the whole file with `--json`.
///
/// # Errors
/// There are no results.
pub fn print(cli: &Cli, s: &Session, options: &EvalOptions) -> Result<()> {
    let path = folder(s, options).join(RESULTS_FILE);
    let results = Results::read(&path)?;
    output::print_either(cli.json, &results, || pkv_eval::table::all_tables(&results))
}

/// A run that is not there has no report, and must not be made by asking for one.
///
/// # Errors
/// The recipe is invalid, or its run folder absent.
pub fn check_run(cli: &Cli, args: &RecipeArgs) -> Result<()> {
    let recipe = load_recipe(&args.recipe, &args.overrides())?;
    let run = RunLayout::new(cli.runs.join(&recipe.name));
    ensure!(
        run.run_json().is_file(),
        hinted(
            format!("cannot report on `{}`: there is no run `{}`", recipe.name, run.root().display()),
            "run folders are in `runs/`, or where `--runs` says; `proxykv-train run` makes one"
        )
    );
    Ok(())
}
