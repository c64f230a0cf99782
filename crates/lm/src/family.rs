//! The model families that are supported, each in a file of its own that reads its keys of `config.json`.
//!
//! `docs/contributing.md` has the steps to add a family.

mod granite;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use anyhow::Result;
use pkv_core::{Hinted, ModelShape, hinted};

use crate::architecture::Architecture;
use crate::config::keys::Keys;

/// All that are supported.
const FAMILIES: &[Family] = &[llama::FAMILY, qwen2::FAMILY, qwen3::FAMILY, granite::FAMILY, mistral::FAMILY];

/// Checkpoints of one `model_type`.
pub(crate) struct Family {
    pub model_type: &'static str,
    /// As users know it.
    label: &'static str,
    /// `max_position_embeddings` where the configuration leaves it out.
    pub max_positions: usize,
    /// `num_key_value_heads` where the configuration leaves it out; `None`, as `null`: one per query head.
    pub kv_heads: Option<usize>,
    /// `head_dim` where the configuration leaves it out; `None` divides `hidden_size` among the query heads.
    pub head_dim: Option<usize>,
    read: fn(&Keys, &ModelShape) -> Result<Architecture>,
}

impl Family {
    /// # Errors
    /// A key has a wrong type or value, or asks for what is not supported.
    pub fn architecture(&self, keys: &Keys, shape: &ModelShape) -> Result<Architecture> {
        (self.read)(keys, shape)
    }
}

/// The family of a `model_type`, if it is supported.
pub(crate) fn find(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}

/// The `model_type` of every supported family.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

pub(crate) fn unsupported(what: impl Into<String>) -> Hinted {
    let labels: Vec<&str> = FAMILIES.iter().map(|family| family.label).collect();
    let (last, others) = labels.split_last().expect("there are families");
    let hint = format!(
        "supported are dense {} and {last} checkpoints with full attention in every layer",
        others.join(", ")
    );
    hinted(format!("{} is not supported", what.into()), hint)
}

/// Qwen's keys for attention over the last tokens alone, in the layers from `max_window_layers` on. Where one
/// is absent, it has the value that transformers' configurations of Qwen2 and Qwen3 give it.
fn refuse_sliding_window(keys: &Keys, layers: usize) -> Result<()> {
    if keys.present("layer_types").is_some() || !keys.flag("use_sliding_window")? {
        return Ok(());
    }
    // `null` is no window; an absent key is one of 4,096 tokens.
    let windowed = keys.0.get("sliding_window").is_none_or(|window| !window.is_null());
    let first = match keys.number("max_window_layers")? {
        Some(first) => first.max(0.0) as usize,
        None => 28,
    };
    if windowed && first < layers {
        let text = format!("sliding-window attention in {} of {layers} layers", layers - first);
        return Err(unsupported(format!("{text} (`use_sliding_window`)")).into());
    }
    Ok(())
}
