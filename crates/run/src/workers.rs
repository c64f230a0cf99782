//! `--devices`: a worker process on each device, all on the same pieces, and one display of what they do.
//!
//! A worker is this program with `--task` and `--device`. It takes the next free piece, and says on stdout
//! what it has made; its stderr is kept for the case that it dies.

mod said;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, available_parallelism, sleep, spawn};
use std::time::{Duration, Instant};

pub use self::said::Said;
use self::said::{Event, Shown};
use anyhow::{Context, Result};
use pkv_core::{FailureKind, Interrupted, Progress, Stop, Task, hinted};
use pkv_gpu::DeviceGroup;
use pkv_shard::{Missing, PiecesState, Stage};

/// How often workers are looked at.
const EVERY: Duration = Duration::from_millis(50);

/// Lines of a worker that are repeated when it died.
const LAST_LINES: usize = 12;

/// The workers of a stage.
pub struct Workers<'a> {
    /// What a worker is started with, beside its task, device and threads.
    pub arguments: Vec<OsString>,
    pub stage: Stage,
    pub task: Task,
    pub devices: &'a [DeviceGroup],
    /// CPU threads of each; by default they share the cores.
    pub threads: Option<usize>,
    /// Show all that the workers log, and not only what concerns every user.
    pub is_verbose: bool,
    /// Shows a line of a worker's log.
    pub print: fn(&str),
    pub bar: &'a dyn Progress,
    pub stop: &'a Stop,
}

/// A worker at work.
struct Worker {
    number: usize,
    child: Child,
    log: Log,
    events: JoinHandle<()>,
    is_second: bool,
}

/// What a worker writes to stderr.
pub(crate) struct Log {
    tail: Arc<Mutex<VecDeque<String>>>,
    reader: JoinHandle<()>,
}

