//! Shares a task's contexts among processes; each is computed once, by the process that claims it first.

use std::time::{Duration, Instant};

use anyhow::Result;
use pkv_core::{FailureKind, Progress, Stop};
use pkv_shard::{Ended, Pieces, Tally};

use crate::cell::Cell;
use crate::store::{Outcome, TaskStore};

/// Interval between checks for other processes.
const PAUSE: Duration = Duration::from_millis(300);

/// What the contexts of all tasks are shared by.
pub struct Sharing<'a> {
    pub progress: &'a dyn Progress,
    pub stop: &'a Stop,
    /// The contexts of one of several processes alone, and the markers of those that have ended; `None` for
    /// all contexts.
    pub pieces: Option<&'a Pieces>,
    /// Contexts of the tasks before this one.
    pub before: u64,
}

impl Sharing<'_> {
    fn is_ours(&self, index: usize) -> bool {
        self.pieces.is_none_or(|pieces| pieces.task().has(self.number(index)))
    }

    /// A context's number among those of all tasks.
    fn number(&self, index: usize) -> u64 {
        self.before + index as u64
    }

    fn mark(&self, index: usize, start: Instant, ended: Ended) -> Result<()> {
        self.pieces.map_or(Ok(()), |pieces| pieces.mark(self.number(index), start, ended))
    }
}

