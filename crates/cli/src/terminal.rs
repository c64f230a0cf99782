//! stderr: progress bars and log lines that do not overwrite each other.
//!
//! Bars are hidden when stderr is no terminal; log lines then carry the progress.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use pkv_core::{Progress, neutral};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

static BARS: OnceLock<MultiProgress> = OnceLock::new();
static LOG_FILE: OnceLock<Mutex<File>> = OnceLock::new();
/// That a line could not be written was said.
static LOG_FAILED: AtomicBool = AtomicBool::new(false);

fn bars() -> &'static MultiProgress {
    BARS.get_or_init(MultiProgress::new)
}

/// Send `tracing` events to stderr, and to `log.jsonl` once [`log_to`] has named it.
///
/// `verbose` 0 shows information, 1 details, 2 everything; `RUST_LOG` overrides it, but for the HTTP client's
/// own log: the headers and addresses in it may repeat a token.
pub fn init_logs(verbose: u8) {
    let level = ["info", "debug", "trace"][usize::from(verbose.min(2))];
    let ours =
        format!("warn,proxykv_train={level},{}", OUR_CRATES.map(|c| format!("pkv_{c}={level}")).join(","));
    let filter = ["ureq=warn", "ureq_proto=warn", "rustls=warn"]
        .iter()
        .fold(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(ours)), |filter, quiet| {
            filter.add_directive(quiet.parse().expect("the directives are constant"))
        });
    let terminal =
        fmt::layer().with_writer(Stderr).with_target(false).with_ansi(color()).compact().without_time();
    let file = fmt::layer().json().with_writer(LogFile);
    tracing_subscriber::registry().with(filter).with(terminal).with(file).init();
}

const OUR_CRATES: [&str; 16] = [
    "shard",
    "gpu",
    "hub",
    "lm",
    "mapper",
    "data",
    "score",
    "extract",
    "prune",
    "checkpoint",
    "train",
    "eval",
    "run",
    "infer",
    "report",
    "cli",
];

/// Append log lines, one JSON object each, to `path` from now on.
///
/// # Errors
/// The file cannot be opened for writing.
pub fn log_to(path: &Path) -> Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open log file `{}`", path.display()))?;
    let _ = LOG_FILE.set(Mutex::new(file));
    Ok(())
}

fn color() -> bool {
    use std::io::IsTerminal;
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// A log line as a terminal may have it: values in it are of others. With `color`, changes of color stay.
fn shown(line: &str, color: bool) -> String {
    let is_color = |rest: &str| {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != ';')?;
        rest[end..].starts_with('m').then_some(end + 1)
    };
    let mut pieces = line.split("\u{1b}[");
    let mut out = neutral(pieces.next().unwrap_or_default()).into_owned();
    for piece in pieces {
        let kept = is_color(piece).filter(|_| color).unwrap_or(0);
        out.push_str(if kept > 0 { "\u{1b}[" } else { "\\u001b[" });
        out.push_str(&piece[..kept]);
        out.push_str(&neutral(&piece[kept..]));
    }
    out
}

/// Text on stderr. If stderr is closed or full, there is no other place for it.
pub fn print(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Writes above the bars, and never fails: the work continues without its log.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let text = shown(&String::from_utf8_lossy(buf), color());
        let _ = bars().suspend(|| io::stderr().write_all(text.as_bytes()));
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        Self
    }
}

/// Writes to the log file, or nowhere before there is one.
struct LogFile;

impl Write for LogFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match LOG_FILE.get() {
            // A log line that cannot be written (disk full) must not stop the work that it is about.
            Some(file) => {
                if let Ok(mut file) = file.lock()
                    && let Err(e) = file.write_all(buf)
                    && !LOG_FAILED.swap(true, Ordering::Relaxed)
                {
                    // Past the log, which this is a part of.
                    let lost = format!(
                        " WARN cannot write the log file `log.jsonl`: {e}; lines are missing in it\n"
                    );
                    bars().suspend(|| print(&lost));
                }
                Ok(buf.len())
            }
            None => Ok(buf.len()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        Self
    }
}

/// One bar at a time, named by its stage.
pub struct Bar {
    current: Mutex<Option<(ProgressBar, Quiet)>>,
}

/// Progress of a bar that no terminal shows, for a log line now and then.
struct Quiet {
    what: String,
    total: u64,
    done: u64,
    logged: Instant,
}

/// Without a terminal, progress is logged this often.
const TELL_EVERY: Duration = Duration::from_secs(30);

impl Bar {
    pub const fn new() -> Self {
        Self { current: Mutex::new(None) }
    }

    fn with(&self, f: impl FnOnce(&mut (ProgressBar, Quiet))) {
        if let Ok(mut guard) = self.current.lock()
            && let Some(current) = guard.as_mut()
        {
            f(current);
        }
    }
}

impl Progress for Bar {
    fn start(&self, what: &str, total: u64, done: u64) {
        let style =
            ProgressStyle::with_template("{prefix:>16} {bar:28} {pos}/{len} {per_sec} ETA {eta} {msg}")
                .expect("the template is constant");
        let bar = bars().add(ProgressBar::new(total).with_style(style).with_position(done));
        bar.set_prefix(neutral(what).into_owned());
        bar.reset_eta();
        let quiet = Quiet { what: what.to_owned(), total, done, logged: Instant::now() };
        if let Ok(mut guard) = self.current.lock() {
            *guard = Some((bar, quiet));
        }
    }

    fn advance(&self, units: u64) {
        self.with(|(bar, quiet)| {
            bar.inc(units);
            quiet.done += units;
            if bar.is_hidden() && quiet.logged.elapsed() > TELL_EVERY {
                quiet.logged = Instant::now();
                tracing::info!("{}: {} of {}", quiet.what, quiet.done, quiet.total);
            }
        });
    }

    fn note(&self, text: &str) {
        self.with(|(bar, _)| bar.set_message(neutral(text).into_owned()));
    }

    fn finish(&self) {
        if let Ok(mut guard) = self.current.lock()
            && let Some((bar, _)) = guard.take()
        {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_log_lines_cannot_steer_the_terminal() {
        let line = "\u{1b}[32m INFO\u{1b}[0m loaded folder=\u{1b}]0;x\u{7}\u{1b}[2J\u{9b}1m a\tb\n";
        let plain = shown(line, false);
        assert_eq!(
            plain,
            "\\u001b[32m INFO\\u001b[0m loaded folder=\\u001b]0;x\\u0007\\u001b[2J\\u009b1m a\tb\n"
        );
        let colored = shown(line, true);
        assert_eq!(
            colored,
            "\u{1b}[32m INFO\u{1b}[0m loaded folder=\\u001b]0;x\\u0007\\u001b[2J\\u009b1m a\tb\n"
        );
        assert_eq!(shown("plain\n", true), "plain\n");
    }
}
