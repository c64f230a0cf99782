//! Pipeline of reading, computing and writing: a thread to read, a thread to write, one thread per compute
//! lane, and bounded queues between them.
//!
//! Items go to the lanes in turn and results are taken from them in turn, so order is kept. An error on any
//! thread ends all of them, after the results of the items before it have been written.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use pkv_gpu::Event;
use serde_json::{Value, json};
use tch::Device;

/// Items of a lane that may wait to be computed; they are token ids, small beside everything else.
const AHEAD: usize = 4;

/// Results that the device may still be working on while the next one's work is queued.
const QUEUED: usize = 2;

/// Results of a lane that may wait to be written: with the one in the writer's hands, most of the host's
/// memory.
const BEHIND: usize = 2;

/// Mean time of the computing threads, by activity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// From the first read to the last write.
    pub wall: Duration,
    /// Queuing work, and waiting for the device to do it.
    pub compute: Duration,
    /// Waiting for the next item.
    pub reader: Duration,
    /// Waiting because too many results stood in line, and at the end for the last of them.
    pub writer: Duration,
}

impl Times {
    /// Share of the wall time in which nothing was computed, as the host sees it.
    pub fn idle(&self) -> f64 {
        (self.reader + self.writer).as_secs_f64() / self.wall.as_secs_f64().max(1e-9)
    }

    /// `summary` with these times added: seconds of compute, and the idle share.
    pub fn add_to(&self, mut summary: Value) -> Value {
        summary["compute_s"] = json!((self.compute.as_secs_f64() * 100.0).round() / 100.0);
        summary["idle_share"] = json!((self.idle() * 1e4).round() / 1e4);
        summary
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "computed for {:.1} s of {:.1} s, waited {:.2} s for the reader and {:.2} s for the writer ({:.1}% idle)",
            self.compute.as_secs_f64(),
            self.wall.as_secs_f64(),
            self.reader.as_secs_f64(),
            self.writer.as_secs_f64(),
            100.0 * self.idle()
        )
    }
}

/// Take every item through `read` (a thread), one of `lanes` (a thread each) and `write` (another thread), in
/// order.
///
/// A lane may return when its work is queued on `device`: a few results ahead of the device it is made to
/// wait, so that a wait for the writer is about writing.
///
/// # Errors
/// The first error of the three; the writer's before the others', because it concerns an earlier item.
pub fn pump<I: Send, O: Send>(
    device: Device,
    items: Range<u64>,
    read: impl Fn(u64) -> Result<I> + Send,
    lanes: Vec<impl FnMut(I) -> Result<O> + Send>,
    write: impl FnMut(O) -> Result<()> + Send,
) -> Result<Times> {
    let (begin, count) = (Instant::now(), lanes.len().max(1) as u32);
    let mut times = Times::default();
    thread::scope(|scope| {
        let (mut inboxes, mut outboxes, mut threads) = (Vec::new(), Vec::new(), Vec::new());
        for lane in lanes {
            let (to_compute, items) = sync_channel(AHEAD);
            let (to_write, results) = sync_channel(BEHIND);
            inboxes.push(to_compute);
            outboxes.push(results);
            threads.push(scope.spawn(move || compute_all(device, items, to_write, lane)));
        }
        scope.spawn(move || {
            for (i, inbox) in items.zip(inboxes.iter().cycle()) {
                let item = read(i);
                let failed = item.is_err();
                if inbox.send(item).is_err() || failed {
                    return;
                }
            }
        });
        let writer = scope.spawn(move || write_all(&outboxes, write));
        // All queues end with their threads, so none can wait for ever; the writer's end stops the lanes.
        let mut computed = Ok(());
        let mut last = Duration::ZERO;
        for thread in threads {
            let (lane, result) = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            times.compute += lane.compute / count;
            times.reader += lane.reader / count;
            times.writer += lane.writer / count;
            last = last.max(begin.elapsed());
            computed = computed.and(result);
        }
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        times.writer += begin.elapsed() - last;
        written.and(computed)
    })?;
    times.wall = begin.elapsed();
    Ok(times)
}

