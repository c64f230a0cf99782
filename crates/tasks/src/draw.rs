//! Draws that every generator makes: samples without repetition, codes, shuffles.

use pkv_core::Rng;
use rand::Rng as _;
use rand::seq::{IndexedRandom, SliceRandom, index};

/// `n` different indices below `len`, in random order.
///
/// # Panics
/// There are fewer than `n`.
pub fn sample(rng: &mut Rng, len: usize, n: usize) -> Vec<usize> {
    index::sample(rng, len, n).into_vec()
}

pub fn shuffle<T>(rng: &mut Rng, items: &mut [T]) {
    items.shuffle(rng);
}

/// One of `items`.
///
/// # Panics
/// There is none.
pub fn choose<'a, T>(rng: &mut Rng, items: &'a [T]) -> &'a T {
    items.choose(rng).expect("there is something to choose from")
}

/// `n` letters of `alphabet`, each drawn on its own.
pub fn letters(rng: &mut Rng, alphabet: &[u8], n: usize) -> String {
    (0..n).map(|_| char::from(alphabet[rng.random_range(0..alphabet.len())])).collect()
}

/// `n` different codes of `length` letters.
pub fn codes(rng: &mut Rng, alphabet: &[u8], length: usize, n: usize) -> Vec<String> {
    let mut codes: Vec<String> = Vec::with_capacity(n);
    let mut seen = std::collections::HashSet::new();
    while codes.len() < n {
        let code = letters(rng, alphabet, length);
        if seen.insert(code.clone()) {
            codes.push(code);
        }
    }
    codes
}

/// A random UUID of version 4, as text.
pub fn uuid(rng: &mut Rng) -> String {
    let mut bytes: [u8; 16] = rng.random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;

    #[test]
    fn uuids_are_of_version_4() {
        let mut rng = Seed(1).stream("t", 0);
        for _ in 0..50 {
            let id = uuid(&mut rng);
            let parts: Vec<usize> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
            assert_eq!(&id[14..15], "4");
            assert!("89ab".contains(&id[19..20]), "{id}");
        }
    }

    #[test]
    fn codes_differ() {
        let mut rng = Seed(1).stream("t", 0);
        let codes = codes(&mut rng, b"AB", 3, 8);
        let distinct: std::collections::HashSet<_> = codes.iter().collect();
        assert_eq!(distinct.len(), 8);
    }
}
