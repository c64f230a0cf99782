//! stderr: progress bars and log lines that do not overwrite each other.
//!
//! Bars are hidden when stderr is no terminal; log lines then carry the progress.

use std::ffi::OsStr;
use std::fmt as text;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use pkv_core::{Progress, SHOWN_BY_BARS, neutral};
use pkv_recipe::plan::human_bytes;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

use crate::wrapped::wrapped;

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
/// own log, since the headers and addresses in it may repeat a token, and for the tokenizer's several lines
/// for each letter of a document.
pub fn init_logs(verbose: u8) {
    let level = ["info", "debug", "trace"][usize::from(verbose.min(2))];
    // All of this project's crates begin with `pkv_`.
    let ours = format!("warn,proxykv_train={level},pkv_={level}");
    let filter = ["ureq=warn", "ureq_proto=warn", "rustls=warn", "tokenizers=debug"]
        .iter()
        .fold(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(ours)), |filter, quiet| {
            filter.add_directive(quiet.parse().expect("the directives are constant"))
        });
    let is_quiet = verbose == 0 && io::stderr().is_terminal();
    let terminal = fmt::layer().with_writer(Stderr).with_target(false).with_ansi(color()).compact();
    let terminal =
        terminal.without_time().with_filter(filter_fn(move |of| !is_quiet || of.target() != SHOWN_BY_BARS));
    let file = fmt::layer().json().with_writer(LogFile);
    tracing_subscriber::registry().with(filter).with(terminal).with(file).init();
}

/// Append log lines, one JSON object each, to `path` from now on. Where this user may not write they go to
/// stderr alone: a run of others can be looked at.
///
/// # Errors
/// The file cannot be opened for writing.
pub fn log_to(path: &Path) -> Result<()> {
    // A pipe that no one reads is an error, and not waited for.
    match File::options().create(true).append(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            tracing::warn!("cannot open log file `{}`: {e}", path.display());
        }
        file => {
            let file = file.with_context(|| format!("cannot open log file `{}`", path.display()))?;
            let _ = LOG_FILE.set(Mutex::new(file));
        }
    }
    Ok(())
}

fn color() -> bool {
    has_color(&io::stderr())
}

/// Whether text there may have colors and bold letters.
pub fn has_color(stream: &impl IsTerminal) -> bool {
    let of = |name| std::env::var_os(name).unwrap_or_default();
    stream.is_terminal() && wants_color(&of("NO_COLOR"), &of("TERM"))
}

/// `NO_COLOR` as no-color.org has it: any text forbids colors.
fn wants_color(no_color: &OsStr, term: &OsStr) -> bool {
    no_color.is_empty() && term != "dumb"
}

