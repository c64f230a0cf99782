//! What a reader of results must know of a method that scores KV pairs.

use pkv_recipe::MethodName;

/// A method as tables and charts show it; `eval` has the list of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodInfo {
    pub name: MethodName,
    /// Its meaning, in a sentence without its name.
    pub meaning: &'static str,
    pub needs: Needs,
}

impl MethodInfo {
    /// Does it look at KVzip's own scores? They cost what a mapper avoids: such a method is compared with,
    /// not competed with.
    pub const fn is_oracle(&self) -> bool {
        self.needs.labels
    }
}

/// Inputs of a method that must be computed for each context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// KVzip's scores.
    pub labels: bool,
    /// The features that the recipe names.
    pub features: bool,
    /// The target's prefill: its cache, and what is seen on the way.
    pub prefill: bool,
}

impl Needs {
    pub const NOTHING: Self = Self { labels: false, features: false, prefill: false };
    pub const LABELS: Self = Self { labels: true, ..Self::NOTHING };
    pub const FEATURES: Self = Self { features: true, ..Self::NOTHING };
    pub const PREFILL: Self = Self { prefill: true, ..Self::NOTHING };

    pub const fn and(self, other: Self) -> Self {
        Self {
            labels: self.labels || other.labels,
            features: self.features || other.features,
            prefill: self.prefill || other.prefill,
        }
    }
}
