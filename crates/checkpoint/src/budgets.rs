//! `budgets.json` of an export: how many KV pairs each head keeps under the policy `pair-budget`.
//!
//! It lies beside the files that `config.json` names, so that readers from before there were budgets read the
//! export as before, and holds its own hash, which the mapper's weights are part of. What budgets mean is
//! `pkv_prune`'s.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{ModelShape, hinted, sha256_hex};
use pkv_prune::HeadBudgets;
use serde::{Deserialize, Serialize};

/// File of the head budgets, absent from older exports.
pub const BUDGETS_FILE: &str = "budgets.json";

/// Version of the file's format.
const VERSION: u32 = 1;

/// The file. Ratios and shares are parts per million.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema_version: u32,
    /// Meaning of the numbers, for readers.
    about: String,
    /// Training contexts that shares are the mean of.
    contexts: u64,
    layers: usize,
    kv_heads: usize,
    /// Ascending; the last one is 1,000,000.
    ratios: Vec<u32>,
    /// By ratio, layer and KV head; the mean of a ratio's is the ratio.
    shares: Vec<Vec<Vec<u32>>>,
    /// Of the `model.safetensors` that they belong to.
    model_sha256: String,
    /// Of `model_sha256`, then lines of numbers, separated by blanks: `contexts layers kv_heads`, the ratios,
    /// and the shares of each ratio. Every line ends in a line feed.
    sha256: String,
}

const ABOUT: &str = "Share of its positions that each KV head keeps under the policy pair-budget, in parts per million, by \
                     retention ratio, layer and KV head; between ratios interpolate linearly, below the first one towards 0.";

/// The file's text.
pub fn render(budgets: &HeadBudgets, target: &ModelShape, model_sha256: &str) -> Result<String> {
    ensure!(
        budgets.heads() == target.total_kv_heads(),
        "head budgets are for {} KV heads, the target has {}",
        budgets.heads(),
        target.total_kv_heads()
    );
    let by_layer = |row: &Vec<u32>| row.chunks(target.kv_heads).map(<[u32]>::to_vec).collect();
    let mut file = File {
        schema_version: VERSION,
        about: ABOUT.to_owned(),
        contexts: budgets.contexts(),
        layers: target.layers,
        kv_heads: target.kv_heads,
        ratios: budgets.ratios().to_vec(),
        shares: budgets.shares().iter().map(by_layer).collect(),
        model_sha256: model_sha256.to_owned(),
        sha256: String::new(),
    };
    file.sha256 = file.hash();
    Ok(serde_json::to_string(&file).context("cannot write head budgets as JSON")? + "\n")
}

/// The budgets in the export's folder; `None` in one from before there were any.
///
/// # Errors
/// They are damaged, or of another mapper or target.
pub fn read(folder: &Path, target: &ModelShape, model_sha256: Option<&str>) -> Result<Option<HeadBudgets>> {
    let path = folder.join(BUDGETS_FILE);
    if pkv_core::look_for(&path)?.is_none() {
        return Ok(None);
    }
    let read = || -> Result<HeadBudgets> {
        let value: serde_json::Value = serde_json::from_str(&pkv_core::read_small_text(&path)?)?;
        ensure!(
            value["schema_version"].as_u64() == Some(VERSION.into()),
            "expected version {VERSION}, found {}",
            value["schema_version"]
        );
        let file: File = serde_json::from_value(value)?;
        let found = file.hash();
        ensure!(found == file.sha256, "it is damaged: expected SHA-256 {}, found {found}", file.sha256);
        ensure!(
            model_sha256 == Some(&file.model_sha256),
            "it belongs to other weights: expected SHA-256 {} of `model.safetensors`, found {}",
            file.model_sha256,
            model_sha256.unwrap_or("none")
        );
        ensure!(
            (file.layers, file.kv_heads) == (target.layers, target.kv_heads)
                && file
                    .shares
                    .iter()
                    .all(|s| s.len() == file.layers && s.iter().all(|l| l.len() == file.kv_heads)),
            "expected shares of {} layers x {} KV heads, found {} x {}",
            target.layers,
            target.kv_heads,
            file.layers,
            file.kv_heads
        );
        let shares = file.shares.into_iter().map(|by_layer| by_layer.concat()).collect();
        HeadBudgets::new(file.contexts, file.ratios, shares)
    };
    read().map(Some).with_context(|| {
        hinted(
            format!("cannot read head budgets `{}`", path.display()),
            "write the export again: `proxykv-train export`",
        )
    })
}

impl File {
    fn hash(&self) -> String {
        let mut text =
            format!("{}\n{} {} {}\n", self.model_sha256, self.contexts, self.layers, self.kv_heads);
        let mut line = |numbers: &mut dyn Iterator<Item = &u32>| {
            let numbers: Vec<String> = numbers.map(u32::to_string).collect();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", numbers.join(" "));
        };
        line(&mut self.ratios.iter());
        self.shares.iter().for_each(|row| line(&mut row.iter().flatten()));
        sha256_hex(text.as_bytes())
    }
}
