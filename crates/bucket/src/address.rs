//! Addresses of buckets: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};
use pkv_core::{FailureKind, Hinted, hinted};

pkv_core::named! {
    /// A kind of bucket.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Scheme {
        S3 = "s3";
        Google = "gs";
        Azure = "az";
    }
}

/// A bucket, and a place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub scheme: Scheme,
    pub bucket: String,
    /// Names between slashes; empty is the bucket itself.
    pub prefix: String,
}

/// Whether a path is meant as an address, of a bucket or of another kind.
pub fn is_address(path: &Path) -> bool {
    let Some((scheme, _)) = path.to_str().and_then(|text| text.split_once("://")) else { return false };
    !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+')
}

impl Address {
    /// # Errors
    /// It is no address of a bucket. What it says is not repeated where it may hold a password.
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let Some(scheme) = Scheme::named(scheme) else {
            bail!(refused(format!("`{}://` is no kind of bucket", word(scheme))));
        };
        if rest.contains(['@', '?', '#']) {
            bail!(
                hinted(
                    format!(
                        "the address of a bucket on `{}://` has a user, a query or a fragment",
                        scheme.name()
                    ),
                    "credentials come from the environment or the usual files, never from an address",
                )
                .of(FailureKind::Usage)
            );
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let named = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if bucket.is_empty() || !bucket.chars().all(named) || bucket.starts_with('.') {
            bail!(refused(format!("`{text}` names no bucket")));
        }
        let prefix = prefix.trim_end_matches('/');
        let sound = |part: &str| {
            !part.is_empty() && part != "." && part != ".." && !part.contains(|c: char| c.is_control())
        };
        if !prefix.is_empty() && !prefix.split('/').all(sound) {
            bail!(refused(format!("`{}` has an empty name between slashes, or dots", text.escape_debug())));
        }
        Ok(Self { scheme, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }

    /// The bucket itself, as text: `s3://bucket`.
    pub fn root(&self) -> String {
        format!("{}://{}", self.scheme.name(), self.bucket)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.root())?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

/// The word before `://`, as far as it is one.
fn word(scheme: &str) -> String {
    scheme.chars().take(12).collect()
}

fn refused(what: String) -> Hinted {
    hinted(what, "write `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER` or `az://CONTAINER/FOLDER`, or a path")
        .of(FailureKind::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for (text, scheme, bucket, prefix) in [
            ("s3://b", Scheme::S3, "b", ""),
            ("s3://my-bucket/runs/", Scheme::S3, "my-bucket", "runs"),
            ("gs://b.example/a b/c", Scheme::Google, "b.example", "a b/c"),
            ("az://container/x", Scheme::Azure, "container", "x"),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!((address.scheme, &*address.bucket, &*address.prefix), (scheme, bucket, prefix));
            assert_eq!(address.to_string(), text.trim_end_matches('/'));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_and_passwords_are_not_repeated() {
        for bad in [
            "s3://",
            "s3:///x",
            "http://b/x",
            "ftp://b",
            "s3://b//x",
            "s3://b/../x",
            "s3://b/./x",
            "s3://ä/x",
            "s3://key:secretkey@b/x",
            "s3://b/x?sig=secretkey",
            "://b",
            "s3://b/a\nb",
        ] {
            let error = Address::parse(bad).unwrap_err();
            assert!(Hinted::find(&error).is_some(), "{bad}");
            assert!(!format!("{error:?}").contains("secretkey"), "{error:?}");
        }
        for (path, is) in
            [("s3://b", true), ("http://x", true), ("runs", false), ("a/b://c", false), ("://", false)]
        {
            assert_eq!(is_address(Path::new(path)), is, "{path}");
        }
    }
}
