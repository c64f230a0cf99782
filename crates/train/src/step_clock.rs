//! Time per step, without validations and checkpoints.

use std::time::{Duration, Instant};

/// Time and tokens of training steps.
pub struct StepClock {
    /// When the last step or other work ended.
    last: Instant,
    /// Since the last log line.
    window: Duration,
    tokens: u64,
    steps: u64,
    /// Of this run.
    total: Duration,
}

impl StepClock {
    pub fn new() -> Self {
        let zero = Duration::ZERO;
        Self { last: Instant::now(), window: zero, tokens: 0, steps: 0, total: zero }
    }

    /// A step of `tokens` positions has ended.
    pub fn step(&mut self, tokens: u64) {
        let took = self.last.elapsed();
        self.window += took;
        self.total += took;
        self.tokens += tokens;
        self.steps += 1;
        self.last = Instant::now();
    }

    /// Other work has ended; its time does not count.
    pub fn pause(&mut self) {
        self.last = Instant::now();
    }

    /// All steps together.
    pub fn total(&self) -> Duration {
        self.total
    }

    /// Milliseconds per step and tokens per second since the last call.
    pub fn take(&mut self) -> (f64, f64) {
        let secs = self.window.as_secs_f64();
        let (steps, tokens) = (self.steps, self.tokens);
        (self.window, self.steps, self.tokens) = (Duration::ZERO, 0, 0);
        (secs * 1e3 / steps.max(1) as f64, tokens as f64 / secs.max(1e-9))
    }
}

/// `1h 02m`, `3m 20s`, `45s`.
pub fn clock_text(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        3600.. => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        60.. => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        let text = |s| clock_text(Duration::from_secs(s));
        assert_eq!([text(0), text(59), text(200), text(3725)], ["0s", "59s", "3m 20s", "1h 02m"]);
    }
}