/// Have every one of the cells `asked` in contexts `0..n` of a task: those that are stored, those that others
/// compute, and the rest from `make`, which gets a context's index and the cells that it lacks. Progress
/// counts each context once.
///
/// A context for which `make` fails is recorded in `tally`, and the others go on.
///
/// # Errors
/// `make` failed too often in a row, or the store did, or the user stopped.
pub fn share<T: Outcome>(
    task: &TaskStore,
    n: usize,
    asked: &[Cell],
    sharing: &Sharing,
    tally: &mut Tally,
    mut make: impl FnMut(usize, &[Cell]) -> Result<T>,
) -> Result<()> {
    let Sharing { progress, stop, .. } = sharing;
    let mut pending: Vec<usize> = (0..n).filter(|&index| sharing.is_ours(index)).collect();
    while !pending.is_empty() {
        let (mut elsewhere, mut worked) = (Vec::new(), false);
        for index in pending {
            let start = Instant::now();
            let mut made = false;
            if !task.missing(index, asked)?.is_empty() {
                let Some(_claim) = task.claim(index)? else {
                    elsewhere.push(index);
                    continue;
                };
                // Who held the claim before may have stored them.
                let missing = task.missing(index, asked)?;
                if !missing.is_empty() {
                    made = true;
                    match make(index, &missing) {
                        Ok(outcome) => {
                            task.add(index, outcome)?;
                            tally.succeeded();
                            tally.done += 1;
                            sharing.mark(index, start, Ended { done: 1, ..Ended::default() })?;
                        }
                        Err(e) if FailureKind::of(&e) == FailureKind::Interrupted => return Err(e),
                        Err(e) => {
                            let id = format!("{} {index}", task.identity().about.name());
                            let failed = vec![tally.failed(sharing.number(index), &id, e)];
                            tally.failed.extend(failed.iter().cloned());
                            sharing.mark(index, start, Ended { failed, ..Ended::default() })?;
                        }
                    }
                }
                worked = true;
            }
            tally.rows += 1;
            if made {
                progress.advance(1);
            } else {
                tally.skipped += 1;
                progress.elsewhere(1);
                if sharing.pieces.is_some_and(|pieces| !pieces.is_marked(sharing.number(index))) {
                    sharing.mark(index, start, Ended { done: 1, ..Ended::default() })?;
                }
            }
            stop.check()?;
            if tally.is_over() {
                return Ok(());
            }
        }
        if !worked && !elsewhere.is_empty() {
            stop.check()?;
            std::thread::sleep(PAUSE);
        }
        pending = elsewhere;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use pkv_core::{Fingerprint, NoProgress, Task};
    use pkv_recipe::MethodName;
    use pkv_shard::{PiecesPlan, PiecesState, Worker};

    use super::*;
    use crate::store::tests::{Plain, cell, plain, task};

    fn alone(stop: &Stop) -> Sharing<'_> {
        Sharing { progress: &NoProgress, stop, pieces: None, before: 0 }
    }

    #[test]
    fn workers_share_the_contexts_and_their_cells_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let made = Mutex::new(Vec::new());
        let work = |method: MethodName| {
            let (_store, task) = task(dir.path(), "f");
            let (stop, mut tally) = (Stop::default(), Tally::new(1));
            share(&task, 20, &[cell(method)], &alone(&stop), &mut tally, |i, missing| {
                assert_eq!(missing, [cell(method)]);
                made.lock().unwrap().push((i, method.name()));
                std::thread::sleep(Duration::from_millis(5));
                Ok(plain(method, i as f64))
            })
            .unwrap();
            assert_eq!((tally.rows, tally.done + tally.skipped), (20, 20));
        };
        std::thread::scope(|s| {
            for method in [MethodName::MAPPER, MethodName::RANDOM, MethodName::MAPPER] {
                s.spawn(move || work(method));
            }
        });
        let mut made = made.into_inner().unwrap();
        made.sort_unstable();
        let once = made.len();
        made.dedup();
        assert_eq!(
            (once, made.len()),
            (40, 40),
            "each cell of each context was made, and nothing was done twice"
        );
        let (_store, task) = task(dir.path(), "f");
        for (i, outcome) in task.outcomes::<Plain>().unwrap().all {
            for method in [MethodName::MAPPER, MethodName::RANDOM] {
                assert_eq!(outcome.cells.get(&cell(method)), Some(&(i as f64)));
            }
        }
    }

    #[test]
    fn a_claim_ends_with_the_failure_of_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let all = |dir: &Path, make: &dyn Fn(usize) -> Result<f64>| {
            let (_store, task) = task(dir, "f");
            let asked = [cell(MethodName::MAPPER)];
            let (stop, mut tally) = (Stop::default(), Tally::new(2));
            share(&task, 3, &asked, &alone(&stop), &mut tally, |i, _| {
                Ok(plain(MethodName::MAPPER, make(i)?))
            })?;
            tally.finish("eval")
        };
        let failed = all(dir.path(), &|i| if i == 1 { anyhow::bail!("no") } else { Ok(i as f64) });
        let failed = format!("{:#}", failed.unwrap_err());
        assert!(failed.contains("3 rows = 2 done + 0 skipped + 1 failed; row 1 (`labels 1`)"), "{failed}");
        assert_eq!(
            all(dir.path(), &|i| Ok(10.0 + i as f64)).unwrap(),
            "3 rows = 1 done + 2 skipped + 0 failed"
        );
        let (_store, task) = task(dir.path(), "f");
        let found = task.outcomes::<Plain>().unwrap().all;
        let found: Vec<_> =
            found.iter().map(|(_, o)| o.cells.get(&cell(MethodName::MAPPER)).copied()).collect();
        assert_eq!(found, [Some(0.0), Some(11.0), Some(2.0)], "what was done is kept");
    }

    #[test]
    fn too_many_failures_in_a_row_end_it() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, task) = task(dir.path(), "f");
        let (stop, mut tally, mut tried) = (Stop::default(), Tally::new(3), Vec::new());
        share(&task, 20, &[cell(MethodName::MAPPER)], &alone(&stop), &mut tally, |i, _| {
            tried.push(i);
            if i == 2 { Ok(plain(MethodName::MAPPER, 1.0)) } else { anyhow::bail!("no") }
        })
        .unwrap();
        assert_eq!(tried, [0, 1, 2, 3, 4, 5]);
        let ended = format!("{:#}", tally.finish("eval").unwrap_err());
        assert!(
            ended.contains("6 rows = 1 done + 0 skipped + 5 failed, the last 3 of them in a row"),
            "{ended}"
        );
    }

    #[test]
    fn each_of_several_processes_has_its_own_contexts_and_marks_them() {
        let dir = tempfile::tempdir().unwrap();
        let plan = PiecesPlan::new("eval", &Fingerprint::new().with("asked", 1), 7, 1).unwrap();
        for (index, own) in [(1, [1, 3]), (0, [0, 2])] {
            let (_store, task) = task(dir.path(), "f");
            let worker = Worker { task: Task::new(index, 2).unwrap(), device: "cpu".to_owned() };
            let pieces = Pieces::open_to_mark(dir.path(), plan.clone(), worker).unwrap().unwrap();
            let (stop, mut tally, mut made) = (Stop::default(), Tally::new(1), Vec::new());
            // Four contexts after two of another task.
            let sharing = Sharing { pieces: Some(&pieces), before: 2, ..alone(&stop) };
            share(&task, 4, &[cell(MethodName::MAPPER)], &sharing, &mut tally, |i, _| {
                made.push(i);
                Ok(plain(MethodName::MAPPER, i as f64))
            })
            .unwrap();
            assert_eq!(made, own);
            assert_eq!(tally.finish("eval").unwrap(), "2 rows = 2 done + 0 skipped + 0 failed");
        }
        let state = PiecesState::read(dir.path()).unwrap().unwrap();
        assert_eq!((state.done_rows(), state.missing()), (4, vec![0, 1, 6]));
        assert!(state.what_is_missing().what.contains("4 of 7 contexts are there; missing: 0, 1, 6"));
    }
}
