//! What is read: a context, and questions from arguments, a file or stdin.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_lm::TextTokenizer;
use serde_json::Value;

use crate::args::InferArgs;

/// `-` is stdin.
fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The context's tokens, without the chat template's prefix.
///
/// # Errors
/// The file cannot be read, is no UTF-8 or no list of ids, or holds nothing.
pub fn context(args: &InferArgs, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    let stdin_twice = |path: &Path| is_stdin(path) && args.question_file.as_deref().is_some_and(is_stdin);
    let tokens = match (&args.context, &args.context_ids) {
        (Some(path), _) | (None, Some(path)) if stdin_twice(path) => bail!(hinted(
            "both context and questions are to come from stdin",
            "give one of them as a file, or the questions as `--question`"
        )),
        (Some(path), _) => tokenizer.encode(&text(path)?)?,
        (None, Some(path)) => serde_json::from_str::<Vec<u32>>(&text(path)?).with_context(|| {
            hinted(
                format!("reading token ids from `{}`", path.display()),
                "expected a JSON list of numbers, such as [12, 7, 4011]",
            )
        })?,
        (None, None) => bail!(hinted("there is no context", "name a text file with `--context`")),
    };
    ensure!(
        !tokens.is_empty(),
        hinted("the context is empty: it has no KV pairs to prune", "give a file with text as `--context`")
    );
    Ok(tokens)
}

fn text(path: &Path) -> Result<String> {
    let reading = || {
        hinted(
            format!("reading the context `{}`", path.display()),
            "the context is a text file in UTF-8, or `-` for stdin",
        )
    };
    if is_stdin(path) {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text).with_context(reading)?;
        return Ok(text);
    }
    fs::read_to_string(path).with_context(reading)
}

/// The questions, those of the arguments first; a file's are read one by one. Those of stdin may be
/// long in coming: waiting for one ends when the user wants to stop.
///
/// # Errors
/// The file cannot be opened.
pub fn questions(
    args: &InferArgs,
    stop: &Arc<AtomicBool>,
) -> Result<Box<dyn Iterator<Item = Result<String>>>> {
    let given = args.questions.clone().into_iter().map(Ok);
    let Some(path) = &args.question_file else { return Ok(Box::new(given)) };
    let lines: Box<dyn Iterator<Item = io::Result<String>>> = if is_stdin(path) {
        Box::new(StdinLines::new(Arc::clone(stop)))
    } else {
        let file = File::open(path).with_context(|| {
            hinted(
                format!("opening the questions `{}`", path.display()),
                "name a file of JSON lines, or ask with `--question`",
            )
        })?;
        Box::new(BufReader::new(file).lines())
    };
    let name = path.display().to_string();
    let asked = lines.enumerate().filter_map(move |(index, line)| match line {
        Ok(line) if line.trim().is_empty() => None,
        Ok(line) => Some(question(&line).with_context(|| {
            hinted(
                format!("reading line {} of the questions `{name}`", index + 1),
                "write one question per line, as {\"question\": \"...\"} or \"...\"",
            )
        })),
        Err(e) => Some(Err(e).with_context(|| format!("reading the questions `{name}`"))),
    });
    Ok(Box::new(given.chain(asked)))
}

/// Lines of stdin, read on another thread: a blocked read does not hear Ctrl-C.
struct StdinLines {
    lines: Receiver<io::Result<String>>,
    stop: Arc<AtomicBool>,
}

impl StdinLines {
    fn new(stop: Arc<AtomicBool>) -> Self {
        let (to, lines) = channel();
        std::thread::spawn(move || {
            for line in io::stdin().lock().lines() {
                if to.send(line).is_err() {
                    return;
                }
            }
        });
        Self { lines, stop }
    }
}

impl Iterator for StdinLines {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.stop.load(Ordering::Relaxed) {
            match self.lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => return Some(line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }
}

fn question(line: &str) -> Result<String> {
    let value: Value = serde_json::from_str(line)?;
    let text = value.as_str().or_else(|| value.get("question").and_then(Value::as_str));
    Ok(text.context("expected a string, or an object with the string `question`")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_strings_or_objects() {
        assert_eq!(question(r#"{"question": "Who?", "id": 3}"#).unwrap(), "Who?");
        assert_eq!(question(r#""Who?""#).unwrap(), "Who?");
        assert!(question(r#"{"q": "Who?"}"#).is_err());
        assert!(question("Who?").is_err());
    }
}
