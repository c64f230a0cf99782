//! Errors with a hint how to repair their cause.
//!
//! A [`Hinted`] travels in an `anyhow` chain, as root cause or as context; the command line finds
//! it with `downcast_ref` and prints its hint after the chain. Nothing here prints.

use crate::FailureKind;

/// An error message, and the command or edit that repairs the cause.
///
/// The text of the cause is not repeated in `message`: it travels as `source` or further down
/// the chain.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Hinted {
    message: String,
    hint: String,
    kind: FailureKind,
}

/// Make an error (or an `anyhow` context) with a hint.
///
/// `message` says what was being done to which file, or what was expected and found; lower case,
/// no final period. `hint` is a command or an edit. It states a kind, too: [`FailureKind::Input`], the user
/// can repair it by other input. Where that is not so, say [`Hinted::environment`] or [`Hinted::of`].
///
/// ```
/// use pkv_core::hinted;
///
/// let error = hinted("there is no run folder `runs/x`", "`proxykv-train inspect runs` lists them");
/// assert_eq!(error.to_string(), "there is no run folder `runs/x`");
/// assert!(error.hint().contains("inspect runs"));
/// ```
pub fn hinted(message: impl Into<String>, hint: impl Into<String>) -> Hinted {
    Hinted { message: message.into(), hint: hint.into(), kind: FailureKind::Input }
}

impl Hinted {
    pub fn hint(&self) -> &str {
        &self.hint
    }

    pub const fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The same error, of the kind [`FailureKind::Environment`].
    #[must_use]
    pub fn environment(self) -> Self {
        Self { kind: FailureKind::Environment, ..self }
    }

    /// The same error of another kind.
    #[must_use]
    pub fn of(self, kind: FailureKind) -> Self {
        Self { kind, ..self }
    }

    /// The outermost one of an error's chain.
    pub fn find(error: &anyhow::Error) -> Option<&Self> {
        error.downcast_ref().or_else(|| error.chain().find_map(|cause| cause.downcast_ref()))
    }
}
