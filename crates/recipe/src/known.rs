//! Unknown names in a recipe, and the nearest known one as a hint.

use anyhow::{Result, ensure};
use pkv_core::hinted;

/// Refuse `name`, which the recipe's `key` has, if it is none of `known`; `kind` is what they are.
///
/// # Errors
/// It is none of them.
pub fn check_known<'a>(
    key: &str,
    kind: &str,
    name: &str,
    known: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let known: Vec<&str> = known.collect();
    let plain = name.to_lowercase().replace('_', "-");
    let nearest = known.iter().map(|k| (strsim::levenshtein(k, &plain), k)).min();
    let meant = nearest.filter(|(off, known)| 3 * off <= known.len());
    let meant = meant.map(|(_, known)| format!("did you mean `{known}`? ")).unwrap_or_default();
    ensure!(
        known.contains(&name),
        hinted(
            format!("`{key}` names `{name}`, which is no {kind}"),
            format!("{meant}{kind}s are {}", known.join(", "))
        )
    );
    Ok(())
}
