//! Cancellation: the flag that a signal raises, and the error of work that ended because of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Cancellation flag of a command. Clones share it; work checks it between units that it can continue from.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Flag>);

#[derive(Debug, Default)]
struct Flag {
    requested: AtomicBool,
    /// Checks that pass before the flag raises itself.
    allowed: Option<AtomicI64>,
}

impl Stop {
    /// A flag that raises itself after `checks` checks: interrupts work at any place where it can stop.
    pub fn after(checks: u64) -> Self {
        Self(Arc::new(Flag { allowed: Some((checks as i64).into()), ..Flag::default() }))
    }

    /// Ask the work to stop.
    pub fn request(&self) {
        self.0.requested.store(true, Ordering::Relaxed);
    }

    pub fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Interrupted`] if the work was asked to stop.
    pub fn check(&self) -> Result<(), Interrupted> {
        if let Some(allowed) = &self.0.allowed
            && allowed.fetch_sub(1, Ordering::Relaxed) <= 0
        {
            self.request();
        }
        if self.is_requested() { Err(Interrupted) } else { Ok(()) }
    }
}

/// The work was stopped by the user; what was done is on disk.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted; what was finished is on disk, and the same command goes on from it")]
pub struct Interrupted;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reaches_every_clone() {
        let stop = Stop::default();
        let other = stop.clone();
        assert!(other.check().is_ok() && !other.is_requested());
        stop.request();
        assert!(other.is_requested());
        assert_eq!(other.check().unwrap_err().to_string(), Interrupted.to_string());
    }

    #[test]
    fn a_flag_may_raise_itself() {
        let stop = Stop::after(2);
        assert_eq!([(); 4].map(|()| stop.check().is_ok()), [true, true, false, false]);
        assert!(stop.is_requested());
    }
}
