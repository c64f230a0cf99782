//! Formatting of errors on the terminal.

use std::borrow::Cow;
use std::fmt::Write;
use std::io::{self, ErrorKind};

use anyhow::Error;
use pkv_core::{FailureKind, Hinted, Interrupted, neutral};

/// `error: …`, one `Caused by: …` per cause, an empty line, `hint: …`; after an interruption one line that
/// says how to go on; empty if stdout's reader closed the pipe.
pub fn error(e: &Error) -> String {
    let mut out = String::new();
    if FailureKind::of(e) == FailureKind::ClosedPipe {
        return out;
    }
    // What the user asked for is no error.
    if let Some(interrupted) = e.downcast_ref::<Interrupted>() {
        return format!("{interrupted}\n");
    }
    let mut last = String::new();
    for (i, cause) in e.chain().enumerate() {
        // A library may repeat its source's text as its own; once is enough.
        let text = cause.to_string();
        let text = text.trim_end();
        if text == last {
            continue;
        }
        let text_indented = text.lines().map(shortened).collect::<Vec<_>>().join("\n    ");
        let _ = if i == 0 {
            writeln!(out, "error: {text_indented}")
        } else {
            writeln!(out, "  Caused by: {text_indented}")
        };
        last = text.to_owned();
    }
    if let Some(hint) = hint(e) {
        let _ = write!(out, "\nhint: {hint}\n");
    }
    // Names and texts of others are in it.
    neutral(&out).into_owned()
}

/// A line of which a terminal shows all that helps: a damaged file's may have millions of characters.
fn shortened(line: &str) -> Cow<'_, str> {
    const LONGEST: usize = 500;
    line.char_indices().nth(LONGEST).map_or(Cow::Borrowed(line), |(end, _)| {
        Cow::Owned(format!("{}... ({} characters)", &line[..end], line.chars().count()))
    })
}

/// The outermost hint of the chain.
pub fn hint(e: &Error) -> Option<&str> {
    Hinted::find(e).map(Hinted::hint).or_else(|| system_hint(e))
}

/// What repairs a failed call of the system, or a file that holds no text, that nothing closer to it has a
/// hint for.
fn system_hint(e: &Error) -> Option<&'static str> {
    let error = e.chain().find_map(|cause| cause.downcast_ref::<io::Error>())?;
    let Some(number) = error.raw_os_error() else {
        let wrong = [
            ErrorKind::InvalidData,
            ErrorKind::FileTooLarge,
            ErrorKind::IsADirectory,
            ErrorKind::InvalidInput,
        ];
        return wrong.contains(&error.kind()).then_some(
            "the file is damaged, or another one lies in its place: put it back from a copy, or make it anew",
        );
    };
    Some(match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space and run the same command again; what is whole is kept"
        }
        ErrorKind::NotFound => {
            "check the path; if another program removed it, keep it out and run the same command again"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "let this user read and write there, or choose another place"
        }
        _ if [libc::EMFILE, libc::ENFILE].contains(&number) => {
            "raise the limit of open files (`ulimit -n 4096`) and run the same command again"
        }
        _ => "check the disk, and run the same command again; what is whole is kept",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};
    use pkv_core::hinted;

    #[test]
    fn names_of_others_cannot_steer_a_terminal() {
        let e = anyhow!("no tensor `\u{1b}]0;owned\u{7}`")
            .context(hinted("cannot read `\u{9b}2J`", "rename `\r`"));
        let text = error(&e);
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        assert!(
            text.contains("no tensor `\\u001b]0;owned\\u0007`") && text.contains("rename `\\u000d`"),
            "{text}"
        );
    }

    #[test]
    fn a_line_of_a_file_is_quoted_as_far_as_it_helps() {
        let text = error(&anyhow!("line 3\n{}\n  ^", "\u{e4}".repeat(70_000)));
        let quoted = format!("error: line 3\n    {}... (70000 characters)\n      ^\n", "\u{e4}".repeat(500));
        assert_eq!(text, quoted);
    }

    #[test]
    fn failed_calls_of_the_system_have_a_hint() {
        for (number, part) in [
            (libc::EIO, "check the disk"),
            (libc::ENOSPC, "free some space"),
            (libc::EMFILE, "ulimit -n"),
            (libc::EACCES, "let this user"),
        ] {
            let e = Error::from(io::Error::from_raw_os_error(number)).context("cannot create folder `x`");
            assert!(error(&e).contains(part) && error(&e).contains("\nhint: "), "{}", error(&e));
            assert_eq!(FailureKind::of(&e), FailureKind::Environment);
            assert_eq!(hint(&e.context(hinted("a", "closer"))), Some("closer"));
        }
        assert_eq!(hint(&Error::from(io::Error::other("a bug"))), None);
        let e = Error::from(io::Error::new(ErrorKind::InvalidData, "invalid utf-8"));
        assert!(hint(&e.context("cannot read `x`")).is_some_and(|h| h.contains("is damaged")));
    }

    #[test]
    fn causes_are_listed_once_and_the_hint_comes_last() {
        let e = Err::<(), _>(anyhow!("expected 4 bytes, found 3"))
            .with_context(|| hinted("cannot read `x`", "run `fetch` again"))
            .context("cannot label")
            .unwrap_err();
        assert_eq!(
            error(&e),
            "error: cannot label\n  Caused by: cannot read `x`\n  Caused by: expected 4 bytes, found 3\n\nhint: run `fetch` again\n"
        );
        let stopped = Error::from(Interrupted).context("cannot label");
        assert!(error(&stopped).starts_with("interrupted; ") && !error(&stopped).contains("error"));
    }
}
