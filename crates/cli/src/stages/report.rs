//! `report`: one self-contained HTML file about the run.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use serde_json::json;

use super::Outcome;
use crate::args::{Cli, RecipeArgs};
use crate::session::{Session, load_recipe};

/// A run that is not there has no report, and must not be made by asking for one.
///
/// # Errors
/// The recipe is invalid, or its run folder absent.
pub fn check_run(cli: &Cli, args: &RecipeArgs) -> Result<()> {
    let recipe = load_recipe(&args.recipe, &args.overrides())?;
    let run = cli.runs.join(&recipe.name);
    ensure!(
        run.join("run.json").is_file(),
        hinted(
            format!("cannot report on `{}`: there is no run `{}`", recipe.name, run.display()),
            "run folders are in `runs/`, or where `--runs` says; `proxykv-train run` makes one"
        )
    );
    Ok(())
}

pub fn run(s: &Session) -> Result<Outcome> {
    let written = pkv_report::write(s.run.root())?;
    Ok(Outcome::Done(json!({"file": written.html})))
}
