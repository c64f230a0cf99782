//! A run folder as one self-contained HTML file, and the curve of answers as one SVG picture; several runs as
//! one page that compares them.
//!
//! The page needs no network and no other file: styles, charts and the one small script are
//! inside. Parts of a run that do not exist yet are left out, with a sentence that says which
//! command makes them. Measuring is left to `eval`; nothing is computed here beyond what a reader
//! could do with the numbers in the folder.

mod chart;
mod comparison;
mod cost;
mod example;
mod figures;
mod headline;
mod method;
mod metrics;
mod origin;
mod page;
mod reading;
mod run;
mod samples;
mod stages;
mod tables;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use comparison::write_comparison;

use run::RunData;

/// The files that [`write()`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// `report.html`.
    pub html: PathBuf,
    /// `answers.svg`; absent while no answers have been measured.
    pub svg: Option<PathBuf>,
}

/// Write `report.html` and, once there are answers, `answers.svg` into the run folder `run`.
///
/// # Errors
/// `run` is no folder or cannot be written to.
pub fn write(run: &Path) -> Result<Written> {
    let data = RunData::read(run)?;
    let html = run.join("report.html");
    write_whole(&html, &page::render(&data)?)?;
    let picture = run.join("answers.svg");
    let svg = match answers(&data) {
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
pub fn render(run: &Path) -> Result<String> {
    page::render(&RunData::read(run)?)
}

/// The curve of answers by retention ratio as an SVG file of its own; `None` while there is none.
///
/// # Errors
/// `run` is no folder.
pub fn answers_svg(run: &Path) -> Result<Option<String>> {
    Ok(answers(&RunData::read(run)?))
}

fn answers(data: &RunData) -> Option<String> {
    let facts = data.results.as_ref()?.facts.as_ref()?;
    let policy = facts.cells.first()?.policy;
    Some(chart::standalone(&figures::answers(facts, policy)?.svg()))
}

/// By way of a temporary file, so that a page that exists is whole.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let doing = || format!("cannot write `{}`", path.display());
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).with_context(doing)?;
    file.write_all(text.as_bytes()).with_context(doing)?;
    file.sync_all().with_context(doing)?;
    fs::rename(&temporary, path).with_context(doing)
}
