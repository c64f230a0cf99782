//! The model families that are supported, each in a file of its own that reads its keys of `config.json`.
//!
//! `docs/contributing.md` has the steps to add a family.

mod granite;
mod llama;
mod qwen2;
mod qwen3;

use anyhow::Result;
use pkv_core::{Hinted, ModelShape, hinted};
use serde_json::Value;

use crate::architecture::Architecture;
use crate::config::keys::Keys;

/// All that are supported.
const FAMILIES: &[Family] = &[llama::FAMILY, qwen2::FAMILY, qwen3::FAMILY, granite::FAMILY];

/// Checkpoints of one `model_type`.
pub(crate) struct Family {
    pub model_type: &'static str,
    /// As users know it.
    label: &'static str,
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

/// Qwen's key for attention over the last tokens alone, in the layers from `max_window_layers` on.
fn refuse_sliding_window(keys: &Keys, layers: usize) -> Result<()> {
    let by_layer = keys.present("layer_types").and_then(Value::as_array);
    if by_layer.is_none() && keys.flag("use_sliding_window")? {
        let first = keys.count_or("max_window_layers", layers)?;
        if keys.present("sliding_window").is_some() && first < layers {
            let text = format!("sliding-window attention in {} of {layers} layers", layers - first);
            return Err(unsupported(format!("{text} (`use_sliding_window`)")).into());
        }
    }
    Ok(())
}
