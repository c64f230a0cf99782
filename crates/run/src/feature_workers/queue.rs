//! Rows that training will read, those at work, and those that wait to be read: bounded by samples and bytes.
//!
//! Rows are made in the order of their turns. A row that a reader waits for is made whatever the bounds say,
//! so that readers in any order cannot block one another. Processes are left to the parent module.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use pkv_core::{FailureKind, Hinted, hinted};
use pkv_shard::FeatureRow;

/// Workers that die over one row until it is given up. Several may die at once for a reason of their own, and
/// hand it from one to the next.
const MOST_ENDS: u32 = 3;

/// Most rows that are at work or wait to be read. Rows that readers wait for are counted, and not held back.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub samples: usize,
    pub bytes: u64,
}

/// A row of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOf {
    /// Of the sources, by its place in their list.
    pub source: usize,
    pub row: u64,
    /// Of its numbers.
    pub bytes: u64,
}

/// A row to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub place: Place,
    pub of: RowOf,
}

/// Turn, then order of arrival.
pub type Place = (u64, u64);

/// An error that every reader gets.
#[derive(Clone, Debug)]
pub struct Failure {
    pub text: String,
    pub hint: String,
    pub kind: FailureKind,
}

impl Failure {
    fn error(&self) -> Hinted {
        hinted(self.text.as_str(), self.hint.as_str()).of(self.kind)
    }
}

/// Rows between those who make them and those who read them.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asked: BTreeMap<Place, Asked>,
    arrived: u64,
    /// At work or ready.
    samples: usize,
    bytes: u64,
    most: (usize, u64),
    read: u64,
    waited: Duration,
    ended: Option<Failure>,
}

#[derive(Debug)]
struct Asked {
    of: RowOf,
    stage: Stage,
    /// A reader waits for it.
    is_wanted: bool,
    /// No reader will come.
    is_forgotten: bool,
    /// Workers that died over it.
    ends: u32,
}

#[derive(Debug)]
enum Stage {
    Waiting,
    AtWork,
    Ready(Result<FeatureRow>),
}

/// What passed through a queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    pub rows: u64,
    /// Time that readers waited, all together.
    pub waited: Duration,
    /// Most rows, and most of their bytes, that were held at once.
    pub most: (usize, u64),
}

