//! What identifies a document: a hash of its text.
//!
//! Duplicates have the same; the split follows from it alone, so a document keeps its split whatever
//! the seed, the other documents and the order of the manifest.

use pkv_core::{Seed, Split};
use pkv_recipe::DataSection;
use rand::Rng;
use sha2::{Digest, Sha256};

/// The first 16 bytes of the text's SHA-256: for a billion documents, two different ones share them
/// with probability 1e-21.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DocumentHash(u128);

impl DocumentHash {
    pub fn of(text: &str) -> Self {
        let digest = Sha256::digest(text.as_bytes());
        Self(u128::from_be_bytes(digest[..16].try_into().expect("a SHA-256 digest has 32 bytes")))
    }

    /// The document's id in examples.
    pub fn id(self) -> String {
        format!("{:032x}", self.0)
    }

    /// Its place among all hashes, in [0, 1).
    pub fn place(self) -> f64 {
        // 53 bits: exact in f64.
        (self.0 >> 75) as f64 / (1u64 << 53) as f64
    }

    /// Test documents lie at the bottom of the range of hashes, validation documents above them:
    /// changing one share moves no document between the other two splits.
    pub fn split(self, data: &DataSection) -> Split {
        let place = self.place();
        if place < data.test_share {
            Split::Test
        } else if place < data.test_share + data.validation_share {
            Split::Validation
        } else {
            Split::Train
        }
    }

    /// The length of the document's windows.
    pub fn window(self, data: &DataSection, split: Split, seed: Seed) -> usize {
        match data.test_window_tokens.filter(|_| split == Split::Test) {
            Some(window) => window,
            None => {
                let mut rng = seed.stream("data.window", self.0 as u64);
                data.window_tokens[rng.random_range(0..data.window_tokens.len())]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(validation: f64, test: f64) -> DataSection {
        let text = format!(
            "manifest = \"m\"\ntrain = 1\nvalidation = 1\ntest = 1\nvalidation_share = {validation}\ntest_share = {test}\n\
             window_tokens = [300, 400, 500]\ntest_window_tokens = 350\n"
        );
        toml_section(&text)
    }

    fn toml_section(data: &str) -> DataSection {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        let model = "model = \"m\"\nshape = { layers = 1, kv_heads = 1, query_heads = 1, head_dim = 8, hidden = 8, intermediate = 8, vocab = 8 }\n";
        std::fs::write(&path, format!("name = \"r\"\n[target]\n{model}[proxy]\n{model}[data]\n{data}"))
            .unwrap();
        pkv_recipe::load(&path, &[]).unwrap().data
    }

    #[test]
    fn shares_are_kept_and_moving_one_moves_nobody_else() {
        let (a, b) = (section(0.1, 0.2), section(0.3, 0.2));
        let hashes: Vec<_> = (0..4000).map(|i| DocumentHash::of(&format!("document {i}"))).collect();
        let count = |s: &DataSection, split| hashes.iter().filter(|h| h.split(s) == split).count();
        // Within four standard deviations.
        assert!(
            count(&a, Split::Test).abs_diff(800) < 102 && count(&a, Split::Validation).abs_diff(400) < 76
        );
        for h in &hashes {
            assert_eq!(h.split(&a) == Split::Test, h.split(&b) == Split::Test);
            assert!(h.split(&b) != Split::Train || h.split(&a) == Split::Train);
        }
    }

    #[test]
    fn window_lengths_are_drawn_per_document() {
        let s = section(0.1, 0.1);
        let windows: Vec<_> = (0..300)
            .map(|i| DocumentHash::of(&format!("document {i}")).window(&s, Split::Train, Seed(1)))
            .collect();
        for w in &s.window_tokens {
            assert!(windows.iter().filter(|v| *v == w).count().abs_diff(100) < 40, "{w}");
        }
        assert_eq!(DocumentHash::of("x").window(&s, Split::Test, Seed(1)), 350);
    }
}
