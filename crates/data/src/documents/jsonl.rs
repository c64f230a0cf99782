//! JSON lines: one object per line, the text under one of its keys.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pkv_core::hinted;
use serde_json::{Map, Value};

use super::{Texts, listed, utf8};

pub(super) fn texts(path: &Path, key: &str) -> Result<Texts> {
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    Ok(Box::new(Lines {
        reader: BufReader::with_capacity(1 << 16, file),
        path: path.to_path_buf(),
        key: key.to_owned(),
        line: 0,
        offset: 0,
        done: false,
    }))
}

struct Lines {
    reader: BufReader<File>,
    path: PathBuf,
    key: String,
    /// Lines read so far.
    line: u64,
    /// Byte of the file where the next line begins.
    offset: u64,
    done: bool,
}

impl Lines {
    fn read(&mut self) -> Result<Option<String>> {
        loop {
            let mut bytes = Vec::new();
            if self.reader.read_until(b'\n', &mut bytes)? == 0 {
                self.done = true;
                return Ok(None);
            }
            let start = self.offset;
            self.offset += bytes.len() as u64;
            self.line += 1;
            let line = utf8(bytes, &self.path, start)?;
            if !line.trim().is_empty() {
                return self
                    .text(&line)
                    .with_context(|| format!("line {} is no document", self.line))
                    .map(Some);
            }
        }
    }

    fn text(&self, line: &str) -> Result<String> {
        let mut object: Map<String, Value> = serde_json::from_str(line)?;
        match object.remove(&self.key) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Null) => Ok(String::new()),
            Some(_) => bail!("its key `{}` holds no string", self.key),
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

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        if self.done {
            return None;
        }
        let text = self.read().with_context(|| format!("cannot read `{}`", self.path.display()));
        self.done |= text.is_err();
        text.transpose()
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
    fn errors_name_line_and_keys() {
        for (content, expected) in [
            (
                &b"{\"text\": \"a\"}\n{\"body\": \"b\", \"id\": 2}\n"[..],
                "line 2 is no document: it has no key `text`; its keys are `body`, `id`",
            ),
            (b"{\"text\": 3}\n", "line 1 is no document: its key `text` holds no string"),
            (b"{\"text\": \"a\"}\n\n{\"text\": \n", "line 3 is no document: EOF while parsing"),
            (b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n", "is not UTF-8 text: byte 24"),
        ] {
            let error = format!("{:#}", read(content).unwrap_err());
            assert!(error.contains(expected), "expected {expected}, found {error}");
        }
    }
}
