//! Dtypes of models.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

impl DtypeName {
    pub const ALL: [Self; 3] = [Self::Auto, Self::F32, Self::Bf16];

    /// As recipes spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// In a few words, for help.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Auto => "bf16 on a GPU, f32 on a CPU",
            Self::F32 => "32 bits on any device",
            Self::Bf16 => "16 bits on any device",
        }
    }
}
