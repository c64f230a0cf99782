//! What a worker says on stdout, and how what all of them say is shown.

use std::collections::HashMap;

use pkv_core::Progress;
use serde::{Deserialize, Serialize};

/// A line of a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// Work begins: its name, all units, and those that are there.
    Start(String, u64, u64),
    /// The worker made so many units.
    Made(u64),
}

impl Event {
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// A worker's progress, for the process that started it.
pub struct Said {
    /// Prints what this process says, on stdout.
    pub print: fn(&str),
}

impl Said {
    fn say(&self, event: &Event) {
        if let Ok(line) = serde_json::to_string(event) {
            (self.print)(&format!("{line}\n"));
        }
    }
}

impl Progress for Said {
    fn start(&self, what: &str, total: u64, done: u64) {
        self.say(&Event::Start(what.to_owned(), total, done));
    }
    fn advance(&self, units: u64) {
        self.say(&Event::Made(units));
    }
    /// Its maker says so.
    fn elsewhere(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

/// One bar for all workers: the work that was begun last, by any of them.
pub struct Shown<'a> {
    bar: &'a dyn Progress,
    /// Units that are there, of each work.
    done: HashMap<String, (u64, u64)>,
    /// The work of each worker.
    at: HashMap<usize, String>,
    current: Option<String>,
}

impl<'a> Shown<'a> {
    pub fn new(bar: &'a dyn Progress) -> Self {
        Self { bar, done: HashMap::new(), at: HashMap::new(), current: None }
    }

    pub fn take(&mut self, worker: usize, event: Event) {
        match event {
            Event::Start(what, total, done) => {
                if !self.done.contains_key(&what) {
                    self.finish();
                    self.bar.start(&what, total, done);
                    self.current = Some(what.clone());
                    self.done.insert(what.clone(), (done, total));
                }
                self.at.insert(worker, what);
            }
            Event::Made(units) => {
                let Some(what) = self.at.get(&worker) else { return };
                let Some((done, total)) = self.done.get_mut(what) else { return };
                // A worker that died has made units that are made again.
                let units = units.min(*total - (*done).min(*total));
                *done += units;
                if self.current.as_ref() == Some(what) {
                    self.bar.advance(units);
                }
            }
        }
    }

    pub fn finish(&mut self) {
        if self.current.take().is_some() {
            self.bar.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_workers_say_adds_up() {
        let mut shown = Shown::new(&pkv_core::NoProgress);
        let label = |done| Event::Start("label".to_owned(), 6, done);
        let said = [
            (0, label(1)),
            (1, label(2)),
            (0, Event::Made(1)),
            (1, Event::Made(2)),
            (1, Event::Start("facts".to_owned(), 3, 0)),
            (0, Event::Made(9)),
            (1, Event::Made(1)),
            (7, Event::Made(1)),
        ];
        for (worker, event) in said {
            let line = serde_json::to_string(&event).unwrap();
            shown.take(worker, Event::parse(&line).unwrap());
        }
        assert_eq!((shown.done["label"], shown.done["facts"]), ((6, 6), (1, 3)));
        assert_eq!(shown.current.as_deref(), Some("facts"));
        assert_eq!(Event::parse("not of a worker"), None);
    }
}
