//! Checks that a mapper was trained for this model pair, before anything is computed.

use anyhow::{Result, bail, ensure};
use pkv_checkpoint::ExportConfig;
use pkv_core::hinted;
use pkv_score::ModelFiles;

/// Refuse a mapper that was made for other models, another tokenizer, or other features. `proxy` is absent
/// where no feature comes from it.
///
/// # Errors
/// Shape or vocabulary of a model differ from the export's, the two models do not share a vocabulary,
/// or the export's sizes contradict its own pair and channels.
///
/// Returns what differs without forbidding anything, in words: weights of another revision, and a chat
/// template whose prefix the proxy's features were not trained after.
pub fn check_fit(
    config: &ExportConfig,
    target: &ModelFiles,
    proxy: Option<&ModelFiles>,
) -> Result<Vec<String>> {
    let pair: Vec<_> =
        std::iter::once((&config.target, target)).chain(config.read_proxy().zip(proxy)).collect();
    for (theirs, found) in &pair {
        let differs = theirs.difference(&found.config.shape, &found.tokenizer.vocab_hash());
        if let Some((what, expected, other)) = differs {
            bail!(hinted(
                format!(
                    "the mapper does not fit the {what} of the {} `{}`: it was made for {expected}, found {other}",
                    found.role.name(),
                    found.name
                ),
                "pass the models that the export names with `--target` and `--proxy`, or train a mapper for this pair",
            ));
        }
    }
    if let Some(proxy) = proxy {
        target.tokenizer.same_vocab(&proxy.tokenizer)?;
    }
    let (dims, layout) = (config.dims, config.extract.layout());
    for (what, found, expected) in [
        (
            "KV heads of its sources",
            dims.proxy_heads,
            layout.heads(&config.target.shape, config.read_proxy().map(|proxy| &proxy.shape)),
        ),
        ("channels", dims.channels, layout.channels().len()),
        ("global channels", dims.globals, layout.globals()),
        ("target KV heads", dims.outputs, config.target.shape.total_kv_heads()),
    ] {
        ensure!(
            found == expected,
            hinted(
                format!("the mapper has {found} {what}, its own configuration says {expected}"),
                "the export is damaged: write it again with `proxykv-train export`"
            )
        );
    }
    let mut differences = Vec::new();
    for (theirs, found) in pair {
        let (role, name) = (found.role.name(), &found.name);
        if theirs.revision != found.revision {
            differences.push(format!(
                "the {role} `{name}` is revision {}, the mapper was made for {}",
                found.revision, theirs.revision
            ));
        }
        if theirs.template_hash != found.tokenizer.template_hash() {
            differences.push(format!(
                "the chat template of the {role} `{name}` is not the one that the mapper was made for"
            ));
        }
    }
    Ok(differences)
}
