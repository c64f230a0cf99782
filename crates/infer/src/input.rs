//! What a user gives: a context, and questions from the command line, a file or stdin.
//!
//! Question lines are untrusted: an invalid line is refused, and reading continues.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use pkv_core::{Interrupted, MOST_BYTES, Stop, hinted, json_kind};
use pkv_text::TextTokenizer;
use serde_json::Value;

/// Some editors put it first; it is no text.
const BYTE_ORDER_MARK: &str = "\u{feff}";
/// Most bytes of a line of questions: more than a context has.
const MOST_LINE_BYTES: u64 = 64 << 20;

/// The next question.
pub enum InputLine {
    Question(String),
    /// A line that is no question, counted from 1.
    Malformed {
        line: usize,
        error: Error,
    },
}

/// Where a context comes from.
#[derive(Clone, Copy, Debug)]
pub enum ContextFile<'a> {
    Text(&'a Path),
    /// A JSON list of token ids.
    Ids(&'a Path),
}

/// `-` is stdin.
pub fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Whether a person types the questions of that file.
pub fn is_typed(path: &Path) -> bool {
    is_stdin(path) && io::stdin().is_terminal()
}

/// The context's tokens, without the chat template's prefix.
///
/// # Errors
/// The file cannot be read, is no UTF-8 or no list of ids, or holds nothing; the user stopped.
pub fn read_context(file: ContextFile, tokenizer: &TextTokenizer, stop: &Stop) -> Result<Vec<u32>> {
    let tokens = match file {
        ContextFile::Text(path) => {
            let tokens = tokenizer.encode(&text(path, stop)?)?;
            let special: Vec<String> = tokenizer.special_tokens_in(&tokens).into_iter().collect();
            if !special.is_empty() {
                tracing::warn!(
                    "the context spells out special tokens, which act as such: {}; `--special-tokens-as-text` reads them as text",
                    special.join(", ")
                );
            }
            tokens
        }
        ContextFile::Ids(path) => serde_json::from_str(&text(path, stop)?).with_context(|| {
            hinted(
                format!("reading token ids from `{}`", path.display()),
                "expected a JSON list of numbers, such as [12, 7, 4011]",
            )
        })?,
    };
    ensure!(
        !tokens.is_empty(),
        hinted("the context is empty: it has no KV pairs to prune", "give a file with text as `--context`")
    );
    Ok(tokens)
}

fn text(path: &Path, stop: &Stop) -> Result<String> {
    let reading = || {
        hinted(
            format!("reading the context `{}`", path.display()),
            "the context is a text file in UTF-8, a pipe, or `-` for stdin",
        )
    };
    let bytes = if is_stdin(path) {
        whole(|| Ok(io::stdin()), stop)
    } else if fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
        // As `<(command)` of a shell.
        let path = path.to_path_buf();
        whole(move || File::open(path), stop)
    } else {
        Some(pkv_core::read_small(path))
    };
    let bytes = bytes.ok_or(Interrupted)?.with_context(reading)?;
    let text = String::from_utf8(bytes).with_context(reading)?;
    Ok(text.strip_prefix(BYTE_ORDER_MARK).map(str::to_owned).unwrap_or(text))
}

/// What a stream holds, up to the size of a file that is read whole; nothing if the user stops before its
/// end.
fn whole<R: Read>(
    open: impl FnOnce() -> io::Result<R> + Send + 'static,
    stop: &Stop,
) -> Option<io::Result<Vec<u8>>> {
    let read = move || {
        let mut bytes = Vec::new();
        open()?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
        let large = bytes.len() as u64 > MOST_BYTES;
        if large { Err(too_large("it has", MOST_BYTES)) } else { Ok(bytes) }
    };
    Streamed::new(stop, move |to| {
        to(read());
    })
    .next()
}

fn too_large(what: &str, most: u64) -> io::Error {
    io::Error::new(ErrorKind::FileTooLarge, format!("{what} more than {most} bytes"))
}

/// Lines without their ends.
fn lines(mut from: impl BufRead) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        match from.by_ref().take(MOST_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(_) if line.pop_if(|last| *last == b'\n').is_some() => {}
            Ok(n) if n as u64 == MOST_LINE_BYTES => {
                return Some(Err(too_large("a line has", MOST_LINE_BYTES)));
            }
            Ok(_) => {}
            Err(e) => return Some(Err(e)),
        }
        Some(Ok(line))
    })
}

