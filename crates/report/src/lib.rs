//! A run folder as one self-contained HTML file, and the curve of answers as one SVG picture; several runs as
//! one page that compares them.
//!
//! The page needs no network and no other file: styles, charts and the one small script are
//! inside. Parts of a run that do not exist yet are left out, with a sentence that says which
//! command makes them. Measuring is left to `eval`; nothing is computed here beyond what a reader
//! could do with the numbers in the folder. The caller says which methods there are.

mod cache;
mod chart;
mod comparison;
mod cost;
mod example;
mod figures;
mod headline;
mod method;
#[cfg(test)]
#[path = "../tests/run/methods.rs"]
mod methods_of_tests;
mod metrics;
mod origin;
mod page;
mod reading;
mod run;
mod samples;
mod stages;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_files::{WriteBudget, write_file};
use pkv_results::MethodInfo;

pub use comparison::write_comparison;

use method::Methods;
use run::RunData;

/// The files that [`write()`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// `report.html`.
    pub html: PathBuf,
    /// `answers.svg`; absent while no answers have been measured.
    pub svg: Option<PathBuf>,
}

/// Write `report.html` and, once there are answers, `answers.svg` into the run folder `run`; `methods` are
/// those that are known, in the order of tables.
///
/// # Errors
/// `run` is no folder or cannot be written to.
pub fn write(run: &Path, methods: &[MethodInfo]) -> Result<Written> {
    let data = RunData::read(run)?;
    for problem in &data.problems {
        tracing::warn!("the report lacks a part: {problem}");
    }
    let html = run.join("report.html");
    write_whole(&html, &page::render(Methods(methods), &data)?)?;
    let picture = run.join("answers.svg");
    let svg = match answers(Methods(methods), &data) {
        Some(text) => {
            write_whole(&picture, &text)?;
            Some(picture)
        }
        // One of earlier results would say what the page does not.
        None => {
            if picture.exists() {
                fs::remove_file(&picture)
                    .with_context(|| format!("cannot remove `{}`", picture.display()))?;
            }
            None
        }
    };
    Ok(Written { html, svg })
}

/// The page of the run folder `run`.
///
/// # Errors
/// `run` is no folder.
pub fn render(run: &Path, methods: &[MethodInfo]) -> Result<String> {
    page::render(Methods(methods), &RunData::read(run)?)
}

/// The curve of answers by retention ratio as an SVG file of its own; `None` while there is none.
///
/// # Errors
/// `run` is no folder.
pub fn answers_svg(run: &Path, methods: &[MethodInfo]) -> Result<Option<String>> {
    Ok(answers(Methods(methods), &RunData::read(run)?))
}

fn answers(methods: Methods, data: &RunData) -> Option<String> {
    let facts = data.results.as_ref()?.facts.as_ref()?;
    let policy = facts.cells.first()?.policy;
    Some(chart::standalone(&figures::answers(methods, facts, policy)?.svg()))
}

fn write_whole(path: &Path, text: &str) -> Result<()> {
    write_file(path, text.as_bytes(), &WriteBudget::from_env()).map(drop)
}
