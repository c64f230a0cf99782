//! Choices about buckets, which come from the environment: the cache, time limits, and what the builders of
//! object_store take.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pkv_core::{FailureKind, hinted};

/// Folder of the cache.
pub const CACHE: &str = "PKV_BUCKET_CACHE";
/// Most gigabytes of shards in the cache.
pub const CACHE_GB: &str = "PKV_BUCKET_CACHE_GB";
/// Seconds without a byte after which a request is sent again.
pub const TIMEOUT: &str = "PKV_BUCKET_TIMEOUT_S";
/// Seconds without a sign of life after which a claim is another process's.
pub const LEASE: &str = "PKV_BUCKET_LEASE_S";

/// Beginnings of the names of variables that buckets are reached with.
const PREFIXES: [&str; 5] = ["AWS_", "GOOGLE_", "AZURE_", "AZURITE_", "STORAGE_EMULATOR_HOST"];

/// Shards of a run of 50,000 contexts have hundreds of gigabytes; a disk that holds the models holds this.
const DEFAULT_CACHE_GB: f64 = 50.0;
/// Longer than any pause of a server that works, shorter than a user's patience.
const DEFAULT_TIMEOUT_S: f64 = 30.0;
/// A worker that died delays its piece by this; one that is merely slow has four tries to say that it lives.
const DEFAULT_LEASE_S: f64 = 60.0;

/// How buckets are reached, and what of them is kept here.
#[derive(Clone)]
pub struct Options {
    pub cache: PathBuf,
    /// Most bytes of shards in it.
    pub cache_bytes: u64,
    pub patience: Duration,
    pub lease: Duration,
    /// How long a request that fails is sent again.
    pub retry: Duration,
    /// `AWS_...`, `GOOGLE_...`, `AZURE_...`, those of emulators, and `HOME`.
    pub variables: BTreeMap<String, String>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The variables hold keys.
        f.debug_struct("Options").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Options {
    /// # Errors
    /// A variable has no number, or there is no place for the cache.
    pub fn from_env() -> Result<Self> {
        Self::of(
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    fn of(all: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let all: BTreeMap<String, String> = all.collect();
        let get = |name: &str| all.get(name).filter(|value| !value.is_empty());
        let number = |name: &str, default: f64| match get(name) {
            None => Ok(default),
            Some(text) => match text.parse::<f64>() {
                Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
                _ => bail!(
                    hinted(
                        format!("`{name}` is `{text}`; expected a number above 0"),
                        format!("set it to such as `{default}`, or leave it out")
                    )
                    .of(FailureKind::Usage)
                ),
            },
        };
        let cache = match (get(CACHE), get("XDG_CACHE_HOME"), get("HOME")) {
            (Some(own), _, _) => PathBuf::from(own),
            (None, Some(caches), _) => PathBuf::from(caches).join("proxykv-train/buckets"),
            (None, None, Some(home)) => PathBuf::from(home).join(".cache/proxykv-train/buckets"),
            (None, None, None) => bail!(
                hinted(
                    "there is no folder for the cache of a bucket: HOME is not set",
                    format!("set {CACHE}")
                )
                .of(FailureKind::Usage)
            ),
        };
        let cache = std::path::absolute(cache).context("cannot find the folder of the cache")?;
        let patience = Duration::from_secs_f64(number(TIMEOUT, DEFAULT_TIMEOUT_S)?.min(3600.0));
        let is_ours = |name: &str| PREFIXES.iter().any(|p| name.starts_with(p)) || name == "HOME";
        Ok(Self {
            cache_bytes: (number(CACHE_GB, DEFAULT_CACHE_GB)? * 1e9) as u64,
            patience,
            lease: Duration::from_secs_f64(number(LEASE, DEFAULT_LEASE_S)?.min(86_400.0)),
            // Below five minutes: a signature is no longer valid then.
            retry: (patience * 6).min(Duration::from_secs(280)),
            cache,
            variables: all.iter().filter(|(k, _)| is_ours(k)).map(|(k, v)| (k.clone(), v.clone())).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Options> {
        Options::of(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    #[test]
    fn the_environment_is_read() {
        let o = of(&[("HOME", "/h"), ("AWS_REGION", "r"), ("PATH", "x"), (CACHE_GB, "0.5")]).unwrap();
        assert_eq!(o.cache, PathBuf::from("/h/.cache/proxykv-train/buckets"));
        assert_eq!((o.cache_bytes, o.patience.as_secs(), o.lease.as_secs()), (500_000_000, 30, 60));
        assert_eq!(o.variables.len(), 2);
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x"), (CACHE, "/c")]).unwrap().cache, PathBuf::from("/c"));
        for (name, value) in [(CACHE_GB, "many"), (TIMEOUT, "0"), (LEASE, "-1"), (LEASE, "NaN")] {
            let error = of(&[("HOME", "/h"), (name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
        assert!(of(&[]).is_err());
        assert!(
            !format!("{:?}", of(&[("HOME", "/h"), ("AWS_SECRET_ACCESS_KEY", "sss")]).unwrap())
                .contains("sss")
        );
    }
}
