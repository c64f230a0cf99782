//! `[facts]`: where facts are planted. Which facts there are is the data manifest's `[facts]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How facts are planted in examples and in the evaluation's contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FactsSection {
    /// Where in a text a fact may be planted.
    pub place: FactPlace,
}

/// Where in a text a fact may be put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FactPlace {
    /// Between two sentences; in a text without the end of one between two lines, else between two words. A
    /// fact inside a word is unlike any document, and shows a scorer where to look.
    #[default]
    Sentence,
    /// Between any two tokens, also inside words; the behaviour before this key existed.
    Anywhere,
}
