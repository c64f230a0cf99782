//! `train --feature-workers`: processes that make features while the mapper is trained on them.
//!
//! A worker is this program with the recipe and a socket as its stdin. It loads the models of its sources and
//! answers each row that it is asked for. Which row comes next is the queue's choice, so that a row has the
//! same bits whichever worker makes it, and training the same bytes for any number of them. A worker ends
//! when its socket does, and with the process that started it.

mod queue;
mod wire;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufReader, BufWriter};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use pkv_core::{FailureKind, Source, hinted};
use pkv_gpu::{device_name, kind_on};
use pkv_score::ModelFiles;
use pkv_shard::{FeatureRow, FeatureSource};
use tch::Device;

use self::queue::{Failure, Job, Limits, Queue, RowOf};
use self::wire::{Hello, Message, Why};
use crate::session::Session;
use crate::workers::{Log, how_it_ended, own_program};

/// Rows that a worker has at a time: one that it makes, and one whose features are on their way.
const AT_ONCE: usize = 2;
/// Rows for each worker that are made and not yet read.
const AHEAD: usize = 6;
/// Bytes of rows that are made or at work, of all workers. A row of 8,192 positions, 128 heads and eight
/// channels has 34 MB.
const BYTES: u64 = 4 << 30;
/// How long a worker whose socket has closed may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The workers of a training.
#[derive(Clone, Debug)]
pub struct FeatureWorkers {
    /// What a worker is started with, beside its sources, device and threads.
    pub arguments: Vec<OsString>,
    /// One for each worker.
    pub devices: Vec<Device>,
    /// Show all that the workers log, and not only what concerns every user.
    pub is_verbose: bool,
    /// Shows a line of a worker's log.
    pub print: fn(&str),
}

/// The option that names the sources of a worker.
pub const SOURCES_OPTION: &str = "--make-features";

/// Features of one source, to be made.
pub struct ToMake<'a> {
    pub found: &'a ModelFiles,
    pub rows: u64,
    /// Path at which they would be stored, for messages.
    pub folder: PathBuf,
    /// Hash of their choices.
    pub made: String,
}

/// Workers at work. They end when this is dropped.
#[derive(Debug)]
struct Pool {
    shared: Arc<Shared>,
    keepers: Vec<JoinHandle<()>>,
    begun: Instant,
}

/// What the threads that attend to a worker each have in common.
#[derive(Debug)]
struct Shared {
    workers: FeatureWorkers,
    sources: String,
    hello: Hello,
    threads: i32,
    queue: Queue,
    /// Of each worker: to end it.
    sockets: Mutex<Vec<Option<UnixStream>>>,
    /// Workers that are not given up.
    left: AtomicUsize,
}

