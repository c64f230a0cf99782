//! A thread that owns its model.
//!
//! Tensors may move between threads but not be shared, and cuDNN keeps its plans per thread: so the
//! proxy and the mapper each live in one thread for as long as they are used.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// A thread with a value; ends when it is dropped.
pub struct Worker<T> {
    jobs: Option<Sender<Job<T>>>,
    thread: Option<JoinHandle<()>>,
}

/// The pending result of a job.
pub struct Pending<R> {
    answer: Receiver<Result<R>>,
}

impl<T: Send + 'static> Worker<T> {
    /// # Errors
    /// The system has no thread left.
    pub fn new(name: &str, mut value: T) -> Result<Self> {
        let (jobs, incoming) = channel::<Job<T>>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || incoming.into_iter().for_each(|job| job(&mut value)))
            .with_context(|| format!("starting the thread `{name}`"))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Begin `work`; jobs are done in order. A panic in it is an error for [`Pending::wait`].
    pub fn start<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut T) -> Result<R> + Send + 'static,
    ) -> Pending<R> {
        let (done, answer) = channel();
        let job: Job<T> = Box::new(move |value| {
            // The receiver may be gone; then the answer is dropped.
            let _ = done.send(caught(|| work(value)));
        });
        if let Some(jobs) = &self.jobs {
            // A thread that is gone drops the job, and with it the answer's sender: `wait` tells.
            let _ = jobs.send(job);
        }
        Pending { answer }
    }
}

impl<R> Pending<R> {
    /// # Errors
    /// Those of the work; a panic of it.
    pub fn wait(self) -> Result<R> {
        self.answer.recv().map_err(|_| anyhow!("the thread has ended"))?
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        // No more jobs: the thread comes to its end.
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `work`, a panic in it as an error. What it worked on must be good for further work nevertheless.
///
/// # Errors
/// Those of `work`, and its panics.
pub(crate) fn caught<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(payload) => Err(anyhow!("{}", panic_text(payload.as_ref()))),
    }
}

/// Message of a panic; libtorch's messages have a stack trace after their first line.
fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
    let text = text.split("\\n").next().unwrap_or(text);
    text.lines().next().unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn jobs_share_a_value_in_order_and_survive_errors_and_panics() {
        let worker = Worker::new("test", 0).unwrap();
        let first = worker.start(|n| {
            *n += 1;
            Ok(*n)
        });
        let error = worker.start(|_| -> Result<()> { bail!("no") });
        let panic = worker.start(|n| -> Result<()> {
            *n += 10;
            panic!("first line\nand more");
        });
        let last = worker.start(|n| Ok(*n));
        assert_eq!(first.wait().unwrap(), 1);
        assert_eq!(error.wait().unwrap_err().to_string(), "no");
        assert_eq!(panic.wait().unwrap_err().to_string(), "first line");
        assert_eq!(last.wait().unwrap(), 11);
    }

    #[test]
    fn an_answer_nobody_waits_for_is_no_problem() {
        let worker = Worker::new("test", ()).unwrap();
        drop(worker.start(|()| Ok(3)));
        assert_eq!(worker.start(|()| Ok(4)).wait().unwrap(), 4);
    }
}