impl Log {
    /// Read `stderr` to its end; show what concerns every user, or all of it, by `print`.
    pub fn of(stderr: Option<ChildStderr>, name: &str, is_verbose: bool, print: fn(&str)) -> Self {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (kept, name) = (Arc::clone(&tail), name.to_owned());
        let reader = spawn(move || {
            for line in lines(stderr) {
                if is_verbose || is_for_all(&line) {
                    print(&format!("{} ({name})", line.trim_end()));
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == LAST_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        });
        Self { tail, reader }
    }

    /// The last lines, when all have been read: each on a line of its own.
    pub fn last_lines(self) -> String {
        drop(self.reader.join());
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter().map(|line| format!("\n    {line}")).collect()
    }
}

/// How a worker ended, in words, and the kind of its failure, as far as its exit code says.
pub(crate) fn how_it_ended(status: ExitStatus) -> (String, Option<FailureKind>) {
    let kind = FailureKind::ALL.into_iter().find(|kind| status.code() == Some(kind.exit_code().into()));
    let how = match status.signal() {
        Some(signal) => format!("was ended by signal {signal}"),
        None => format!("ended with {}", status.code().map_or(String::new(), |c| format!("exit code {c}"))),
    };
    (how, kind)
}

impl Workers<'_> {
    /// Run all of them to their end; what the stage's `folders` lack of other tasks' pieces.
    ///
    /// # Errors
    /// A worker died twice, or refused its input; the user stopped.
    pub fn run(&self, folders: &[std::path::PathBuf]) -> Result<Option<Missing>> {
        let (begun, (tell, events)) = (Instant::now(), channel());
        let mut shown = Shown::new(self.bar);
        let mut running = Vec::new();
        for number in 0..self.devices.len() {
            running.push(self.start(number, false, &tell)?);
        }
        tracing::info!("{}, task {}: {}", self.stage.name(), self.task, self.names());
        let result = self.attend(&mut running, &tell, &events, &mut shown);
        if result.is_err() {
            stop_all(running.iter_mut().map(|worker| &mut worker.child));
        }
        shown.finish();
        result?;
        for folder in folders {
            if let Some(state) = PiecesState::read(folder)? {
                return Ok(Some(state.what_is_missing()));
            }
        }
        let secs = begun.elapsed().as_secs_f64();
        tracing::info!("{}: done in {secs:.1} s by {} workers", self.stage.name(), self.devices.len());
        Ok(None)
    }

    fn names(&self) -> String {
        let name = |number: usize| self.name(number);
        (0..self.devices.len()).map(name).collect::<Vec<_>>().join(", ")
    }

    fn name(&self, number: usize) -> String {
        format!("worker {number} on `{}`", self.devices[number])
    }

    /// Wait until every worker has ended well.
    fn attend(
        &self,
        running: &mut Vec<Worker>,
        tell: &Sender<(usize, Event)>,
        events: &Receiver<(usize, Event)>,
        shown: &mut Shown<'_>,
    ) -> Result<()> {
        while !running.is_empty() {
            self.stop.check()?;
            for (number, event) in events.try_iter() {
                shown.take(number, event);
            }
            let mut at = 0;
            while let Some(worker) = running.get_mut(at) {
                let Some(status) = worker.child.try_wait().context("cannot wait for a worker")? else {
                    at += 1;
                    continue;
                };
                let worker = running.remove(at);
                if let Some(second) = self.ended(worker, status, tell)? {
                    running.push(second);
                }
            }
            sleep(EVERY);
        }
        Ok(())
    }

    /// A worker has ended; another one in its place, if it died for the first time.
    fn ended(
        &self,
        worker: Worker,
        status: ExitStatus,
        tell: &Sender<(usize, Event)>,
    ) -> Result<Option<Worker>> {
        // Its last lines are there when both of its streams have ended.
        let lines = worker.log.last_lines();
        drop(worker.events.join());
        if status.success() {
            return Ok(None);
        }
        let (how, kind) = how_it_ended(status);
        let name = self.name(worker.number);
        if kind == Some(FailureKind::Interrupted) {
            // The signal reached it before this process.
            return Err(Interrupted.into());
        }
        let is_refusal = matches!(kind, Some(FailureKind::Input | FailureKind::Usage));
        if !worker.is_second && !is_refusal {
            tracing::warn!("{name} {how}, and is replaced");
            return self.start(worker.number, true, tell).map(Some);
        }
        let again = if worker.is_second { ", as the one before it did not end well" } else { "" };
        Err(hinted(
            format!("{name} {how}{again}; its last lines:{lines}"),
            "see `log.jsonl` in the run folder; the same command goes on, and what is done is kept",
        )
        .of(kind.unwrap_or(FailureKind::Environment))
        .into())
    }

    fn start(&self, number: usize, is_second: bool, tell: &Sender<(usize, Event)>) -> Result<Worker> {
        let device = self.devices[number].to_string();
        let mut command = own_program()?;
        command.args(&self.arguments);
        command.args(["--worker", "--task", &self.task.to_string(), "--device", &device]);
        command.args(["--threads", &self.threads().to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C reaches this process alone, which then asks the workers to stop.
        command.process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.name(number)))?;
        let (stdout, tell) = (child.stdout.take(), tell.clone());
        let log = Log::of(child.stderr.take(), &self.name(number), self.is_verbose, self.print);
        let events = spawn(move || {
            for event in lines(stdout).filter_map(|line| Event::parse(&line)) {
                // A display that has ended shows no more.
                let _ = tell.send((number, event));
            }
        });
        Ok(Worker { number, child, log, events, is_second })
    }

    /// CPU threads of a worker.
    fn threads(&self) -> usize {
        let cores = available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or((cores / self.devices.len()).max(1))
    }
}

/// A command of this program that is killed when this process ends, however that is.
///
/// # Errors
/// This program's own file cannot be found.
pub fn own_program() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls without allocation are made.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() as u32 == parent { Ok(()) } else { Err(std::io::ErrorKind::NotFound.into()) }
        });
    }
    Ok(command)
}

/// Warnings, errors, and what became of the rows.
fn is_for_all(line: &str) -> bool {
    [" WARN ", "ERROR ", " rows = "].iter().any(|part| line.contains(part))
}

fn lines(stream: Option<impl Read>) -> impl Iterator<Item = String> {
    stream
        .into_iter()
        .flat_map(|stream| BufReader::new(stream).split(b'\n'))
        .map_while(Result::ok)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Ask processes to stop at the next row, example or step, and wait until they have.
pub fn stop_all<'a>(children: impl Iterator<Item = &'a mut Child>) {
    let children: Vec<&mut Child> = children.collect();
    for id in children.iter().filter_map(|child| i32::try_from(child.id()).ok()) {
        // SAFETY: the child was not waited for, so that the number is still its own.
        unsafe { libc::kill(id, libc::SIGTERM) };
    }
    for child in children {
        let _ = child.wait();
    }
}
