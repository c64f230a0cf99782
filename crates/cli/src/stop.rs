//! Ctrl-C and SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pkv_core::hinted;

/// A flag that Ctrl-C and SIGTERM raise; a second signal, given time to read the first one's answer,
/// ends the process at once.
pub fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    /// `timeout` and some shells send one signal twice: to the process and to its group.
    const SAME: Duration = Duration::from_millis(500);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let mut first = None;
    ctrlc::set_handler(move || {
        let begun = *first.get_or_insert_with(Instant::now);
        if flag.swap(true, Ordering::Relaxed) {
            if begun.elapsed() > SAME {
                // Not `exit`: libtorch's threads are at work, and its destructors would free what they use.
                // SAFETY: `_exit` ends the process without running anything of it.
                unsafe { libc::_exit(crate::render::INTERRUPTED.into()) }
            }
            return;
        }
        tracing::warn!("stopping after the current example or step; once more to stop at once");
    })
    .with_context(|| {
        hinted("cannot catch Ctrl-C", "run outside of a sandbox that forbids signal handlers")
    })?;
    Ok(stop)
}
