//! Files with weights: checkpoints, exports, language models.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context as _, Result};
use pkv_checkpoint::{CheckpointInfo, CheckpointStore, Export, ExportConfig};
use pkv_core::{RetentionRatio, hinted};
use pkv_lm::LmConfig;
use pkv_prune::HeadBudgets;
use pkv_recipe::plan::{human_bytes, human_count};
use pkv_text::TextTokenizer;

use super::files::named_dtype;
use super::{Lines, choices, short};

pub fn checkpoint(dir: &Path) -> Result<String> {
    let context = || hinted(format!("checkpoint `{}` is damaged", dir.display()), PASSED_OVER);
    let info = CheckpointInfo::read(dir).with_context(context)?;
    info.check_files(dir).with_context(context)?;
    let mut out = Lines::new(format!("checkpoint `{}`", dir.display()));
    out.add("schema", info.schema_version)
        .add("step", info.step)
        .add("validation", validation(info.validation))
        .add(
            "tensors",
            format!(
                "{} of the network, {} of the loss, {} fixed",
                info.network.len(),
                info.loss.len(),
                info.buffers.len()
            ),
        )
        .add("average", if info.ema { "kept" } else { "none" });
    choices(&mut out, &info.fingerprint);
    out.block("files");
    for (name, file) in &info.files {
        out.add(name, format!("{}, sha256 {}, matches", human_bytes(file.bytes), short(&file.sha256)));
    }
    Ok(out.text)
}

/// What reads a damaged checkpoint passes over it.
const PASSED_OVER: &str =
    "`train` and `export` pass over it and take an older one; `train` makes its steps again";

fn validation(value: Option<f64>) -> String {
    value.map_or_else(|| "not measured at this step".to_owned(), |v| format!("{v:.4}"))
}

pub fn checkpoints(dir: &Path) -> Result<String> {
    let store = CheckpointStore::read_only(dir)?;
    let mut out = Lines::new(format!("checkpoints in `{}`", dir.display()));
    for (folder, info) in store.folders_and_infos()? {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let whole = info.and_then(|info| info.check_files(&folder).map(|()| info));
        out.add(
            &name,
            match whole {
                Ok(info) => format!("validation {}", validation(info.validation)),
                Err(e) => format!("{e:#}"),
            },
        );
    }
    if let Some((step, value)) = store.best_validation()? {
        out.add("best", format!("step {step}, {value:.4}"));
    }
    Ok(out.text)
}

pub fn export(dir: &Path) -> Result<String> {
    let export = Export::read(dir)?;
    let config: &ExportConfig = export.config();
    let mut out = Lines::new(format!("export `{}` of `{}`", dir.display(), config.name));
    out.add("schema", config.schema_version).add("written by", &config.written_by);
    let proxy = config.read_proxy().map(|proxy| ("proxy", proxy));
    for (role, model) in [("target", &config.target)].into_iter().chain(proxy) {
        out.add(
            role,
            format!("{} @ {}, {}, {}", model.model, model.revision, model.shape, named_dtype(&model.dtype)),
        );
    }
    let d = config.dims;
    let parameters: usize = export.tensors().iter().map(|(_, t)| t.numel()).sum();
    out.add(
        "mapper",
        format!(
            "{} heads x {} channels + {} globals to {} target heads",
            d.proxy_heads, d.channels, d.globals, d.outputs
        ),
    )
    .add("numbers", format!("{} in {} tensors", human_count(parameters as u64), export.tensors().len()))
    .add("step", config.step)
    .add("validation", validation(config.validation))
    .add("fingerprint", config.fingerprint.hash());
    out.block("tensors");
    for (name, tensor) in export.tensors() {
        let _ = writeln!(out.text, "  {name:<44} {:?}", tensor.size());
    }
    out.block("files");
    for (name, file) in &config.files {
        out.add(name, format!("{}, sha256 {}, matches", human_bytes(file.bytes), short(&file.sha256)));
    }
    if let Some(budgets) = export.budgets() {
        head_budgets(&mut out, budgets, config.target.shape.kv_heads)?;
    }
    Ok(out.text)
}

/// What each head keeps of a long context under `pair-budget`: what a server has to allocate, beside the chat
/// template's prefix and the tokens that follow.
fn head_budgets(out: &mut Lines, budgets: &HeadBudgets, kv_heads: usize) -> Result<()> {
    const POSITIONS: usize = 32_768;
    for ratio in [0.2, 0.1] {
        let kept = RetentionRatio::new(ratio)?.count(budgets.heads() * POSITIONS);
        out.block(&format!(
            "head budgets of {} training contexts, policy pair-budget: positions kept of {POSITIONS} at {}%, by KV head",
            budgets.contexts(),
            100.0 * ratio
        ));
        for (layer, counts) in budgets.counts(kept, POSITIONS).chunks(kv_heads).enumerate() {
            let cells: String = counts.iter().map(|n| format!("{n:>7}")).collect();
            out.add(&format!("layer {layer}"), cells);
        }
    }
    Ok(())
}

pub fn model(dir: &Path) -> Result<String> {
    let config = LmConfig::from_folder(dir)?;
    let mut out = Lines::new(format!("language model `{}`", dir.display()));
    let s = config.shape;
    out.add("shape", s)
        .add(
            "hidden",
            format!("{}, feed-forward {}, {} query heads", s.hidden, s.intermediate, s.query_heads),
        )
        .add("vocabulary", s.vocab);
    if let Ok(tokenizer) = TextTokenizer::open(dir) {
        out.add(
            "tokenizer",
            format!("{} tokens, vocabulary {}", tokenizer.vocab_size(), short(&tokenizer.vocab_hash())),
        )
        .add(
            "template",
            format!("prefix of {} tokens, switch of {}", tokenizer.prefix().len(), tokenizer.switch().len()),
        );
    }
    Ok(out.text)
}
