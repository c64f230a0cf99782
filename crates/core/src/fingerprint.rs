//! Fingerprint of a stage's output: the settings it was made with, as one JSON value and its hash.
//!
//! A stage's fingerprint holds every choice that changes its output, and the fingerprints of the
//! stages it reads. Outputs whose fingerprint differs from the recipe's are stale; `run` names the
//! keys that differ.

use crate::sha256_hex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Named choices, in the order they were added.
///
/// ```
/// use pkv_core::Fingerprint;
///
/// let made = Fingerprint::new().with("preset", "original").with("chunk_tokens", 2000);
/// let wanted = Fingerprint::new().with("preset", "original").with("chunk_tokens", 1000);
/// assert_ne!(made.hash(), wanted.hash());
/// assert_eq!(made.difference(&wanted), [("chunk_tokens".to_owned(), 2000.into(), 1000.into())]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(Map<String, Value>);

impl Fingerprint {
    pub fn new() -> Self {
        Self::default()
    }

    /// Add a choice under `key`.
    ///
    /// # Panics
    /// If `value` cannot be written as JSON; recipe sections and plain values can.
    pub fn with(mut self, key: &str, value: impl Serialize) -> Self {
        let value = serde_json::to_value(value).expect("plain values can be written as JSON");
        self.0.insert(key.to_owned(), value);
        self
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// SHA-256 of the canonical JSON, in hexadecimal.
    pub fn hash(&self) -> String {
        sha256_hex(serde_json::to_string(&self.0).expect("JSON values can be written").as_bytes())
    }

    /// Dotted keys whose values differ, with the value in `self` and the one in `other`.
    pub fn difference(&self, other: &Self) -> Vec<(String, Value, Value)> {
        let mut out = Vec::new();
        walk("", &Value::Object(self.0.clone()), &Value::Object(other.0.clone()), &mut out);
        out
    }
}

fn walk(path: &str, a: &Value, b: &Value, out: &mut Vec<(String, Value, Value)>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let extra = y.keys().filter(|k| !x.contains_key(*k));
            for key in x.keys().chain(extra) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let side = |m: &Map<String, Value>| m.get(key).cloned().unwrap_or(Value::Null);
                walk(&path, &side(x), &side(y), out);
            }
        }
        _ if a == b => {}
        _ => out.push((path.to_owned(), a.clone(), b.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_are_named_by_their_path() {
        let a = Fingerprint::new().with("label", json!({"chunk": 2000, "sink": 4})).with("seed", 1);
        let b = Fingerprint::new().with("label", json!({"chunk": 512, "sink": 4})).with("seed", 1);
        assert_eq!(a.difference(&b), [("label.chunk".to_owned(), json!(2000), json!(512))]);
        assert_ne!(a.hash(), b.hash());
        assert!(a.difference(&a.clone()).is_empty());
    }
}
