//! The YAML front matter of a model card: what model hubs index, in the words that they accept.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};

use crate::export::{ExportConfig, ModelIdentity};

/// Licences that the Hugging Face hub knows by name, `unknown` included (the hub's documentation,
/// "Licenses"); any other is `other` with a name of its own.
const KNOWN: &str = "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 \
    artistic-2.0 bsl-1.0 bsd-2-clause bsd-3-clause cc0-1.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 \
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 \
    epl-2.0 eupl-1.2 agpl-3.0 gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 isc mpl-2.0 odc-by unlicense zlib \
    llama3 llama3.1 llama3.2 llama3.3 gemma unknown";

/// Keys without which a hub shows no licence and no family.
const NEEDED: [&str; 3] = ["license", "library_name", "tags"];

/// Write the block with its fences.
pub fn write(out: &mut String, c: &ExportConfig, licence: &str) -> std::fmt::Result {
    writeln!(out, "---")?;
    let spelt = licence.trim().to_lowercase();
    match spelt.as_str() {
        "" => writeln!(out, "license: unknown")?,
        known if KNOWN.split(' ').any(|name| name == known) => writeln!(out, "license: {known}")?,
        _ => writeln!(out, "license: other\nlicense_name: {}", slug(&spelt))?,
    }
    writeln!(out, "library_name: proxykv-train")?;
    // A hub refuses names that are none of its models; a folder's name is none.
    let models = std::iter::once(&c.target).chain(&c.proxy);
    let models: Vec<&ModelIdentity> = models.filter(|m| is_of_hub(m)).collect();
    if !models.is_empty() {
        writeln!(out, "base_model:")?;
        models.iter().try_for_each(|m| writeln!(out, "- {}", quoted(&m.model)))?;
    }
    writeln!(out, "tags:\n- kv-cache\n- kvzip\n- proxykv\n---\n")
}

/// Whether a card begins with a front matter that a hub can index.
///
/// # Errors
/// It has none, or a key is missing.
pub fn check(card: &str) -> Result<()> {
    let text = card.strip_prefix("---\n").context("it does not begin with a front matter (`---`)")?;
    let (front, _) = text.split_once("\n---").context("its front matter does not end (`---`)")?;
    for key in NEEDED {
        let line = front.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        ensure!(line.is_some(), "its front matter has no `{key}`");
    }
    Ok(())
}

fn is_of_hub(m: &ModelIdentity) -> bool {
    !m.revision.starts_with("local:")
}

/// Small letters, digits and single dashes.
fn slug(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let text: String = text.chars().map(plain).collect();
    text.split('-').filter(|p| !p.is_empty()).collect::<Vec<_>>().join("-")
}

/// A YAML string that needs no thought about its characters.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_licences_are_slugs() {
        assert_eq!(slug("acme's own licence (v1.2)"), "acme-s-own-licence-v1.2");
    }

    #[test]
    fn a_card_without_its_front_matter_is_told() {
        check("---\nlicense: mit\nlibrary_name: x\ntags:\n- a\n---\n# T\n").unwrap();
        for (card, why) in [
            ("# T\n", "does not begin"),
            ("---\nlicense: mit\n", "does not end"),
            ("---\nlicense_name: x\nlibrary_name: x\ntags: []\n---\n", "no `license`"),
            ("---\nlicense: mit\nlibrary_name: x\n---\ntags:\n", "no `tags`"),
        ] {
            assert!(check(card).unwrap_err().to_string().contains(why), "{card}");
        }
    }
}
