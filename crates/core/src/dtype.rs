//! Dtypes of models.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

crate::named! {
    /// Dtype of a model's weights and activations. Scores and features are f32 whatever it is.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    pub enum DtypeName {
        /// bf16 on CUDA, f32 on a CPU, where bf16 is slow.
        #[default]
        Auto = "auto", "bf16 on a GPU, f32 on a CPU";
        /// On any device.
        F32 = "f32", "32 bits on any device";
        /// On any device.
        Bf16 = "bf16", "16 bits on any device";
    }
}