/// Start `workers` that make the features of `sources`; each source as training reads it.
///
/// # Errors
/// A worker's device computes in another dtype than this process's.
pub fn start(
    s: &Session,
    workers: &FeatureWorkers,
    sources: &[ToMake],
) -> Result<Vec<Arc<dyn FeatureSource>>> {
    for (source, &device) in
        sources.iter().flat_map(|source| workers.devices.iter().map(move |d| (source, d)))
    {
        let role = source.found.role;
        let (here, there) = (s.kind(role), kind_on(device, s.dtype(role)));
        let role = role.name();
        ensure!(
            here == there,
            hinted(
                format!(
                    "a feature worker on `{}` would compute the {role} in {there:?}, and this process in {here:?}",
                    device_name(device)
                ),
                format!("take workers on devices like `{}`, or set `{role}.dtype`", device_name(s.device))
            )
        );
    }
    let count = workers.devices.len();
    let limits = Limits { samples: AHEAD * count, bytes: BYTES };
    let names: Vec<&str> = sources.iter().map(|source| source.found.role.name()).collect();
    let shared = Arc::new(Shared {
        workers: workers.clone(),
        sources: names.join(","),
        hello: Hello::of(sources.iter().map(|source| source.made.clone())),
        // The bits of a row may depend on it.
        threads: tch::get_num_threads(),
        queue: Queue::new(limits),
        sockets: Mutex::new((0..count).map(|_| None).collect()),
        left: AtomicUsize::new(count),
    });
    let mut pool = Pool { shared, keepers: Vec::new(), begun: Instant::now() };
    for number in 0..count {
        let shared = Arc::clone(&pool.shared);
        let keeper = std::thread::Builder::new().name(format!("feature worker {number}"));
        let keeper = keeper.spawn(move || shared.keep(number)).context("cannot start a thread")?;
        pool.keepers.push(keeper);
    }
    tracing::info!(
        "features of the {} are made by {count} worker{} and not stored",
        names.join(" and the "),
        if count == 1 { "" } else { "s" }
    );
    let pool = Arc::new(pool);
    let one = |(source, of): (usize, &ToMake)| {
        let section = s.recipe.extract.of(of.found.role);
        let heads = of.found.config.shape.total_kv_heads() * section.channels.len();
        let position_bytes = 4 * (heads + section.globals.len()) as u64;
        let (pool, rows, folder) = (Arc::clone(&pool), of.rows, of.folder.clone());
        Arc::new(Made { pool, source, rows, folder, position_bytes }) as Arc<dyn FeatureSource>
    };
    Ok(sources.iter().enumerate().map(one).collect())
}

/// Features of one source, as workers make them.
#[derive(Debug)]
struct Made {
    pool: Arc<Pool>,
    source: usize,
    rows: u64,
    folder: PathBuf,
    position_bytes: u64,
}

impl Made {
    fn of(&self, row: u64, positions: usize) -> RowOf {
        RowOf { source: self.source, row, bytes: self.position_bytes * positions as u64 }
    }
}

impl FeatureSource for Made {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn row(&self, i: u64) -> Result<FeatureRow> {
        // Counted as nothing where it was not expected: its reader takes it at once.
        let row = self.pool.shared.queue.take(self.of(i, 0));
        row.with_context(|| format!("cannot make the features of row {i}"))
    }

    fn expect(&self, i: u64, positions: usize, turn: u64) {
        self.pool.shared.queue.expect(self.of(i, positions), turn);
    }

    fn forget(&self, i: u64) {
        self.pool.shared.queue.forget(self.source, i);
    }

    fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let failure = ("the feature workers were asked to end", "start the same command again");
        self.shared.end(failure.0.to_owned(), failure.1.to_owned(), FailureKind::Internal);
        for socket in self.shared.sockets().iter().flatten() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.keepers.drain(..).for_each(|keeper| drop(keeper.join()));
        let sum = self.shared.queue.sum();
        tracing::info!(
            "{} rows of features by {} workers in {:.1} s, for which readers waited {:.1} s; at most {} rows and {:.1} MB \
             at once",
            sum.rows,
            self.shared.workers.devices.len(),
            self.begun.elapsed().as_secs_f64(),
            sum.waited.as_secs_f64(),
            sum.most.0,
            sum.most.1 as f64 / 1e6
        );
    }
}

/// Why a worker is at its end.
enum End {
    /// It was asked to.
    Asked,
    /// It ended by itself, with the kind that its exit code says.
    Itself { how: String, kind: Option<FailureKind> },
    /// It said what no worker of this training says.
    Refused(Error),
}

impl Shared {
    fn name(&self, number: usize) -> String {
        format!("feature worker {number} on `{}`", device_name(self.workers.devices[number]))
    }

