//! The retention ratio: the share of KV pairs that is kept.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Retention ratio: kept / all evictable KV pairs, in (0, 1].
///
/// Never the share removed; "compression ratio" means one thing in KVzip and the other in kvpress.
///
/// ```
/// use pkv_core::RetentionRatio;
///
/// let kept = RetentionRatio::new(0.05)?;
/// assert_eq!(kept.count(1000), 50);
/// let percent = RetentionRatio::new(5.0).unwrap_err();
/// assert_eq!(percent.hint(), "to keep 5% of the KV pairs, write `0.05`");
/// # Ok::<(), pkv_core::RatioError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct RetentionRatio(f64);

/// A number that is no retention ratio.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a retention ratio is the kept share of KV pairs, 0 < ratio <= 1, found {0}")]
pub struct RatioError(f64);

impl RetentionRatio {
    /// # Errors
    /// Outside (0, 1], or not a number.
    pub fn new(ratio: f64) -> Result<Self, RatioError> {
        if ratio > 0.0 && ratio <= 1.0 { Ok(Self(ratio)) } else { Err(RatioError(ratio)) }
    }

    pub const fn get(self) -> f64 {
        self.0
    }

    /// Number of the `n` KV pairs that are kept: rounded to the nearest, at least one of a non-empty cache.
    pub fn count(self, n: usize) -> usize {
        let kept = (n as f64 * self.0).round() as usize;
        kept.clamp(usize::from(n > 0), n)
    }
}

impl fmt::Display for RetentionRatio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<f64> for RetentionRatio {
    type Error = RatioError;
    fn try_from(ratio: f64) -> Result<Self, RatioError> {
        Self::new(ratio)
    }
}

impl From<RetentionRatio> for f64 {
    fn from(ratio: RetentionRatio) -> f64 {
        ratio.0
    }
}

impl RatioError {
    /// The repair, where the number looks like a percentage.
    pub fn hint(self) -> String {
        if self.0 > 1.0 && self.0 <= 100.0 {
            format!("to keep {}% of the KV pairs, write `{}`", self.0, self.0 / 100.0)
        } else {
            "a retention ratio of 0.1 keeps one KV pair in ten".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shares_are_ratios() {
        assert!(RetentionRatio::new(1.0).is_ok());
        for bad in [0.0, -0.1, 1.0001, 15.0, f64::NAN, f64::INFINITY] {
            assert!(RetentionRatio::new(bad).is_err(), "{bad}");
        }
        assert!(RatioError(15.0).hint().contains("`0.15`"));
    }

    #[test]
    fn counts_round_and_never_empty_a_cache() {
        let r = RetentionRatio::new(0.01).unwrap();
        assert_eq!((r.count(0), r.count(1), r.count(149), r.count(151)), (0, 1, 1, 2));
        assert_eq!(RetentionRatio::new(1.0).unwrap().count(7), 7);
    }
}
