//! A method's name: how recipes and result files spell a way to score KV pairs.
//!
//! Any text is a name here. Which methods there are, what each does and what it needs is `pkv_eval::methods`'
//! business, which refuses names that it does not know.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Lower-case words with dashes, such as `head-prior`. As cheap to copy as a reference.
#[derive(Clone, Copy, PartialEq, Eq, Hash, JsonSchema)]
#[schemars(transparent)]
pub struct MethodName(&'static str);

impl MethodName {
    /// The trained mapper.
    pub const MAPPER: Self = Self::of("mapper");
    /// KVzip's own scores: the oracle.
    pub const KVZIP: Self = Self::of("kvzip");
    /// Ridge regression from all features.
    pub const LINEAR: Self = Self::of("linear");
    /// Mean training score of each KV head, positions at random: the floor.
    pub const HEAD_PRIOR: Self = Self::of("head-prior");
    pub const SNAPKV: Self = Self::of("snapkv");
    /// Positions at random.
    pub const RANDOM: Self = Self::of("random");

    /// A name that the program itself spells.
    ///
    /// # Panics
    /// It is not spelled as names are; in a constant, the build fails.
    pub const fn of(name: &'static str) -> Self {
        assert!(is_spelled(name.as_bytes()), "a method's name has lower-case words with dashes");
        Self(name)
    }

    /// A name that was read. Names are few and used to the end: each is stored once and never freed.
    pub fn new(name: &str) -> Self {
        static SEEN: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = seen.get(name) {
            return Self(known);
        }
        let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
        seen.insert(name);
        Self(name)
    }

    /// As recipes, tables and files have it.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

/// Lower-case letters and digits in words with single dashes between them.
const fn is_spelled(name: &[u8]) -> bool {
    let mut at = 0;
    while at < name.len() {
        let inside = at > 0 && at + 1 < name.len() && name[at - 1] != b'-';
        if !(name[at].is_ascii_lowercase() || name[at].is_ascii_digit() || (name[at] == b'-' && inside)) {
            return false;
        }
        at += 1;
    }
    !name.is_empty()
}

impl fmt::Debug for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Serialize for MethodName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0)
    }
}

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self::new(&String::deserialize(from)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_was_read_is_the_name_that_the_program_spells() {
        let read: MethodName = serde_json::from_str(r#""head-prior""#).unwrap();
        assert_eq!(read, MethodName::HEAD_PRIOR);
        assert_eq!(serde_json::to_string(&read).unwrap(), r#""head-prior""#);
        let (one, two) = (MethodName::new("made-up-2"), MethodName::new("made-up-2"));
        assert!(std::ptr::eq(one.name(), two.name()), "stored once");
    }

    #[test]
    fn the_program_spells_lower_case_words_with_dashes() {
        for wrong in ["", "-", "SnapKV", "head prior", "-a", "a-", "a--b", "a_b", "ä"] {
            assert!(!is_spelled(wrong.as_bytes()), "{wrong}");
        }
        assert!(is_spelled(b"2a-b3"));
        assert!(serde_json::from_str::<MethodName>("3").is_err());
    }
}
