//! `fetch`: models and data into the Hugging Face cache, pinned by lock files.

use std::path::Path;

use anyhow::Result;
use pkv_core::Stop;
use pkv_hub::Hub;
use pkv_run::session::{benchmark_manifest_path, manifest};

use crate::args::{Cli, RecipeArgs};
use crate::output;
use crate::terminal::Bar;

pub fn run(cli: &Cli, args: &RecipeArgs, models_only: bool, stop: &Stop) -> Result<()> {
    let recipe = args.load()?;
    let hub = Hub::from_env();
    let bar = Bar::new();
    let root = recipe.root();
    let (target, proxy) = pkv_hub::fetch_recipe(&hub, &recipe, &[Path::new(""), &root], &bar, stop)?;
    if !models_only {
        let (manifest, path) = manifest(&recipe)?;
        if let Some(path) = path {
            pkv_hub::fetch_manifest(&hub, &manifest, &path, &bar, stop)?;
        }
        if let Some(path) = benchmark_manifest_path(&recipe) {
            pkv_hub::fetch_manifest(&hub, &pkv_recipe::load_manifest(&path)?, &path, &bar, stop)?;
        }
    }
    if cli.json {
        let folder = |r: &pkv_hub::Resolved| serde_json::json!({"folder": r.folder.display().to_string(), "revision": r.revision});
        let mut models = serde_json::json!({"target": folder(&target)});
        if let Some(proxy) = &proxy {
            models["proxy"] = folder(proxy);
        }
        return output::print(&format!("{models}\n"));
    }
    for (role, found) in [("target", Some(&target)), ("proxy", proxy.as_ref())] {
        if let Some(found) = found {
            let revision: String = found.revision.chars().take(18).collect();
            output::print(&format!("{role:<7} {} ({revision})\n", found.folder.display()))?;
        }
    }
    Ok(())
}
