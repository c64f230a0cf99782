//! `[facts]`: where facts are planted. Which facts there are is the data manifest's `[facts]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How facts are put into examples and into the evaluation's contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FactsSection {
    /// Where in a text a fact may be put.
    pub place: FactPlace,
}

/// Where in a text a fact may be put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FactPlace {
    /// Between two sentences; in a text without the end of one between two lines, else between two words. A fact inside
    /// a word is a surprise that no document holds, and tells a scorer where to look.
    #[default]
    Sentence,
    /// Between any two tokens, inside words too: as it was before there was a choice.
    Anywhere,
}
