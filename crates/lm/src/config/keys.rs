//! The keys of a `config.json`, each read with its type checked; their meaning is left to `config` and the
//! families.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

/// The keys of a configuration, `null` taken for absent.
pub(crate) struct Keys<'a>(pub &'a Map<String, Value>);

impl Keys<'_> {
    pub fn present(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// A dimension: a whole number from 1 to 2^31.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.present(key).with_context(|| format!("`{key}` is missing"))?;
        value
            .as_u64()
            .filter(|n| (1..=1 << 31).contains(n))
            .map(|n| n as usize)
            .with_context(|| format!("`{key}` is {value}; expected a whole number above 0"))
    }

    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.present(key).is_some() { self.count(key) } else { Ok(default) }
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_f64().map(Some).with_context(|| format!("`{key}` is {value}; expected a number"))
    }

    /// A factor; 1 if the key is absent.
    pub fn multiplier(&self, key: &str) -> Result<f64> {
        let number = self.number(key)?.unwrap_or(1.0);
        ensure!(number > 0.0, "`{key}` is {number}; expected a number above 0");
        Ok(number)
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.present(key) else { return Ok(false) };
        value.as_bool().with_context(|| format!("`{key}` is {value}; expected true or false"))
    }
}
