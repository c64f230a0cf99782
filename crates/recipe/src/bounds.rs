//! Upper bounds of what a recipe may ask for: no list, size or share that would take all memory or never end.
//!
//! Far beyond what is of use; what a value means, and its lower bound, is its section's.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use serde::Serialize;
use toml::Value;

/// Most entries of any list.
const ENTRIES: usize = 256;
/// Largest whole number that is no seed.
const SIZE: i64 = 1 << 31;

/// Keys with a bound of their own.
const OWN: [(&str, i64); 19] = [
    ("mapper.head_width", 1 << 13),
    ("mapper.width", 1 << 15),
    ("mapper.feed_forward", 1 << 6),
    ("mapper.dilations", 1 << 20),
    ("mapper.kernel", 1 << 10),
    ("mapper.attention_heads", 1 << 10),
    ("mapper.attention_window", 1 << 24),
    ("mapper.cross_width", 1 << 13),
    ("mapper.cross_heads", 1 << 10),
    ("loss.fine_pairs.pairs", 1 << 24),
    ("train.batch", 1 << 20),
    ("train.loader_threads", 1 << 10),
    ("train.target_pool.width", 1 << 16),
    ("eval.bootstrap", 1_000_000),
    ("eval.facts_per_context", 1 << 16),
    ("target.shape.layers", 1 << 12),
    ("target.shape.kv_heads", 1 << 12),
    ("proxy.shape.layers", 1 << 12),
    ("proxy.shape.kv_heads", 1 << 12),
];

/// Every list and number below `key` (empty: the recipe itself) is within its bound.
///
/// # Errors
/// One is not; the message names it.
pub(crate) fn check(key: &str, section: &impl Serialize) -> Result<()> {
    walk(key, &Value::try_from(section)?)
}

fn walk(key: &str, value: &Value) -> Result<()> {
    match value {
        Value::Table(table) => table.iter().try_for_each(|(name, value)| {
            walk(&if key.is_empty() { name.clone() } else { format!("{key}.{name}") }, value)
        }),
        Value::Array(list) => {
            ensure!(
                list.len() <= ENTRIES,
                hinted(
                    format!("`{key}` has {} entries; at most {ENTRIES} are possible", list.len()),
                    "name fewer"
                )
            );
            list.iter().try_for_each(|entry| walk(key, entry))
        }
        Value::Integer(n) if !key.ends_with("seed") => {
            let most = OWN.iter().find(|(own, _)| *own == key).map_or(SIZE, |own| own.1);
            ensure!(*n <= most, hinted(format!("`{key}` is {n}; at most {most} is possible"), "lower it"));
            Ok(())
        }
        Value::Float(x) => {
            ensure!(
                x.is_finite(),
                hinted(format!("`{key}` is {x}; it must be a finite number"), "write a number")
            );
            Ok(())
        }
        _ => Ok(()),
    }
}
