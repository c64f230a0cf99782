//! stdout: results, and how a command ends if the reader closes the pipe or the disk is full.
//!
//! The only place that writes to stdout; `print!` would panic where this returns an error. stderr is
//! `terminal`'s.

use std::fmt;
use std::io::{self, ErrorKind, Write};

use anyhow::{Error, Result};
use pkv_core::{hinted, neutral};
use serde::Serialize;

use crate::terminal;

/// stdout takes no more.
#[derive(Debug)]
pub enum Lost {
    /// The reader closed it, as `head` does: no reader is left for a message.
    Closed,
    /// It could not be written.
    Failed(io::Error),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("stdout was closed"),
            Self::Failed(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Lost {}

/// Write `text` and send it off; what a terminal would obey in it is spelt out, in a form that JSON reads
/// back.
///
/// # Errors
/// [`Lost`].
pub fn print(text: &str) -> Result<()> {
    let text = neutral(text);
    let mut out = io::stdout().lock();
    check(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// [`print`]; changes of color and weight in it stay if stdout is a terminal that has them.
///
/// # Errors
/// [`Lost`].
pub fn print_styled(text: &str) -> Result<()> {
    let text = terminal::shown(text, terminal::has_color(&io::stdout()));
    let mut out = io::stdout().lock();
    check(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Write `value` as JSON over several lines.
///
/// # Errors
/// [`Lost`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// JSON with `--json`, else text.
///
/// # Errors
/// [`Lost`].
pub fn print_either(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    if json { print_json(value) } else { print(&text()) }
}

/// The result of another writer to stdout, after a flush.
///
/// # Errors
/// [`Lost`].
pub fn check(written: io::Result<()>) -> Result<()> {
    let lost = match written.and_then(|()| io::stdout().flush()) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => return Err(Lost::Closed.into()),
        Err(e) => Error::from(Lost::Failed(e)),
    };
    Err(lost.context(hinted(
        "cannot write to stdout",
        "free space where stdout goes, or send it elsewhere; what the command made on disk is whole",
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render;

    #[test]
    fn a_closed_stdout_is_quiet_and_a_full_one_is_not() {
        let lost = |kind: ErrorKind| check(Err(kind.into())).unwrap_err();
        let closed = lost(ErrorKind::BrokenPipe).context("cannot print");
        assert_eq!((render::exit_code(&closed), render::error(&closed).as_str()), (render::CLOSED, ""));
        let full = lost(ErrorKind::StorageFull);
        assert_eq!(render::exit_code(&full), render::REPAIRABLE);
        let text = render::error(&full);
        assert!(
            text.starts_with("error: cannot write to stdout\n  Caused by: ")
                && text.contains("hint: free space")
        );
    }
}
