//! `man`: manual pages, a file for the command and one for each subcommand.

use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;

use crate::{args, output};

/// # Errors
/// A file cannot be written.
pub fn run(folder: &Path) -> Result<()> {
    let cannot = || {
        hinted(
            format!("cannot write manual pages to `{}`", folder.display()),
            "name a folder that you may write, on a disk with room",
        )
    };
    std::fs::create_dir_all(folder).with_context(cannot)?;
    clap_mangen::generate_to(args::command(), folder).with_context(cannot)?;
    let mut pages = std::fs::read_dir(folder).with_context(cannot)?.collect::<Result<Vec<_>, _>>()?;
    pages.retain(|page| page.file_name().to_string_lossy().starts_with("proxykv-train"));
    let mut paths: Vec<_> = pages.iter().map(|page| format!("{}\n", page.path().display())).collect();
    paths.sort();
    output::print(&paths.concat())
}
