//! Names that become paths: repositories, revisions, commits, files, ETags.
//!
//! Some come from a recipe or a lock file, some from a hub that may be anyone's. What could lead out of the
//! repository's folder in the cache is refused by name; whether a path really stays there, links
//! included, is asked of the disk by `store`.

use anyhow::{Result, ensure};
use pkv_core::{hinted, short_line};

/// Longest name of a file or folder on usual disks, less what `.incomplete` needs.
const LONGEST_PART: usize = 240;
const LONGEST_PATH: usize = 1024;
/// A SHA-256 in hexadecimal has 64.
const LONGEST_COMMIT: usize = 64;

/// # Errors
/// `name` is not `owner/name` or `name` as the hub allows it.
pub(crate) fn check_repository(name: &str) -> Result<()> {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with(['-', '.'])
            && !p.ends_with(['-', '.'])
            && !p.contains("..")
            && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    ensure!(
        name.len() <= LONGEST_PART && name.split('/').count() <= 2 && name.split('/').all(part),
        hinted(
            format!("`{}` is no name of a hub repository", short_line(name)),
            "write `owner/name` in letters, digits, `-`, `_` and `.`"
        )
    );
    Ok(())
}

/// # Errors
/// `revision` is no branch, tag or commit.
pub(crate) fn check_revision(revision: &str) -> Result<()> {
    ensure!(
        is_path(revision) && !revision.chars().any(char::is_whitespace),
        hinted(
            format!("`{}` is no revision of a hub repository", short_line(revision)),
            "name a branch, a tag or a commit, such as `main`"
        )
    );
    Ok(())
}

/// # Errors
/// `commit`, as a hub or a lock file names it, is none.
pub(crate) fn check_commit(commit: &str) -> Result<()> {
    ensure!(
        !commit.is_empty()
            && commit.len() <= LONGEST_COMMIT
            && commit.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
        hinted(
            format!("`{}` is no commit: expected 40 hexadecimal digits", short_line(commit)),
            "check that HF_ENDPOINT is a hub's address; nothing was written for that commit"
        )
    );
    Ok(())
}

/// # Errors
/// `file`, as a hub or a lock file names it, is no plain relative path.
pub(crate) fn check_file(file: &str) -> Result<()> {
    ensure!(
        is_path(file),
        hinted(
            format!("`{}` is no name of a file in a repository", short_line(file)),
            "it would lie outside of the repository's folder; leave it out, or use another repository or hub"
        )
    );
    Ok(())
}

/// Relative, without empty parts, `.` and `..`, backslashes and control characters, of sane length.
fn is_path(path: &str) -> bool {
    path.len() <= LONGEST_PATH
        && !path.contains('\\')
        && !path.contains(char::is_control)
        && path.split('/').all(|p| !p.is_empty() && p != "." && p != ".." && p.len() <= LONGEST_PART)
}

/// The name of a file's content in the cache, out of an `ETag` header: without quotes, and without the `W/`
/// of a weak one, as `huggingface_hub` names it.
pub(crate) fn etag(header: &str) -> Option<&str> {
    let etag = header.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let fits = !etag.is_empty()
        && etag.len() <= LONGEST_PART
        && etag.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+=:~".contains(c))
        && !etag.starts_with('.')
        && !etag.contains("..")
        // Names that the cache gives to other files.
        && !etag.ends_with(".incomplete");
    fits.then_some(etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_folder_are_refused() {
        for good in ["config.json", "data/a b \"c\".parquet", "a/.hidden", "CON", "ä.txt", "a..b/c..."] {
            check_file(good).unwrap();
        }
        let (long, deep) = ("x".repeat(300), "a/".repeat(600) + "a");
        for bad in
            ["", "/etc/passwd", "..", "a/../b", "./a", "a//b", "a/", "a\\b", "a\0b", "a\nb", &long, &deep]
        {
            let error = check_file(bad).unwrap_err();
            assert!(error.to_string().ends_with("is no name of a file in a repository"), "{error}");
        }
        for good in ["main", "refs/convert/parquet", "v1.0", "0123abcd"] {
            check_revision(good).unwrap();
        }
        for bad in ["", "/etc", "../../etc", "a b", "a/../../b"] {
            assert!(check_revision(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn commits_and_repositories_are_plain_names() {
        check_commit("0123456789abcdef0123456789abcdef01234567").unwrap();
        for bad in ["", "..", "a/b", "/a", "a.b", &"0".repeat(65)] {
            assert!(check_commit(bad).is_err(), "{bad}");
        }
        for good in ["gpt2", "owner/name-1_b.v2", "0x/y"] {
            check_repository(good).unwrap();
        }
        for bad in ["", "a/b/c", "../../etc", "/a", "a/", "a\\b", "a b", "-a/b", "a/.."] {
            assert!(check_repository(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn etags_become_names() {
        for (header, name) in [
            ("\"0aff\"", "0aff"),
            ("W/\"0aff\"", "0aff"),
            (" W/\"0aff-gzip\" ", "0aff-gzip"),
            ("0aff", "0aff"),
            ("\"d41d8cd9-12:z\"", "d41d8cd9-12:z"),
        ] {
            assert_eq!(etag(header), Some(name));
        }
        for bad in [
            "",
            "\"\"",
            "\"../x\"",
            "\"/etc/x\"",
            "\"a/b\"",
            "W/\"..\"",
            "\".x\"",
            "\"a b\"",
            "\"a.incomplete\"",
        ] {
            assert_eq!(etag(bad), None, "{bad}");
        }
        assert_eq!(etag(&"0".repeat(1000)), None);
    }
}
