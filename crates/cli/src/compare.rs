//! `compare`: several evaluated runs side by side, on the terminal and as one HTML page.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_results::compare::{Run, compare, text};

use crate::args::{Cli, CompareArgs};
use crate::output;

pub fn run(cli: &Cli, args: &CompareArgs) -> Result<()> {
    let folders: Vec<PathBuf> = args.folders.iter().map(|r| run_folder(cli, r)).collect();
    for (i, folder) in folders.iter().enumerate() {
        ensure!(
            !folders[..i].contains(folder),
            hinted(format!("`{}` is named twice", folder.display()), "name each run once")
        );
    }
    let comparison = compare(&Run::read_all(&folders)?)?;
    if let Some(path) = &args.out {
        pkv_report::write_comparison(&comparison, &pkv_eval::methods::infos(), path).with_context(|| {
            hinted(
                format!("cannot write the comparison to `{}`", path.display()),
                "name a file in a folder that exists, such as `--out comparison.html`",
            )
        })?;
        tracing::info!("comparison: {}", path.display());
    }
    // Last, so that the page is there whatever reads the table.
    output::print_either(cli.json, &comparison, || text(&comparison))
}

/// A run folder as it was named, or of that name among the run folders.
fn run_folder(cli: &Cli, named: &std::path::Path) -> PathBuf {
    let known = cli.runs.join(named);
    if !named.exists() && named.components().count() == 1 && known.is_dir() {
        known
    } else {
        named.to_path_buf()
    }
}