/// Text as a terminal may have it: values in it are of others. With `color`, changes of color stay.
pub fn shown(line: &str, color: bool) -> String {
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

/// Columns of the terminal that `stream` is, if it is one.
pub fn width(stream: &impl IsTerminal, term: &console::Term) -> Option<usize> {
    let columns = || term.size_checked().map(|(_, columns)| usize::from(columns));
    stream.is_terminal().then(columns).flatten().filter(|&columns| columns >= 20)
}

/// Text for stderr, its lines broken where a terminal would break them in the middle of a word.
pub fn fitted(text: &str) -> String {
    let columns = width(&io::stderr(), &console::Term::stderr());
    columns.map_or_else(|| text.to_owned(), |columns| wrapped(text, columns, INDENT))
}

/// As far as ` INFO ` goes.
const INDENT: usize = 6;

/// Text on stderr. If stderr is closed or full, there is no other place for it.
pub fn print(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A line on stderr, above the bars.
pub fn print_line(line: &str) {
    let text = fitted(&format!("{}\n", shown(line, color())));
    bars().suspend(|| print(&text));
}

/// Writes above the bars, and never fails: the work continues without its log.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let text = fitted(&shown(&String::from_utf8_lossy(buf), color()));
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

/// The stage at work: its place, how many there are, its name. Outside of `run` there is none.
static STAGE: Mutex<Option<(usize, usize, &'static str)>> = Mutex::new(None);

/// Name the stage that the bars from now on belong to, the first one being 1.
pub fn stage(at: usize, of: usize, name: &'static str) {
    if let Ok(mut stage) = STAGE.lock() {
        *stage = Some((at, of, name));
    }
}

/// One bar at a time, on two lines that fit 80 columns.
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
/// The elapsed time is drawn this often where nothing else changes.
const TICK: Duration = Duration::from_secs(1);
/// Of a bar's title, so that its counts fit beside it.
const TITLE: usize = 48;

/// What a bar counts, in the singular; `B` for bytes.
fn unit(what: &str) -> &'static str {
    match what.split(' ').next() {
        Some("downloading" | "verifying" | "sending") => "B",
        Some("train") => "step",
        Some("sweep") => "run",
        _ => "context",
    }
}

/// `[2 of 7] label`; the stage's name is not said twice.
fn title(stage: Option<(usize, usize, &str)>, what: &str) -> String {
    let title = match stage {
        Some((at, of, name)) if what.starts_with(name) => format!("[{at} of {of}] {what}"),
        Some((at, of, name)) => format!("[{at} of {of}] {name}: {what}"),
        None => what.to_owned(),
    };
    let title = neutral(&title).into_owned();
    if title.chars().count() <= TITLE {
        return title;
    }
    title.chars().take(TITLE - 1).chain(['…']).collect()
}

/// `82 of 208 contexts`; the total is not always known.
fn count(done: u64, total: Option<u64>, unit: &str) -> String {
    let total = total.filter(|&n| n > 0);
    match unit {
        "B" => total
            .map_or_else(|| human_bytes(done), |n| format!("{} of {}", human_bytes(done), human_bytes(n))),
        _ => {
            total.map_or_else(|| format!("{done} {unit}s"), |n| format!("{done} of {n} {unit}{}", plural(n)))
        }
    }
}

fn plural(n: u64) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// `6.2 contexts/s`, or `3.4 s per context` where that is the longer of the two.
fn rate(per_sec: f64, unit: &str) -> String {
    let three = |v: f64| format!("{v:.*}", (2.0 - v.log10().floor()).clamp(0.0, 2.0) as usize);
    match unit {
        _ if !(per_sec > 0.0 && per_sec.is_finite()) => String::new(),
        "B" => format!("{}/s", human_bytes(per_sec as u64)),
        _ if per_sec < 1.0 => format!("{} s per {unit}", three(1.0 / per_sec)),
        _ => format!("{} {unit}s/s", three(per_sec)),
    }
}

/// `0:42`, `1:02:03`.
fn clock(time: Duration) -> String {
    let secs = time.as_secs();
    let (hours, minutes, secs) = (secs / 3600, secs / 60 % 60, secs % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{secs:02}") } else { format!("{minutes}:{secs:02}") }
}

fn style(unit: &'static str) -> ProgressStyle {
    let counts = move |s: &ProgressState, w: &mut dyn text::Write| {
        let _ = w.write_str(&count(s.pos(), s.len(), unit));
    };
    let pace = move |s: &ProgressState, w: &mut dyn text::Write| {
        let (rate, elapsed) = (rate(s.per_sec(), unit), clock(s.elapsed()));
        let _ = match (rate.as_str(), s.len()) {
            ("", _) => write!(w, "{elapsed} elapsed"),
            (_, Some(n)) if n > s.pos() => write!(w, "{rate}, {elapsed} elapsed, {} left", clock(s.eta())),
            _ => write!(w, "{rate}, {elapsed} elapsed"),
        };
    };
    ProgressStyle::with_template("{prefix}: {counts}  {wide_msg}\n{bar:22} {percent:>3}%  {pace}")
        .expect("the template is constant")
        .with_key("counts", counts)
        .with_key("pace", pace)
}

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
        let bar = bars().add(ProgressBar::new(total).with_style(style(unit(what))).with_position(done));
        bar.set_prefix(title(STAGE.lock().ok().and_then(|stage| *stage), what));
        bar.reset_eta();
        if !bar.is_hidden() {
            bar.enable_steady_tick(TICK);
        }
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
    use indicatif::{ProgressDrawTarget, TermLike};
    use std::sync::Arc;

    use super::*;

    /// What is drawn on a terminal of 80 columns, without the moves of its cursor.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<String>>);

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(&format!("{text}\n"))
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_takes_two_lines_of_80_columns() {
        let long = "downloading model-00001-of-00004-with-a-long-name.safetensors";
        for (stage, what, total, done, expected) in [
            (Some((2, 7, "label")), "label", 208, 82, "[2 of 7] label: 82 of 208 contexts  loss 0.553"),
            (Some((4, 7, "train")), "train", 1, 0, "[4 of 7] train: 0 of 1 step  loss 0.553"),
            (Some((5, 7, "eval")), "worked example", 2, 1, "[5 of 7] eval: worked example: 1 of 2 contexts"),
            (None, long, 4_980_000_000, 1_230_000_000, "-long-na…: 1.23 GB of 4.98 GB"),
            (None, "verifying x", 0, 1_230_000, "verifying x: 1.23 MB  loss"),
        ] {
            let term = Screen::default();
            let target = ProgressDrawTarget::term_like(Box::new(term.clone()));
            let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style(unit(what)));
            bar.set_prefix(title(stage, what));
            bar.set_message("loss 0.553, 3643 tokens/s, best 55.1%, auto, and more than fits on the line");
            bar.set_position(done);
            term.0.lock().unwrap().clear();
            bar.tick();
            let shown = term.0.lock().unwrap().clone();
            // Each line is filled to the terminal's width.
            let letters: Vec<char> = shown.chars().collect();
            let lines: Vec<String> = letters.chunks(80).map(|line| line.iter().collect()).collect();
            assert_eq!(letters.len(), 160, "{shown}");
            assert!(lines[0].contains(expected), "{shown}");
            assert!(lines[1].contains("% ") && lines[1].contains(" elapsed"), "{shown}");
        }
    }

    #[test]
    fn paces_have_three_digits_and_their_unit() {
        assert_eq!(rate(6.2028, "context"), "6.20 contexts/s");
        assert_eq!(rate(362.8, "step"), "363 steps/s");
        assert_eq!(rate(0.05, "context"), "20.0 s per context");
        assert_eq!(rate(12_345_678.0, "B"), "12.3 MB/s");
        assert_eq!((rate(0.0, "step"), rate(f64::INFINITY, "step")), (String::new(), String::new()));
        assert_eq!(clock(Duration::from_secs(42)), "0:42");
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03");
        // The longest second line.
        let (rate, time) = (rate(0.0101, "context"), clock(Duration::from_secs(35_999)));
        let line = format!("{:22} 100%  {rate}, {time} elapsed, {time} left", "");
        assert!(line.len() <= 80, "{line}");
    }

    #[test]
    fn colors_follow_the_environment() {
        let wants = |no_color: &str, term: &str| wants_color(OsStr::new(no_color), OsStr::new(term));
        assert!(wants("", "xterm-256color") && wants("", ""));
        assert!(!wants("1", "xterm") && !wants("", "dumb"));
    }

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
