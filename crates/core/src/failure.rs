//! Kinds of failure, and the exit code of each.
//!
//! The kind is stated where an error is made, by type alone: [`Interrupted`], [`ClosedPipe`], the operating
//! system's errors, and the kind of a [`Hinted`], which is [`FailureKind::Input`] unless its author says
//! otherwise. The innermost statement holds, so that no context changes the kind of a cause that has one. A
//! cause without one is unexpected, unless the code above it states what failed. The text of a hint decides
//! nothing.

use std::io::{self, ErrorKind};

use anyhow::Error;

use crate::{Hinted, Interrupted};

/// Who can do something about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The user, by other input: a file, a setting or a value was refused.
    Input,
    /// The user, by another command line.
    Usage,
    /// The machine's owner: memory, disk, device, network, or another process was in the way.
    Environment,
    /// The authors: what should not happen.
    Internal,
    /// The user stopped the work.
    Interrupted,
    /// The reader of stdout wants no more.
    ClosedPipe,
}

impl FailureKind {
    pub const ALL: [Self; 6] =
        [Self::Input, Self::Usage, Self::Environment, Self::Internal, Self::Interrupted, Self::ClosedPipe];

    /// As the shell sees it: 130 and 141 are what it reports of a program that SIGINT or SIGPIPE ends.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Input => 1,
            Self::Usage => 2,
            Self::Environment => 4,
            Self::Internal => 5,
            Self::Interrupted => 130,
            Self::ClosedPipe => 141,
        }
    }

    /// For help and documents.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Input => "a file, a setting or a value was refused; the hint says what to change",
            Self::Usage => "the command line is wrong",
            Self::Environment => "memory, disk, device, network or another process was in the way",
            Self::Internal => "an unexpected error; please report it",
            Self::Interrupted => "interrupted; the same command continues the work",
            Self::ClosedPipe => "the reader closed stdout before all was written",
        }
    }

    /// The kind of an error: its innermost cause of a known type decides.
    pub fn of(error: &Error) -> Self {
        if error.downcast_ref::<Interrupted>().is_some() {
            return Self::Interrupted;
        }
        if error.downcast_ref::<ClosedPipe>().is_some() {
            return Self::ClosedPipe;
        }
        let of_cause = |cause: &(dyn std::error::Error + 'static)| {
            let hinted = || cause.downcast_ref::<Hinted>().map(Hinted::kind);
            cause.downcast_ref::<io::Error>().and_then(of_system).or_else(hinted)
        };
        let known = error.chain().filter_map(of_cause).last();
        // A hinted context is no cause of its own in the chain.
        known.or_else(|| error.downcast_ref::<Hinted>().map(Hinted::kind)).unwrap_or(Self::Internal)
    }
}

/// Files that are absent or hold something else are input; whatever else the system refuses is not.
fn of_system(error: &io::Error) -> Option<FailureKind> {
    match error.kind() {
        ErrorKind::NotFound
        | ErrorKind::InvalidData
        | ErrorKind::InvalidInput
        | ErrorKind::IsADirectory
        | ErrorKind::NotADirectory
        | ErrorKind::AlreadyExists
        | ErrorKind::UnexpectedEof
        | ErrorKind::FileTooLarge => Some(FailureKind::Input),
        _ => error.raw_os_error().map(|_| FailureKind::Environment),
    }
}

/// The reader of stdout closed it, as `head` does: no reader is left for a message.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("stdout was closed")]
pub struct ClosedPipe;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hinted;
    use anyhow::anyhow;

    #[test]
    fn types_decide_and_hints_do_not() {
        let system = |number| Error::from(io::Error::from_raw_os_error(number));
        let (missing, full) = (2, 28);
        let by_hint = |e: Error| e.context(hinted("cannot read `x`", "put it back"));
        for (error, kind) in [
            (anyhow!("a bug"), FailureKind::Internal),
            (Error::from(io::Error::other("a bug")), FailureKind::Internal),
            (hinted("no", "other").into(), FailureKind::Input),
            (Error::from(hinted("full", "free")).context("cannot label"), FailureKind::Input),
            (hinted("full", "free").environment().into(), FailureKind::Environment),
            (
                Error::from(hinted("full", "free").environment()).context("cannot label"),
                FailureKind::Environment,
            ),
            (by_hint(hinted("full", "free").environment().into()), FailureKind::Environment),
            // What has no kind takes that of the statement above it, whichever it is.
            (by_hint(anyhow!("expected 4 bytes, found 3")), FailureKind::Input),
            (
                anyhow!("a bug").context(hinted("x", "report it").of(FailureKind::Internal)),
                FailureKind::Internal,
            ),
            (
                by_hint(Error::from(hinted("a bug", "report it").of(FailureKind::Internal))),
                FailureKind::Internal,
            ),
            (
                anyhow!("status 503").context(hinted("no answer", "wait").environment()),
                FailureKind::Environment,
            ),
            (system(missing), FailureKind::Input),
            (by_hint(system(missing)), FailureKind::Input),
            (system(full), FailureKind::Environment),
            (by_hint(system(full)), FailureKind::Environment),
            (by_hint(io::Error::other("its reader gave up").into()), FailureKind::Input),
            (Error::from(Interrupted).context("cannot label"), FailureKind::Interrupted),
            (by_hint(Interrupted.into()), FailureKind::Interrupted),
            (by_hint(ClosedPipe.into()), FailureKind::ClosedPipe),
        ] {
            assert_eq!(FailureKind::of(&error), kind, "{error:#}");
        }
    }

    #[test]
    fn every_kind_has_a_code_of_its_own() {
        let mut codes = FailureKind::ALL.map(FailureKind::exit_code).to_vec();
        codes.sort_unstable();
        codes.dedup();
        // 0 is success, 3 an answer without pruning.
        assert!(codes.len() == FailureKind::ALL.len() && !codes.contains(&0) && !codes.contains(&3));
    }
}
