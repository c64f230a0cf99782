//! One seed per run, and a stream of random numbers for every use of it.
//!
//! Streams are named, so that a new use does not shift the numbers of another, and numbered, so
//! that work can be resumed in the middle: the stream of step 700 needs no earlier one.

use rand::SeedableRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The generator of every stream: ChaCha8, whose output is fixed across versions and machines.
pub type Rng = rand_chacha::ChaCha8Rng;

/// The seed of a run.
///
/// ```
/// use pkv_core::Seed;
/// use rand::Rng;
///
/// let draw = |step| Seed(7).stream("batches", step).random_range(0..1_000_000);
/// assert_eq!(draw(700), draw(700), "a step needs no earlier one");
/// assert_ne!(draw(700), draw(701));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Seed(pub u64);

impl Seed {
    /// A 64-bit seed for use `name`, item `index`; for generators that are not ours (libtorch's).
    pub fn derive(self, name: &str, index: u64) -> u64 {
        let digest = self.digest(name, index);
        u64::from_le_bytes(digest[..8].try_into().expect("a SHA-256 digest has 32 bytes"))
    }

    /// The random stream of use `name`, item `index`.
    pub fn stream(self, name: &str, index: u64) -> Rng {
        Rng::from_seed(self.digest(name, index))
    }

    fn digest(self, name: &str, index: u64) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.0.to_le_bytes());
        hash.update(index.to_le_bytes());
        hash.update(name.as_bytes());
        hash.finalize().into()
    }
}

/// SHA-256 of `bytes` in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_name_and_index() {
        let seed = Seed(7);
        let all = [seed.derive("a", 0), seed.derive("a", 1), seed.derive("b", 0), Seed(8).derive("a", 0)];
        for (i, x) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|y| x != y));
        }
        assert_eq!(seed.derive("a", 1), all[1]);
    }
}
