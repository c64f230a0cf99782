//! KVzip's own score: the softmax weights as they are.

use pkv_recipe::LabelWeighting;

use super::Entry;

pub(super) const ENTRY: Entry = Entry { weighting: LabelWeighting::Plain, factors: None };
