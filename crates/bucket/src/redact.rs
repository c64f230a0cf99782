//! Removal of secrets from what is said about a bucket: keys, tokens, and signatures in addresses.
//!
//! A server may repeat in its answer what it was sent, and an error may hold an address with a signature.

use pkv_core::short_line;

const HIDDEN: &str = "***";

/// Shorter ones occur in any text.
const SHORTEST: usize = 6;

/// Members of an address or a header whose values are secret.
const NAMES: [&str; 8] = [
    "x-amz-signature=",
    "x-amz-credential=",
    "x-amz-security-token=",
    "x-goog-signature=",
    "signature=",
    "credential=",
    "sig=",
    "access_token=",
];

/// The secrets that one bucket is used with.
#[derive(Clone, Default)]
pub(crate) struct Secrets(Vec<String>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl Secrets {
    pub fn new(values: impl IntoIterator<Item = String>) -> Self {
        let mut all: Vec<String> = values.into_iter().filter(|s| s.len() >= SHORTEST).collect();
        // A secret that holds another goes first.
        all.sort_by_key(|s| std::cmp::Reverse(s.len()));
        Self(all)
    }

    /// `text` as one line without secrets.
    pub fn redact(&self, text: &str) -> String {
        let mut out = self.0.iter().fold(text.to_owned(), |t, secret| t.replace(secret, HIDDEN));
        for name in NAMES {
            let mut from = 0;
            // Only ASCII changes its case here, so that places are those of `out`.
            while let Some(at) = out[from..].to_ascii_lowercase().find(name) {
                let start = from + at + name.len();
                let ends = |c: char| c.is_whitespace() || "&,\"'<>`)".contains(c);
                let end = out[start..].find(ends).map_or(out.len(), |n| start + n);
                out.replace_range(start..end, HIDDEN);
                from = start + HIDDEN.len();
            }
        }
        for name in ["Bearer ", "Authorization: "] {
            let mut from = 0;
            while let Some(at) = out[from..].find(name) {
                let start = from + at + name.len();
                let end = out[start..].find(|c: char| c.is_whitespace() || "\"<,".contains(c));
                let end = end.map_or(out.len(), |n| start + n);
                out.replace_range(start..end, HIDDEN);
                from = start + HIDDEN.len();
            }
        }
        short_line(&out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_signatures_are_hidden() {
        let secrets = Secrets::new(["topsecretkey".to_owned(), "ab".to_owned()]);
        for (text, clean) in [
            ("key topsecretkey!", "key ***!"),
            ("GET http://h/b?X-Amz-Signature=abc&x=1", "GET http://h/b?X-Amz-Signature=***&x=1"),
            ("https://h/c?sv=1&sig=a%2Fb", "https://h/c?sv=1&sig=***"),
            ("Bearer abc.def and\nmore", "Bearer *** and more"),
            ("Credential=AK/2026, Signature=ff, x", "Credential=***, Signature=***, x"),
            ("about ä", "about ä"),
        ] {
            assert_eq!(secrets.redact(text), clean);
        }
        assert_eq!(secrets.redact(&"ä".repeat(1000)).chars().count(), 303);
        assert_eq!(format!("{secrets:?}"), "***");
    }
}
