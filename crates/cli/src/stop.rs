//! Ctrl-C and SIGTERM.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pkv_core::{FailureKind, Stop, hinted};

/// A flag that Ctrl-C and SIGTERM raise; a second signal, given time to read the first one's answer,
/// ends the process at once.
pub fn stop_on_signal() -> Result<Stop> {
    /// `timeout` and some shells send one signal twice: to the process and to its group.
    const SAME: Duration = Duration::from_millis(500);
    let stop = Stop::default();
    let flag = stop.clone();
    let mut first = None;
    // SAFETY: the previous handler is read, and `SIG_IGN` is none of ours.
    let hangups_are_ignored = unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) } == libc::SIG_IGN;
    ctrlc::set_handler(move || {
        let begun = *first.get_or_insert_with(Instant::now);
        let again = flag.is_requested();
        flag.request();
        if again {
            if begun.elapsed() > SAME {
                // Not `exit`: libtorch's threads are at work, and its destructors would free what they use.
                // SAFETY: `_exit` ends the process without running anything of it.
                unsafe { libc::_exit(FailureKind::Interrupted.exit_code().into()) }
            }
            return;
        }
        tracing::warn!("stopping after the current example or step; once more to stop at once");
    })
    .with_context(|| {
        hinted("cannot catch Ctrl-C", "run outside of a sandbox that forbids signal handlers").environment()
    })?;
    if hangups_are_ignored {
        // As `nohup` wants it: the terminal may be closed.
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    }
    Ok(stop)
}