/// The questions, the `given` ones first; a file's are read one by one. Those of stdin may be
/// long in coming: waiting for one ends when the user wants to stop. Blank lines of a file are passed over;
/// on stdin every line asks for something, and has its answer or its error. Who types questions may type them
/// as they are, without JSON.
///
/// # Errors
/// There is nothing to ask, a given question is empty, or the file cannot be opened.
pub fn read_questions(
    given: &[String],
    file: Option<&Path>,
    stop: &Stop,
) -> Result<Box<dyn Iterator<Item = Result<InputLine>>>> {
    let repair = "ask with `--question \"...\"`, or name JSON lines with `--questions FILE` (`-` for stdin)";
    ensure!(given.iter().all(|q| !q.trim().is_empty()), hinted("`--question` is empty", repair));
    let given: Vec<_> = given.iter().map(|q| Ok(InputLine::Question(q.clone()))).collect();
    let given = given.into_iter();
    let Some(path) = file else {
        ensure!(given.len() > 0, hinted("there is no question", repair));
        return Ok(Box::new(given));
    };
    let (from_stdin, typed) = (is_stdin(path), is_typed(path));
    let lines: Box<dyn Iterator<Item = io::Result<Vec<u8>>>> = if from_stdin {
        Box::new(Streamed::new(stop, |to| {
            lines(io::stdin().lock()).all(to);
        }))
    } else {
        let opening = || {
            hinted(
                format!("opening the questions `{}`", path.display()),
                "name a file of JSON lines, or ask with `--question`",
            )
        };
        let file = File::open(path).with_context(opening)?;
        ensure!(!file.metadata().with_context(opening)?.is_dir(), opening());
        Box::new(lines(BufReader::new(file)))
    };
    let name = path.display().to_string();
    let asked = lines.enumerate().filter_map(move |(index, line)| {
        let line = match line {
            Ok(line) => line,
            Err(e) => return Some(Err(e).with_context(|| format!("reading the questions `{name}`"))),
        };
        let line =
            if index == 0 { line.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(&line) } else { &line };
        if line.trim_ascii().is_empty() && (typed || !from_stdin) {
            return None;
        }
        let read = if typed { typed_question(line) } else { question(line) };
        Some(Ok(match read {
            Ok(text) => InputLine::Question(text),
            Err(e) => InputLine::Malformed {
                line: index + 1,
                error: e.context(hinted(
                    format!("reading line {} of the questions `{name}`", index + 1),
                    "write one question per line, as {\"question\": \"...\"} or \"...\"",
                )),
            },
        }))
    });
    Ok(Box::new(given.chain(asked)))
}

/// What comes from a stream, read on another thread: a blocked read does not hear Ctrl-C. Ends with the
/// stream, or when the user stops.
struct Streamed {
    parts: Receiver<io::Result<Vec<u8>>>,
    stop: Stop,
}

impl Streamed {
    /// `read` hands over parts until that returns false: they are not wanted any more.
    fn new(stop: &Stop, read: impl FnOnce(&dyn Fn(io::Result<Vec<u8>>) -> bool) + Send + 'static) -> Self {
        // Few wait: an endless stream is read no faster than its parts are used.
        let (to, parts) = sync_channel(16);
        std::thread::spawn(move || read(&|part| to.send(part).is_ok()));
        Self { parts, stop: stop.clone() }
    }
}

impl Iterator for Streamed {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.stop.is_requested() {
            match self.parts.recv_timeout(Duration::from_millis(50)) {
                Ok(part) => return Some(part),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }
}

fn question(line: &[u8]) -> Result<String> {
    let expected = "expected a string, or an object with the string `question`";
    ensure!(!line.trim_ascii().is_empty(), "{expected}, found an empty line");
    let parsed = serde_json::from_slice::<Value>(line);
    let found = match parsed.map_err(|e| anyhow!("{expected}, found no JSON at column {}", e.column()))? {
        Value::String(text) => return Ok(text),
        Value::Object(mut fields) => match fields.remove("question") {
            Some(Value::String(text)) => return Ok(text),
            Some(other) => format!("{} as `question`", json_kind(&other)),
            None => "an object without it".to_owned(),
        },
        other => json_kind(&other).to_owned(),
    };
    bail!("{expected}, found {found}")
}

/// A line that is no JSON by its first character is the question itself.
fn typed_question(line: &[u8]) -> Result<String> {
    match str::from_utf8(line).map(str::trim) {
        Ok(text) if !text.starts_with(['{', '"']) => Ok(text.to_owned()),
        _ => question(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_line_breaks_and_never_grow_without_end() {
        let of = |text: &'static str| lines(text.as_bytes()).map(Result::unwrap).collect::<Vec<_>>();
        assert_eq!(of("a\n\nb"), [&b"a"[..], b"", b"b"]);
        assert_eq!(of("a\n"), [b"a"]);
        assert!(of("").is_empty());
        let endless = lines(BufReader::new(io::repeat(b'x'))).next().unwrap();
        assert_eq!(endless.unwrap_err().to_string(), "a line has more than 67108864 bytes");
        let stop = Stop::default();
        let endless = whole(|| Ok(io::repeat(b'x')), &stop).unwrap();
        assert_eq!(endless.unwrap_err().to_string(), "it has more than 268435456 bytes");
        stop.request();
        assert!(whole(|| Ok(io::repeat(b'x')), &stop).is_none());
    }

    #[test]
    fn questions_are_strings_or_objects() {
        assert_eq!(question(br#"{"question": "Who?", "id": 3}"#).unwrap(), "Who?");
        assert_eq!(question(b"\"Who?\"\r").unwrap(), "Who?");
        for (line, part) in [
            (&br#"{"q": "Who?"}"#[..], "found an object without it"),
            (br#"{"question": 7}"#, "found a number as `question`"),
            (br#"{"question": null}"#, "found null as `question`"),
            (br#"["Who?"]"#, "found a list"),
            (b"  ", "found an empty line"),
            (b"Who?", "found no JSON at column 1"),
            (b"\"caf\xe9\"", "found no JSON at column "),
        ] {
            let error = question(line).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        // Who types needs no JSON, and may use it.
        for line in ["Who?", " Who? \r", "{\"question\": \"Who?\"}", "\"Who?\""] {
            assert_eq!(typed_question(line.as_bytes()).unwrap(), "Who?");
        }
        assert!(typed_question(b"{Who?").is_err() && typed_question(b"\xe9").is_err());
    }
}