/// Results of the lanes in turn, until one has none left.
fn write_all<O>(outboxes: &[Receiver<O>], mut write: impl FnMut(O) -> Result<()>) -> Result<()> {
    // Per thread: a new one starts with gradients on.
    let _no_grad = tch::no_grad_guard();
    for outbox in outboxes.iter().cycle() {
        let Ok(result) = outbox.recv() else { break };
        write(result)?;
    }
    Ok(())
}

/// A lane's loop; ends early and without an error if the writer has gone, who knows why.
fn compute_all<I, O>(
    device: Device,
    items: Receiver<Result<I>>,
    to_write: SyncSender<O>,
    mut compute: impl FnMut(I) -> Result<O>,
) -> (Times, Result<()>) {
    let (mut times, mut queued) = (Times::default(), VecDeque::new());
    let mut work = || {
        while let Ok(item) = timed(&mut times.reader, || items.recv()) {
            let result = timed(&mut times.compute, || {
                let result = compute(item?)?;
                queued.push_back(Event::now(device)?);
                if queued.len() > QUEUED { settle(queued.drain(..1)) } else { Ok(()) }.map(|()| result)
            })?;
            if timed(&mut times.writer, || to_write.send(result)).is_err() {
                break;
            }
        }
        timed(&mut times.compute, || settle(queued.drain(..)))
    };
    let result = work();
    (times, result)
}

/// Wait until the device has reached all of `events`.
fn settle(mut events: impl Iterator<Item = Event>) -> Result<()> {
    events.try_for_each(|event| event.synchronize())
}

fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let out = work();
    *total += begin.elapsed();
    out
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use anyhow::bail;

    use super::*;

    #[test]
    fn order_is_kept_and_queues_are_bounded() {
        for lanes in [1, 3] {
            let (read, written) = (AtomicU64::new(0), AtomicU64::new(0));
            let mut out = Vec::new();
            let compute = |i: u64| {
                // The lanes do not keep step.
                thread::sleep(Duration::from_micros(i * 7919 % 1500));
                Ok(i)
            };
            pump(
                Device::Cpu,
                3..40,
                |i| {
                    let ahead = read.fetch_add(1, Ordering::SeqCst) - written.load(Ordering::SeqCst);
                    // Queued on both sides of each lane, and one in the hands of each thread.
                    let held = (AHEAD + BEHIND + 1) * lanes + 2;
                    assert!(ahead <= held as u64, "{ahead} items are held at once by {lanes} lanes");
                    Ok(i)
                },
                vec![compute; lanes],
                |i| {
                    thread::sleep(Duration::from_millis(2));
                    out.push(i);
                    written.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(out, (3..40).collect::<Vec<_>>());
        }
    }

    /// Nothing but the writer takes time, so that a busy machine makes it longer, not shorter.
    #[test]
    fn a_slow_writer_is_waited_for() {
        for lanes in [1, 3] {
            let slow = |_| {
                thread::sleep(Duration::from_millis(5));
                Ok(())
            };
            let times = pump(Device::Cpu, 0..20, Ok, vec![Ok; lanes], slow).unwrap();
            assert!(times.writer > Duration::from_millis(20), "{times}");
            assert!(times.idle() > 0.3 && times.idle() <= 1.0, "{times}");
        }
    }

    /// Pump 0..10, failing at item 4 of `failing`; the error, and what was written.
    fn fail(failing: &str, lanes: usize) -> (String, Vec<u64>) {
        let at = |place: &str, i: u64| {
            if place == failing && i == 4 { bail!("{place} fails at {i}") } else { Ok(i) }
        };
        let mut out = Vec::new();
        let e = pump(
            Device::Cpu,
            0..10,
            |i| at("read", i),
            vec![|i| at("compute", i); lanes],
            |i| {
                out.push(at("write", i)?);
                Ok(())
            },
        );
        (e.unwrap_err().to_string(), out)
    }

    #[test]
    fn the_original_error_ends_it_and_what_came_before_is_written() {
        for lanes in [1, 2, 3, 7] {
            for place in ["read", "compute", "write"] {
                assert_eq!(fail(place, lanes), (format!("{place} fails at 4"), vec![0, 1, 2, 3]), "{lanes}");
            }
        }
    }

    #[test]
    fn nothing_to_do_is_done_at_once() {
        let never = |_| -> Result<u64> { unreachable!("there is no item") };
        pump(Device::Cpu, 7..7, never, vec![Ok; 2], |_: u64| Ok(())).unwrap();
    }
}
