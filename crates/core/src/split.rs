//! Train, validation and test splits.

use serde::{Deserialize, Serialize};

crate::named! {
    /// A document, and every example cut from it, belongs to one split.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Split {
        Train = "train";
        Validation = "validation";
        Test = "test";
    }
}
