//! Reading and writing beside computing: one thread each, and bounded queues between them.
//!
//! The computing thread is the caller's, so what it holds need not move. Order is kept. An error on
//! any thread ends all of them, after the results that were computed before it have been written.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pkv_gpu::{Event, Stream};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Items that may wait to be computed; they are token ids, small beside everything else.
const AHEAD: usize = 4;

/// Results that the device may still be working on while the next one's work is queued.
const QUEUED: usize = 2;

/// Results that may wait to be written: with the one in the writer's hands, most of the host's memory.
const BEHIND: usize = 2;

/// What the computing thread spent its time on.
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

/// Take every item through `read` (a thread), `compute` (the caller's) and `write` (another thread), in order.
///
/// `compute` may return when its work is queued on `device`: a few results ahead of the device it is made
/// to wait, so that a wait for the writer is about writing.
///
/// # Errors
/// The first error of the three; the writer's before the others', because it concerns an earlier item.
pub fn pump<I: Send, O: Send>(
    device: Device,
    items: Range<u64>,
    read: impl Fn(u64) -> Result<I> + Send,
    compute: impl FnMut(I) -> Result<O>,
    write: impl FnMut(O) -> Result<()> + Send,
) -> Result<Times> {
    let begin = Instant::now();
    let mut times = Times::default();
    thread::scope(|scope| {
        let (to_compute, read_items) = sync_channel(AHEAD);
        let (to_write, results) = sync_channel(BEHIND);
        scope.spawn(move || {
            for i in items {
                let item = read(i);
                let failed = item.is_err();
                if to_compute.send(item).is_err() || failed {
                    return;
                }
            }
        });
        let writer = scope.spawn(move || {
            // Per thread: a new one starts with gradients on.
            let _no_grad = tch::no_grad_guard();
            results.into_iter().try_for_each(write)
        });
        // Both queues end with this call, so neither thread can wait for ever.
        let computed = compute_all(device, read_items, to_write, compute, &mut times);
        let written = timed(&mut times.writer, || writer.join());
        written.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(computed)
    })?;
    times.wall = begin.elapsed();
    Ok(times)
}

/// The computing thread's loop; ends early and without an error if the writer has gone, who knows why.
fn compute_all<I, O>(
    device: Device,
    items: Receiver<Result<I>>,
    to_write: SyncSender<O>,
    mut compute: impl FnMut(I) -> Result<O>,
    times: &mut Times,
) -> Result<()> {
    let mut queued = VecDeque::new();
    while let Ok(item) = timed(&mut times.reader, || items.recv()) {
        let result = timed(&mut times.compute, || {
            let result = compute(item?)?;
            let mut done = Event::new(false)?;
            done.record(&Stream::current(device)?)?;
            queued.push_back(done);
            if queued.len() > QUEUED { settle(queued.drain(..1)) } else { Ok(()) }.map(|()| result)
        })?;
        if timed(&mut times.writer, || to_write.send(result)).is_err() {
            break;
        }
    }
    timed(&mut times.compute, || settle(queued.drain(..)))
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

/// A tensor of f32 on its way to the host.
///
/// [`ToHost::begin`] queues the copy behind the work at hand and returns at once: the host side is pinned
/// memory, which libtorch keeps for the next copy. [`ToHost::wait`], on any thread, has the numbers.
pub struct ToHost {
    host: Tensor,
    copied: Event,
}

impl ToHost {
    /// # Errors
    /// The GPU has failed, or the host has no memory left.
    pub fn begin(t: &Tensor) -> Result<Self> {
        let host = t.contiguous().f_to_device_(Device::Cpu, Kind::Float, true, false);
        let host = host.context("cannot copy a tensor to the host")?;
        let mut copied = Event::new(false)?;
        copied.record(&Stream::current(t.device())?)?;
        Ok(Self { host, copied })
    }

    /// The numbers, row by row.
    ///
    /// # Errors
    /// The work that the tensor comes from failed on the GPU.
    pub fn wait(self) -> Result<Vec<f32>> {
        self.copied.synchronize().context("cannot copy a tensor to the host")?;
        Vec::try_from(&self.host.view([-1])).context("cannot copy a tensor to the host")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use anyhow::bail;

    use super::*;

    #[test]
    fn order_is_kept_and_queues_are_bounded() {
        let (read, written) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut out = Vec::new();
        let times = pump(
            Device::Cpu,
            3..40,
            |i| {
                let ahead = read.fetch_add(1, Ordering::SeqCst) - written.load(Ordering::SeqCst);
                // Queued on both sides, and one in the hands of each thread.
                assert!(ahead <= (AHEAD + BEHIND + 3) as u64, "{ahead} items are held at once");
                Ok(i)
            },
            |i| ToHost::begin(&Tensor::from_slice(&[i as f32, 0.5])),
            |x| {
                thread::sleep(Duration::from_millis(1));
                out.push(x.wait()?);
                written.fetch_add(1, Ordering::SeqCst);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(out, (3..40).map(|i| vec![i as f32, 0.5]).collect::<Vec<_>>());
        assert!(times.writer > Duration::from_millis(20), "a slow writer is waited for: {times}");
        assert!(times.idle() > 0.5 && times.idle() <= 1.0, "{times}");
    }

    /// Pump 0..10, failing at item 4 of `failing`; the error, and what was written.
    fn fail(failing: &str) -> (String, Vec<u64>) {
        let at = |place: &str, i: u64| {
            if place == failing && i == 4 { bail!("{place} fails at {i}") } else { Ok(i) }
        };
        let mut out = Vec::new();
        let e = pump(
            Device::Cpu,
            0..10,
            |i| at("read", i),
            |i| at("compute", i),
            |i| {
                out.push(at("write", i)?);
                Ok(())
            },
        );
        (e.unwrap_err().to_string(), out)
    }

    #[test]
    fn the_original_error_ends_it_and_what_came_before_is_written() {
        for place in ["read", "compute", "write"] {
            assert_eq!(fail(place), (format!("{place} fails at 4"), vec![0, 1, 2, 3]));
        }
    }

    #[test]
    fn nothing_to_do_is_done_at_once() {
        let never = |_| -> Result<u64> { unreachable!("there is no item") };
        pump(Device::Cpu, 7..7, never, Ok, |_: u64| Ok(())).unwrap();
    }
}
