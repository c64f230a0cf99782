//! What `run`, `eval` and `report` say to the user.

use anyhow::{Result, bail};
use pkv_core::hinted;
use pkv_eval::methods;
use pkv_recipe::plan::human_secs;
use pkv_results::brief::Brief;
use pkv_results::{RESULTS_FILE, Results};
use pkv_run::session::Session;
use pkv_run::stages::eval::{EvalOptions, folder};
use pkv_shard::{RunJson, RunLayout, Stage};
use serde_json::json;

use crate::args::{Cli, RecipeArgs};
use crate::{output, terminal};

/// What `run` and `eval` end with: one table, what it says, where the rest is, and what to do next; the whole
/// file with `--json`.
///
/// # Errors
/// There are no results.
pub fn print(
    cli: &Cli,
    s: &Session,
    options: &EvalOptions,
    args: &RecipeArgs,
    stages: &[Stage],
) -> Result<()> {
    let folder = folder(s, options);
    let results = Results::read(&folder.join(RESULTS_FILE))?;
    if cli.json {
        return output::print_json(&results);
    }
    let brief = Brief {
        results: &results,
        tasks: &s.recipe.eval.tasks,
        policies: &s.recipe.eval.answer_policies,
        is_oracle: |method| methods::find(method).is_some_and(methods::Method::is_oracle),
        bold: terminal::has_color(&std::io::stdout()),
    };
    let ran = RunJson::read(&s.run)?.unwrap_or_default().stages;
    let secs: f64 = stages.iter().filter_map(|stage| ran.get(stage.name())).map(|stage| stage.secs).sum();
    let (run, eval) = (s.run.root().display(), folder.display());
    let (what, report, next) = match stages {
        [Stage::Eval] => ("`eval`", String::new(), format!("report {}", args.said())),
        _ => (
            "All stages",
            format!("report      {run}/report.html\n"),
            format!("infer --mapper {run} --context FILE --retain 0.2 \\\n            --question \"...\""),
        ),
    };
    let out = format!(
        "{}{what} took {}.\n\n{report}numbers     {eval}/{RESULTS_FILE}\n\
         all tables  proxykv-train inspect {eval}\nnext        proxykv-train {next}\n",
        brief.text().unwrap_or_default(),
        human_secs(secs)
    );
    output::print_styled(&out)
}

/// A stage's record and the files and folders that it wrote, as JSON on stdout.
///
/// # Errors
/// stdout takes no more.
pub fn print_stage(s: &Session, stage: Stage) -> Result<()> {
    let record = s.run.stage(stage.name());
    let shown = |path: &std::path::Path| path.display().to_string();
    let written = stage.writes(&s.run).into_iter().filter(|path| path.exists());
    let written: Vec<String> = written.map(|path| shown(&path)).collect();
    output::print_json(
        &json!({"stage": stage.name(), "run": shown(s.run.root()), "wrote": written, "record": record}),
    )
}

/// A run that is not there has no report, and must not be made by asking for one.
///
/// # Errors
/// The recipe is invalid, or its run folder absent.
pub fn check_run(cli: &Cli, args: &RecipeArgs) -> Result<()> {
    let recipe = args.load()?;
    let run = RunLayout::new(cli.runs.join(&recipe.name));
    let what = match RunJson::read(&run)? {
        None => format!("there is no run `{}`", run.root().display()),
        Some(record) if record.stages.is_empty() => format!("no stage of `{}` has run", run.root().display()),
        Some(_) => return Ok(()),
    };
    bail!(hinted(
        format!("cannot report on `{}`: {what}", recipe.name),
        "run folders are in `runs/`, or where `--runs` says; `proxykv-train run` makes one"
    ))
}
