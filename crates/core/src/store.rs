//! Storage dtype of a shard's numbers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Dtype of scores and features in a shard.
///
/// Never bf16: scores near 1 would tie. f16 keeps 99.4% of the f32 kept set at 1% kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreDtype {
    /// Half the bytes.
    #[default]
    F16,
    /// Exactly what was computed.
    F32,
}

impl StoreDtype {
    /// Bytes per number, before compression.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}
