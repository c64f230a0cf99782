//! `[target]` and `[proxy]`: which model, and the shape it must have.

use pkv_core::{DtypeName, ModelShape};
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

fn main() -> String {
    "main".to_owned()
}