    fn sockets(&self) -> std::sync::MutexGuard<'_, Vec<Option<UnixStream>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, text: String, hint: String, kind: FailureKind) {
        self.queue.end(Failure { text, hint, kind });
    }

    /// Attend to worker `number`, and to the one in its place if it dies. On a thread that lives as long as
    /// the worker: the system ends a process with the thread that started it.
    fn keep(&self, number: usize) {
        const HINT: &str =
            "see `log.jsonl` in the run folder; the same command goes on from the last checkpoint";
        for is_second in [false, true] {
            let (end, tail) = match self.attend(number) {
                Ok(ended) => ended,
                Err(e) => (End::Refused(e), String::new()),
            };
            if matches!(end, End::Asked) || self.queue.has_ended() {
                return;
            }
            let name = self.name(number);
            let (text, kind) = match end {
                End::Refused(e) => {
                    let hint = pkv_core::Hinted::find(&e).map_or(HINT, pkv_core::Hinted::hint).to_owned();
                    return self.end(format!("{name}: {e:#}"), hint, FailureKind::of(&e));
                }
                End::Itself { how, kind } => (format!("{name} {how}"), kind),
                End::Asked => return,
            };
            let lines = if tail.is_empty() { String::new() } else { format!("; its last lines:{tail}") };
            if let Some(kind @ (FailureKind::Input | FailureKind::Usage)) = kind {
                return self.end(format!("{text}{lines}"), HINT.to_owned(), kind);
            }
            if !is_second {
                tracing::warn!("{text}, and is replaced");
                continue;
            }
            let text = format!("{text}, as the one before it did not end well{lines}");
            match self.left.fetch_sub(1, Ordering::SeqCst) - 1 {
                0 => self.end(text, HINT.to_owned(), kind.unwrap_or(FailureKind::Environment)),
                1 => tracing::warn!("{text}; one worker is left"),
                left => tracing::warn!("{text}; {left} workers are left"),
            }
        }
    }

    /// Start a worker and give it rows until it or the queue ends; how it ended, and its last lines.
    fn attend(&self, number: usize) -> Result<(End, String)> {
        let name = self.name(number);
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        let mut child = self.start(number, theirs).with_context(|| format!("cannot start {name}"))?;
        let log = Log::of(child.stderr.take(), &name, self.workers.is_verbose, self.workers.print);
        tracing::debug!("{name} is process {}", child.id());
        self.sockets()[number] = Some(ours.try_clone().context("cannot keep a socket")?);
        if self.queue.has_ended() {
            // It ended before it could see this socket.
            let _ = ours.shutdown(Shutdown::Both);
        }
        let mut at_work = VecDeque::new();
        let served = self.serve(&ours, &mut at_work);
        self.sockets()[number] = None;
        let _ = ours.shutdown(Shutdown::Both);
        self.queue.lost(at_work.iter().map(|job: &Job| job.place));
        if self.queue.has_ended() {
            let _ = child.kill();
        }
        let status = wait(&mut child)?;
        let tail = log.last_lines();
        if self.queue.has_ended() {
            return Ok((End::Asked, tail));
        }
        let (how, kind) = how_it_ended(status);
        Ok(match served {
            Ok(Some(refused)) => (End::Refused(refused), tail),
            // It was alive: what it said is why it is at its end.
            Err(e) if status.success() => (End::Itself { how: format!("is of no use: {e:#}"), kind }, tail),
            _ => (End::Itself { how, kind }, tail),
        })
    }

    fn start(&self, number: usize, socket: UnixStream) -> Result<Child> {
        let mut command = own_program()?;
        command.args(&self.workers.arguments);
        command.args([SOURCES_OPTION, &self.sources, "--device", &device_name(self.workers.devices[number])]);
        command.args(["--threads", &self.threads.to_string()]);
        command.stdin(OwnedFd::from(socket)).stdout(Stdio::null()).stderr(Stdio::piped());
        // Ctrl-C reaches this process alone.
        command.process_group(0);
        Ok(command.spawn()?)
    }

    /// Give the worker rows until it or the queue ends; those that it has then stay in `at_work`. The error,
    /// if no worker would be of use.
    fn serve(&self, socket: &UnixStream, at_work: &mut VecDeque<Job>) -> Result<Option<Error>> {
        let (mut from, mut to) = (BufReader::with_capacity(1 << 20, socket), socket);
        match wire::receive(&mut from)? {
            Some(Message::Hello(hello)) if hello == self.hello => {}
            Some(Message::Hello(hello)) => {
                let refused = hinted(
                    format!(
                        "it makes other features than this training reads: expected {:?}, found {hello:?}",
                        self.hello
                    ),
                    "keep program, recipe and examples as they were while training is at work; the same command goes on",
                );
                return Ok(Some(refused.into()));
            }
            Some(_) => bail!("it did not say what it makes"),
            None => return Ok(None),
        }
        loop {
            while at_work.len() < AT_ONCE
                && let Some(job) = self.queue.next(at_work.is_empty())
            {
                at_work.push_back(job);
                wire::send(&mut to, &Message::Make { source: job.of.source as u32, row: job.of.row })?;
            }
            let Some(job) = at_work.front() else { return Ok(None) };
            let expected = (job.of.source as u32, job.of.row);
            let answer = match wire::receive(&mut from)? {
                Some(Message::Made { source, row, features }) if (source, row) == expected => Ok(features),
                Some(Message::Failed { source, row, why }) if (source, row) == expected => Err(why.error()),
                Some(_) => bail!("it answered another row than {expected:?}"),
                None => return Ok(None),
            };
            self.queue.done(job.place, answer);
            at_work.pop_front();
        }
    }
}

