//! One of several tasks that share the pieces of a stage.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::{Hinted, hinted};

/// Task `index` of `of`. Pieces are dealt out by number: piece `i` belongs to task `i mod of`.
///
/// ```
/// use pkv_core::Task;
///
/// let task: Task = "1/3".parse()?;
/// assert_eq!((0..7).filter(|&piece| task.has(piece)).collect::<Vec<_>>(), [1, 4]);
/// # Ok::<(), pkv_core::Hinted>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Task {
    index: u64,
    of: u64,
}

impl Task {
    /// The only task: all pieces.
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// # Errors
    /// There is no such task: tasks are counted from 0.
    pub fn new(index: u64, of: u64) -> Result<Self, Hinted> {
        if index < of {
            return Ok(Self { index, of });
        }
        let most = match of {
            0 => "there must be at least one task".to_owned(),
            _ => format!("the first of {of} tasks is `0/{of}`, the last `{}/{of}`", of - 1),
        };
        Err(hinted(format!("there is no task {index} of {of}"), most))
    }

    /// The other tasks, from the next one on, round to the one before.
    pub fn others(self) -> impl Iterator<Item = Self> {
        (1..self.of).map(move |k| Self { index: (self.index + k) % self.of, of: self.of })
    }

    /// The last of its pieces of `pieces`, if it has one.
    pub fn last_of(self, pieces: u64) -> Option<u64> {
        let last = pieces.checked_sub(1 + self.index)?;
        Some(self.index + last / self.of * self.of)
    }

    /// Number of tasks.
    pub const fn count(self) -> u64 {
        self.of
    }

    /// Whether piece `piece` is this task's.
    pub const fn has(self, piece: u64) -> bool {
        piece % self.of == self.index
    }

    /// The task of as many that has `piece`.
    #[must_use]
    pub const fn that_has(self, piece: u64) -> Self {
        Self { index: piece % self.of, of: self.of }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Task {
    type Err = Hinted;

    fn from_str(text: &str) -> Result<Self, Hinted> {
        let number = |n: &str| n.parse::<u64>().ok();
        let parts = text.split_once('/').and_then(|(k, n)| Some((number(k)?, number(n)?)));
        let (index, of) = parts.ok_or_else(|| {
            hinted(format!("`{text}` is no task"), "write `K/N`, task K of N counted from 0, such as `0/8`")
        })?;
        Self::new(index, of)
    }
}

impl Serialize for Task {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pieces_of_the_other_tasks_come_from_the_next_task_on() {
        let last = |task: &str, pieces| {
            let task: Task = task.parse().unwrap();
            task.others().map(|other| other.last_of(pieces)).collect::<Vec<_>>()
        };
        assert_eq!(last("1/3", 8), [Some(5), Some(6)]);
        assert_eq!(last("2/3", 2), [Some(0), Some(1)]);
        assert_eq!(last("0/3", 1), [None, None]);
        assert!(last("0/1", 9).is_empty());
    }

    #[test]
    fn every_piece_belongs_to_one_task() {
        for of in [1, 3, 5, 16] {
            let tasks: Vec<Task> = (0..of).map(|index| Task::new(index, of).unwrap()).collect();
            for piece in 0..16 {
                let having: Vec<_> = tasks.iter().filter(|task| task.has(piece)).collect();
                assert_eq!(having, [&tasks[0].that_has(piece)]);
            }
        }
    }

    #[test]
    fn tasks_read_as_they_are_written_and_others_are_refused() {
        for text in ["0/1", "1/3", "999/1000"] {
            assert_eq!(text.parse::<Task>().unwrap().to_string(), text);
        }
        for (text, part) in [
            ("3/3", "the last `2/3`"),
            ("0/0", "at least one task"),
            ("", "write `K/N`"),
            ("1", "write `K/N`"),
            ("-1/3", "write `K/N`"),
            ("1/3/5", "write `K/N`"),
            ("a/3", "write `K/N`"),
            ("1/99999999999999999999", "write `K/N`"),
        ] {
            let refused = text.parse::<Task>().unwrap_err();
            assert!(refused.hint().contains(part), "{text}: {}", refused.hint());
        }
    }
}
