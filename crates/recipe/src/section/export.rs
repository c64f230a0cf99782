//! `[export]`: what the model card of an exported mapper says about licences. No number depends on it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whose terms apply. Empty: not stated, which the card says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExportSection {
    /// Of the mapper's weights, as the Hugging Face hub spells licences (`apache-2.0`); any other name is
    /// passed on as one of your own.
    pub licence: String,
    /// Of the target.
    pub target_licence: String,
    /// Of the proxy.
    pub proxy_licence: String,
}
