//! JSON lines: one object per line, the text under one of its keys.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pkv_core::{hinted, json_kind, parse_json};
use serde_json::Value;

use super::open::{Reader, damaged, open};
use super::{MOST_BYTES, Texts, check_length, listed, until_error, utf8};

/// Repair of what is not in lines.
const ONE_PER_LINE: &str = "a jsonl file has one object per line; `jq -c '.[]' array.json > lines.jsonl` makes one of an array, \
                            `jq -c . objects.json > lines.jsonl` of objects over several lines";

pub(super) fn texts(path: &Path, key: &str) -> Result<Texts> {
    let (path_buf, key) = (path.to_path_buf(), key.to_owned());
    let mut lines = Lines { reader: open(path)?, path: path_buf, key, line: 0, offset: 0 };
    Ok(until_error(path, move || lines.read()))
}

struct Lines {
    reader: Reader,
    path: PathBuf,
    key: String,
    /// Lines read so far.
    line: u64,
    /// Byte of the file where the next line begins.
    offset: u64,
}

impl Lines {
    fn read(&mut self) -> Result<Option<String>> {
        loop {
            let mut bytes = Vec::new();
            let mut reader = self.reader.by_ref().take(MOST_BYTES + 1);
            if reader.read_until(b'\n', &mut bytes).with_context(damaged)? == 0 {
                return Ok(None);
            }
            check_length(&bytes, MOST_BYTES)?;
            let start = self.offset;
            self.offset += bytes.len() as u64;
            self.line += 1;
            let line = utf8(bytes, &self.path, start)?;
            // A byte order mark is no text.
            let line = if start == 0 { line.trim_start_matches('\u{feff}') } else { &line };
            if !line.trim().is_empty() {
                return self
                    .text(line)
                    .with_context(|| format!("line {} is no document", self.line))
                    .map(Some);
            }
        }
    }

    fn text(&self, line: &str) -> Result<String> {
        // The beginning of an array over several lines is no JSON by itself.
        if line.trim_start().starts_with('[') {
            bail!(hinted("it begins a JSON array", ONE_PER_LINE));
        }
        let mut object = match parse_json(line, ONE_PER_LINE)? {
            Value::Object(object) => object,
            other => bail!(hinted(format!("it is {}, not an object", json_kind(&other)), ONE_PER_LINE)),
        };
        match object.remove(&self.key) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Null) => Ok(String::new()),
            Some(other) => bail!(hinted(
                format!("its key `{}` holds {}, not text", self.key, json_kind(&other)),
                "name a key that holds text: `text = \"...\"` in the manifest's source"
            )),
            None => bail!(hinted(
                format!(
                    "it has no key `{}`; its keys are {}",
                    self.key,
                    listed(object.keys().map(String::as_str))
                ),
                "name the key that holds the text: `text = \"...\"` in the manifest's source"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, content).unwrap();
        texts(&path, "text").unwrap().collect()
    }

    #[test]
    fn lines_are_documents() {
        let content = b"{\"id\": 1, \"text\": \"one\\ntwo\"}\n\n{\"text\": null}\r\n{\"text\": \"three\"}";
        assert_eq!(read(content).unwrap(), ["one\ntwo", "", "three"]);
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        assert_eq!(
            read(b"\xef\xbb\xbf{\"text\": \"one\"}\r\n\r\n{\"text\": \"two\"}\r\n").unwrap(),
            ["one", "two"]
        );
        assert_eq!(read(b"\xef\xbb\xbf\n{\"text\": \"one\"}").unwrap(), ["one"]);
    }

    #[test]
    fn errors_name_line_and_keys() {
        for (content, expected) in [
            (
                &b"{\"text\": \"a\"}\n{\"body\": \"b\", \"id\": 2}\n"[..],
                "line 2 is no document: it has no key `text`; its keys are `body`, `id`",
            ),
            (b"{\"text\": 3}\n", "line 1 is no document: its key `text` holds a number, not text"),
            (
                b"{\"text\": \"a\"}\n\n{\"text\": \n",
                "line 3 is no document: it is no JSON: EOF while parsing",
            ),
            (b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n", "is not UTF-8 text: byte 24"),
            (b"\xff\xfe{\x00", "is not UTF-8 text: byte 0"),
            (b"[{\"text\": \"a\"}]", "line 1 is no document: it begins a JSON array"),
            (b"[\n {\"text\": \"a\"}\n]", "line 1 is no document: it begins a JSON array"),
            (b"\n\"a\"\n", "line 2 is no document: it is text, not an object"),
            (b"{\n \"text\": \"a\"\n}", "line 1 is no document: it is no JSON: EOF"),
            (b"{\"text\": \"a \\ud83d b\"}\n", "line 1 is no document: `\\ud83d` is half of a character"),
        ] {
            let error = read(content).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains("a.jsonl") && text.contains(expected), "expected {expected}, found {text}");
            assert!(
                error.chain().any(|c| c.is::<pkv_core::Hinted>()) || error.is::<pkv_core::Hinted>(),
                "no hint: {text}"
            );
        }
    }
}