impl Queue {
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), changed: Condvar::new() }
    }

    /// A row will be read.
    pub fn expect(&self, of: RowOf, turn: u64) {
        self.lock().add(of, turn);
        self.changed.notify_all();
    }

    /// One reading that was expected will not come; nothing if there was none.
    pub fn forget(&self, source: usize, row: u64) {
        let mut state = self.lock();
        let Some(place) = state.find(source, row) else { return };
        match state.asked.get_mut(&place) {
            Some(asked) if matches!(asked.stage, Stage::AtWork) => asked.is_forgotten = true,
            _ => drop(state.take_out(place)),
        }
        self.changed.notify_all();
    }

    /// The row, when it is made.
    ///
    /// # Errors
    /// It cannot be made, or no worker is left.
    pub fn take(&self, of: RowOf) -> Result<FeatureRow> {
        let begun = Instant::now();
        let mut state = self.lock();
        let place = state.find(of.source, of.row).unwrap_or_else(|| state.add(of, 0));
        if let Some(asked) = state.asked.get_mut(&place) {
            asked.is_wanted = true;
        }
        self.changed.notify_all();
        loop {
            if matches!(state.asked.get(&place), Some(Asked { stage: Stage::Ready(_), .. }) | None) {
                let taken = state.take_out(place);
                (state.read, state.waited) = (state.read + 1, state.waited + begun.elapsed());
                self.changed.notify_all();
                match taken {
                    Some(Stage::Ready(row)) => return row,
                    _ => anyhow::bail!("row {} left the queue without its features", of.row),
                }
            }
            if let Some(failure) = &state.ended {
                return Err(failure.error().into());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next row to make; with `wait`, when there is one. `None` ends the caller's work, or says that
    /// there is none now.
    pub fn next(&self, wait: bool) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.ended.is_some() {
                return None;
            }
            if let Some(job) = state.begin(self.limits) {
                return Some(job);
            }
            if !wait {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A row was made, or could not be.
    pub fn done(&self, place: Place, row: Result<FeatureRow>) {
        let mut state = self.lock();
        match state.asked.get_mut(&place) {
            Some(asked) if asked.is_forgotten => drop(state.take_out(place)),
            Some(asked) => asked.stage = Stage::Ready(row),
            None => {}
        }
        self.changed.notify_all();
    }

    /// The worker of these rows has died, over the first of them.
    pub fn lost(&self, places: impl IntoIterator<Item = Place>) {
        let mut state = self.lock();
        for (nth, place) in places.into_iter().enumerate() {
            let Some(asked) = state.asked.get_mut(&place) else { continue };
            if asked.is_forgotten {
                drop(state.take_out(place));
                continue;
            }
            asked.ends += u32::from(nth == 0);
            if asked.ends >= MOST_ENDS {
                let row = asked.of.row;
                let ended = hinted(
                    format!("{MOST_ENDS} feature workers died over row {row}, one after the other"),
                    "see their last lines in `log.jsonl`; if memory ran out, a smaller `extract.prefill_chunk_tokens` needs less",
                );
                asked.stage = Stage::Ready(Err(ended.environment().into()));
                continue;
            }
            asked.stage = Stage::Waiting;
            let bytes = asked.of.bytes;
            (state.samples, state.bytes) = (state.samples - 1, state.bytes - bytes);
        }
        self.changed.notify_all();
    }

    /// No more rows are made. The first failure counts.
    pub fn end(&self, failure: Failure) {
        self.lock().ended.get_or_insert(failure);
        self.changed.notify_all();
    }

    pub fn has_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    pub fn sum(&self) -> Sum {
        let state = self.lock();
        Sum { rows: state.read, waited: state.waited, most: state.most }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is done under the lock is done as a whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, of: RowOf, turn: u64) -> Place {
        let place = (turn, self.arrived);
        self.arrived += 1;
        let asked = Asked { of, stage: Stage::Waiting, is_wanted: false, is_forgotten: false, ends: 0 };
        self.asked.insert(place, asked);
        place
    }

    /// The first reading of a row that is expected and has no reader yet.
    fn find(&self, source: usize, row: u64) -> Option<Place> {
        let is_it = |asked: &Asked| {
            !asked.is_wanted && !asked.is_forgotten && (asked.of.source, asked.of.row) == (source, row)
        };
        self.asked.iter().find(|(_, asked)| is_it(asked)).map(|(place, _)| *place)
    }

    fn take_out(&mut self, place: Place) -> Option<Stage> {
        let Asked { of, stage, .. } = self.asked.remove(&place)?;
        if !matches!(stage, Stage::Waiting) {
            (self.samples, self.bytes) = (self.samples - 1, self.bytes - of.bytes);
        }
        Some(stage)
    }

    /// Begin the first row that a reader waits for, else the first one if there is room for it.
    fn begin(&mut self, limits: Limits) -> Option<Job> {
        let waiting = || self.asked.iter().filter(|(_, asked)| matches!(asked.stage, Stage::Waiting));
        let has_room = |asked: &Asked| {
            self.samples < limits.samples
                && (self.samples == 0 || self.bytes + asked.of.bytes <= limits.bytes)
        };
        let (&place, _) = waiting()
            .find(|(_, asked)| asked.is_wanted)
            .or_else(|| waiting().next().filter(|(_, asked)| has_room(asked)))?;
        let asked = self.asked.get_mut(&place)?;
        asked.stage = Stage::AtWork;
        let of = asked.of;
        (self.samples, self.bytes) = (self.samples + 1, self.bytes + of.bytes);
        self.most = (self.most.0.max(self.samples), self.most.1.max(self.bytes));
        Some(Job { place, of })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(row: u64) -> RowOf {
        RowOf { source: 0, row, bytes: 10 }
    }

    fn row(row: u64) -> FeatureRow {
        let (heads, globals) = (vec![row as f32], Vec::new());
        FeatureRow { id: row.to_string(), layers: 1, kv_heads: 1, channels: 1, positions: 1, heads, globals }
    }

    fn queue(samples: usize, bytes: u64) -> Queue {
        Queue::new(Limits { samples, bytes })
    }

    fn rows_begun(queue: &Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.next(false)).map(|job| job.of.row).collect()
    }

    #[test]
    fn turns_decide_and_both_bounds_hold() {
        for (samples, bytes) in [(3, 1000), (100, 39)] {
            let queue = queue(samples, bytes);
            for (turn, row) in [(2, 20), (1, 10), (2, 21), (1, 11), (0, 5)] {
                queue.expect(of(row), turn);
            }
            assert_eq!(rows_begun(&queue), [5, 10, 11]);
            // What a reader waits for comes before all others, and beyond the bounds.
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| queue.take(of(21)).unwrap());
                let job = queue.next(true).unwrap();
                assert_eq!(job.of.row, 21);
                assert_eq!(queue.next(false), None);
                queue.done(job.place, Ok(row(21)));
                assert_eq!(reader.join().unwrap(), row(21));
            });
            assert!(rows_begun(&queue).is_empty(), "there is no room yet");
            assert_eq!(queue.sum().most, (4, 40));
        }
    }

    #[test]
    fn a_row_larger_than_all_bounds_is_made_alone() {
        let queue = queue(4, 5);
        queue.expect(of(1), 0);
        queue.expect(of(2), 0);
        let first = queue.next(false).unwrap();
        assert_eq!(queue.next(false), None);
        queue.done(first.place, Ok(row(1)));
        assert_eq!(queue.next(false), None, "it is not read yet");
        assert_eq!(queue.take(of(1)).unwrap(), row(1));
        assert_eq!(rows_begun(&queue), [2]);
    }

    #[test]
    fn every_reading_that_is_expected_is_a_row_of_its_own_until_it_is_forgotten() {
        let queue = queue(10, 1000);
        (0..3).for_each(|turn| queue.expect(of(7), turn));
        let job = queue.next(false).unwrap();
        // The one at work is made and thrown away; of the others, one is left.
        queue.forget(0, 7);
        queue.forget(0, 7);
        queue.done(job.place, Ok(row(7)));
        assert_eq!(queue.lock().samples, 0);
        assert_eq!(rows_begun(&queue), [7]);
        queue.forget(0, 8);
        queue.forget(1, 7);
        assert_eq!(queue.lock().asked.len(), 1);
    }

    #[test]
    fn rows_of_a_worker_that_died_are_made_by_another_and_a_row_that_kills_is_named() {
        let queue = queue(10, 1000);
        queue.expect(of(1), 0);
        queue.expect(of(2), 1);
        for _ in 0..MOST_ENDS {
            let jobs = [queue.next(false).unwrap(), queue.next(false).unwrap()];
            assert_eq!(jobs.map(|job| job.of.row), [1, 2]);
            queue.lost(jobs.map(|job| job.place));
        }
        let error = queue.take(of(1)).unwrap_err();
        assert!(error.to_string().contains("3 feature workers died over row 1"), "{error}");
        let job = queue.next(false).unwrap();
        assert_eq!(job.of.row, 2, "it waited until the other was given up");
        queue.done(job.place, Ok(row(2)));
        assert_eq!(queue.take(of(2)).unwrap(), row(2));
        let state = queue.lock();
        assert_eq!((state.samples, state.bytes), (0, 0));
    }

    #[test]
    fn an_end_reaches_readers_and_workers_but_not_what_is_ready() {
        let queue = queue(10, 1000);
        queue.expect(of(1), 0);
        let job = queue.next(false).unwrap();
        queue.done(job.place, Ok(row(1)));
        let failure = |text: &str| Failure {
            text: text.to_owned(),
            hint: "start again".to_owned(),
            kind: FailureKind::Environment,
        };
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| queue.take(of(2)).unwrap_err());
            queue.end(failure("all have ended"));
            queue.end(failure("and this comes later"));
            let error = reader.join().unwrap();
            assert_eq!(error.to_string(), "all have ended");
            assert_eq!(FailureKind::of(&error), FailureKind::Environment);
        });
        assert_eq!(queue.next(true), None);
        assert_eq!(queue.take(of(1)).unwrap(), row(1));
    }
}
