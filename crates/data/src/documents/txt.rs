//! Plain text: one document per file, or as many as a separator makes.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::open::{Reader, damaged, open};
use super::{MOST_BYTES, Texts, check_length, until_error, utf8};

pub(super) fn texts(path: &Path, separator: Option<&str>) -> Result<Texts> {
    let separator = separator.map(|s| s.as_bytes().to_vec());
    let mut pieces =
        Pieces { reader: open(path)?, path: path.to_path_buf(), separator, offset: 0, done: false };
    Ok(until_error(path, move || pieces.read()))
}

struct Pieces {
    reader: Reader,
    path: PathBuf,
    separator: Option<Vec<u8>>,
    /// Byte of the file where the next piece begins.
    offset: u64,
    done: bool,
}

impl Pieces {
    fn read(&mut self) -> Result<Option<String>> {
        if self.done {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let mut whole = false;
        let mut reader = self.reader.by_ref().take(MOST_BYTES + 1);
        match self.separator.as_deref() {
            None => {
                reader.read_to_end(&mut bytes).with_context(damaged)?;
            }
            Some(separator) => {
                let last = *separator.last().expect("manifests have no empty separator");
                while !whole && reader.read_until(last, &mut bytes).with_context(damaged)? > 0 {
                    whole = bytes.ends_with(separator);
                }
            }
        }
        check_length(&bytes, MOST_BYTES)?;
        self.done = !whole;
        let start = self.offset;
        self.offset += bytes.len() as u64;
        if self.done && bytes.is_empty() && start > 0 {
            return Ok(None);
        }
        if whole {
            bytes.truncate(bytes.len() - self.separator.as_ref().map_or(0, Vec::len));
        }
        let mut text = utf8(bytes, &self.path, start)?;
        if start == 0 && text.starts_with('\u{feff}') {
            // A byte order mark is no text.
            text.drain(..'\u{feff}'.len_utf8());
        }
        Ok(Some(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8], separator: Option<&str>) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, content).unwrap();
        texts(&path, separator).unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn separators_cut_and_disappear() {
        assert_eq!(read(b"one\0two\0\0four", Some("\0")), ["one", "two", "", "four"]);
        assert_eq!(read(b"one\0", Some("\0")), ["one"]);
        assert_eq!(read(b"a-b--c---d", Some("--")), ["a-b", "c", "-d"]);
        assert_eq!(read(b"a\n\nb\n", Some("\n\n")), ["a", "b\n"]);
        assert_eq!(read(b"one\0two", None), ["one\0two"]);
        assert_eq!(read(b"", None), [""]);
        assert_eq!(read("\u{feff}mark\0\u{feff}kept".as_bytes(), Some("\0")), ["mark", "\u{feff}kept"]);
    }

    #[test]
    fn a_byte_that_is_no_text_is_named_by_file_and_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latin.txt");
        std::fs::write(&path, b"one\0caf\xe9 two\0three").unwrap();
        let results: Vec<_> = texts(&path, Some("\0")).unwrap().collect();
        assert_eq!(results.len(), 2, "reading goes on after an error");
        let error = format!("{:#}", results[1].as_ref().unwrap_err());
        assert!(error.contains("latin.txt` is not UTF-8 text: byte 7 fits no character"), "{error}");
    }
}
