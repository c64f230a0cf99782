//! `[target]` and `[proxy]`: which model, and the shape it must have.

use pkv_core::ModelShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One of the two models of the pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Hub name (`owner/name`) or local folder with config.json, safetensors and tokenizer.json.
    pub model: String,
    /// Branch, tag or commit on the hub; ignored for a local folder. `fetch` pins it to a commit.
    #[serde(default = "main")]
    pub revision: String,
    /// Dtype of weights and activations.
    #[serde(default)]
    pub dtype: DtypeName,
    /// Expected dimensions; compared with config.json when the model is opened.
    pub shape: ModelShape,
}

/// Dtype of a model's weights and activations. Scores and features are f32 whatever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DtypeName {
    /// bf16 on CUDA, f32 on a CPU, where bf16 is slow.
    #[default]
    Auto,
    /// On any device.
    F32,
    /// On any device.
    Bf16,
}

fn main() -> String {
    "main".to_owned()
}