impl Hello {
    fn of(made: impl Iterator<Item = String>) -> Self {
        Self { version: env!("CARGO_PKG_VERSION").to_owned(), made: made.collect() }
    }
}

impl Why {
    fn error(self) -> Error {
        let kind = self.kind();
        match self.hint {
            Some(hint) => hinted(self.text, hint).of(kind).into(),
            None if kind == FailureKind::Internal => anyhow!(self.text),
            None => hinted(self.text, "see `log.jsonl` in the run folder").of(kind).into(),
        }
    }
}

/// Wait for a worker whose socket has closed.
fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    let begun = Instant::now();
    while begun.elapsed() < ENDS_WITHIN {
        if let Some(status) = child.try_wait().context("cannot wait for a worker")? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait().context("cannot wait for a worker")
}

/// Makes rows of several sources.
pub trait MakesRows {
    /// Hash of each source's choices.
    fn made(&self) -> Vec<String>;

    /// # Errors
    /// The row cannot be made.
    fn row(&self, source: usize, row: u64) -> Result<FeatureRow>;
}

/// The sources that a worker is started with.
///
/// # Errors
/// One of them is none.
pub fn sources_of(text: &str) -> Result<Vec<Source>> {
    let source = |name: &str| Source::named(name).with_context(|| format!("`{name}` is no source"));
    text.split(',').map(source).collect()
}

/// Answer the process at the other end of `socket` until it has gone.
///
/// # Errors
/// It says what no such process says.
pub fn answer(maker: &impl MakesRows, socket: OwnedFd) -> Result<()> {
    let socket = UnixStream::from(socket);
    let (mut from, mut to) = (BufReader::new(&socket), &socket);
    wire::send(&mut to, &Message::Hello(Hello::of(maker.made().into_iter())))?;
    // A row is on its way while the next one is made.
    let (ready, to_send) = sync_channel(AT_ONCE - 1);
    std::thread::scope(|scope| {
        scope.spawn(|| send_all(&socket, to_send));
        while let Some(message) = wire::receive(&mut from)? {
            let Message::Make { source, row } = message else { bail!("expected a row to make") };
            let answer = match maker.row(source as usize, row) {
                Ok(features) => Message::Made { source, row, features },
                Err(e) => Message::Failed { source, row, why: Why::of(&e) },
            };
            if ready.send(answer).is_err() {
                break;
            }
        }
        drop(ready);
        Ok(())
    })
}

/// Send answers until the other side has gone, who knows why.
fn send_all(socket: &UnixStream, answers: Receiver<Message>) {
    let mut to = BufWriter::new(socket);
    for answer in answers {
        if wire::send(&mut to, &answer).is_err() {
            return;
        }
    }
}
