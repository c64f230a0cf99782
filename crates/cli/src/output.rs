//! stdout: results, and how a command ends if the reader closes the pipe or the disk is full.
//!
//! The only place that writes to stdout; `print!` would panic where this returns an error. stderr is
//! `terminal`'s.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};
use pkv_core::{ClosedPipe, hinted, neutral};
use serde::Serialize;

use crate::terminal;

/// Write `text` and send it off; what a terminal would obey in it is spelt out, in a form that JSON reads
/// back.
///
/// # Errors
/// The reader closed stdout ([`ClosedPipe`]), or it cannot be written.
pub fn print(text: &str) -> Result<()> {
    let text = neutral(text);
    let mut out = io::stdout().lock();
    check(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// [`print()`]; changes of color and weight in it stay if stdout is a terminal that has them.
///
/// # Errors
/// The reader closed stdout ([`ClosedPipe`]), or it cannot be written.
pub fn print_styled(text: &str) -> Result<()> {
    let text = terminal::shown(text, terminal::has_color(&io::stdout()));
    let mut out = io::stdout().lock();
    check(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Write `value` as JSON over several lines.
///
/// # Errors
/// The reader closed stdout ([`ClosedPipe`]), or it cannot be written.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// JSON with `--json`, else text.
///
/// # Errors
/// The reader closed stdout ([`ClosedPipe`]), or it cannot be written.
pub fn print_either(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    if json { print_json(value) } else { print(&text()) }
}

/// The result of another writer to stdout, after a flush.
///
/// # Errors
/// The reader closed stdout ([`ClosedPipe`]), or it cannot be written.
pub fn check(written: io::Result<()>) -> Result<()> {
    match written.and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(ClosedPipe.into()),
        written => written.with_context(|| {
            hinted(
                "cannot write to stdout",
                "free space where stdout goes, or send it elsewhere; what the command made on disk is whole",
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use pkv_core::FailureKind;

    use super::*;
    use crate::render;

    #[test]
    fn a_closed_stdout_is_quiet_and_a_full_one_is_not() {
        let closed = check(Err(ErrorKind::BrokenPipe.into())).unwrap_err().context("cannot print");
        assert_eq!(
            (FailureKind::of(&closed), render::error(&closed).as_str()),
            (FailureKind::ClosedPipe, "")
        );
        let full = check(Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap_err();
        assert_eq!(FailureKind::of(&full), FailureKind::Environment);
        let text = render::error(&full);
        assert!(
            text.starts_with("error: cannot write to stdout\n  Caused by: ")
                && text.contains("hint: free space")
        );
    }
}
