//! Checks that a mapper was trained for this model pair, before anything is computed.

use anyhow::{Result, ensure};
use pkv_checkpoint::{ExportConfig, ModelIdentity};
use pkv_core::{Hinted, ModelShape, hinted};
use pkv_text::TextTokenizer;

/// A model as it was found, weights unread.
pub struct Side<'a> {
    /// Hub name or folder.
    pub name: &'a str,
    /// Commit, or hash of a folder.
    pub revision: &'a str,
    pub shape: ModelShape,
    pub tokenizer: &'a TextTokenizer,
}

/// Refuse a mapper that was made for other models, another tokenizer, or other features. `proxy` is absent
/// where no feature comes from it.
///
/// # Errors
/// Shape or vocabulary of a model differ from the export's, the two models do not share a vocabulary,
/// or the export's sizes contradict its own pair and channels.
///
/// Returns what differs without forbidding anything, in words: weights of another revision, and a chat
/// template whose prefix the proxy's features were not trained after.
pub fn check_fit(config: &ExportConfig, target: &Side, proxy: Option<&Side>) -> Result<Vec<String>> {
    let proxys = config.read_proxy().zip(proxy).map(|(theirs, side)| ("proxy", theirs, side));
    let sides: Vec<_> = std::iter::once(("target", &config.target, target)).chain(proxys).collect();
    for (role, theirs, side) in &sides {
        check_side(role, theirs, side)?;
    }
    if let Some(proxy) = proxy {
        target.tokenizer.same_vocab(proxy.tokenizer)?;
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
    for (role, theirs, side) in sides {
        if theirs.revision != side.revision {
            differences.push(format!(
                "the {role} `{}` is revision {}, the mapper was made for {}",
                side.name, side.revision, theirs.revision
            ));
        }
        if theirs.template_hash != side.tokenizer.template_hash() {
            differences.push(format!(
                "the chat template of the {role} `{}` is not the one that the mapper was made for",
                side.name
            ));
        }
    }
    Ok(differences)
}

fn check_side(role: &str, theirs: &ModelIdentity, side: &Side) -> Result<()> {
    let model = format!("the shape of the {role} `{}`", side.name);
    ensure!(theirs.shape == side.shape, refusal(&model, &theirs.shape.to_string(), &side.shape.to_string()));
    ensure!(
        theirs.vocab_hash == side.tokenizer.vocab_hash(),
        refusal(
            &format!("the vocabulary of the {role} `{}`", side.name),
            &theirs.vocab_hash,
            &side.tokenizer.vocab_hash()
        )
    );
    Ok(())
}

fn refusal(what: &str, expected: &str, found: &str) -> Hinted {
    hinted(
        format!("the mapper does not fit {what}: it was made for {expected}, found {found}"),
        "pass the models that the export names with `--target` and `--proxy`, or train a mapper for this pair",
    )
}
