//! The interface by which a stage reports its progress.

/// Target of log lines that a terminal's bar has as well, such as a step's loss.
pub const SHOWN_BY_BARS: &str = "pkv_bars";

/// Receives the progress of one stage. Methods are cheap and never fail.
pub trait Progress: Sync {
    /// Work begins: `what` in a few words, `total` units of it, of which `done` are already there.
    fn start(&self, what: &str, total: u64, done: u64);
    /// `units` more are done.
    fn advance(&self, units: u64);
    /// `units` more are done, by another process.
    fn elsewhere(&self, units: u64) {
        self.advance(units);
    }
    /// A short line about the current state (loss, tokens per second), replacing the last one.
    fn note(&self, text: &str);
    /// The work begun last is over.
    fn finish(&self);
}

/// Progress that is not shown.
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _: &str, _: u64, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}
