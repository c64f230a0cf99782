//! Shares a task's contexts among processes; each is computed once, by the process that claims it first.

use std::time::Duration;

use anyhow::Result;
use pkv_core::{Progress, Stop};

use crate::cell::Cell;
use crate::store::{Outcome, TaskStore};

/// Interval between checks for other processes.
const PAUSE: Duration = Duration::from_millis(300);

/// Have every one of the cells `asked` in contexts `0..n` of a task: those that are stored, those that others
/// compute, and the rest from `make`, which gets a context's index and the cells that it lacks. Progress
/// counts each context once.
///
/// # Errors
/// `make` fails, or the store, or the user stopped.
pub fn share<T: Outcome>(
    task: &TaskStore,
    n: usize,
    asked: &[Cell],
    progress: &dyn Progress,
    stop: &Stop,
    mut make: impl FnMut(usize, &[Cell]) -> Result<T>,
) -> Result<()> {
    let mut pending: Vec<usize> = (0..n).collect();
    while !pending.is_empty() {
        let (mut elsewhere, mut worked) = (Vec::new(), false);
        for index in pending {
            if !task.missing(index, asked).is_empty() {
                let Some(_claim) = task.claim(index)? else {
                    elsewhere.push(index);
                    continue;
                };
                // Who held the claim before may have stored them.
                let missing = task.missing(index, asked);
                if !missing.is_empty() {
                    task.add(index, make(index, &missing)?)?;
                }
                worked = true;
            }
            progress.advance(1);
            stop.check()?;
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

    use pkv_core::NoProgress;
    use pkv_recipe::MethodName;

    use super::*;
    use crate::store::tests::{Plain, cell, plain, task};

    #[test]
    fn workers_share_the_contexts_and_their_cells_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let made = Mutex::new(Vec::new());
        let work = |method: MethodName| {
            let (_store, task) = task(dir.path(), "f");
            share(&task, 20, &[cell(method)], &NoProgress, &Stop::default(), |i, missing| {
                assert_eq!(missing, [cell(method)]);
                made.lock().unwrap().push((i, method.name()));
                std::thread::sleep(Duration::from_millis(5));
                Ok(plain(method, i as f64))
            })
            .unwrap();
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
        for (i, outcome) in task.outcomes::<Plain>().all {
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
            share(&task, 3, &asked, &NoProgress, &Stop::default(), |i, _| {
                Ok(plain(MethodName::MAPPER, make(i)?))
            })
        };
        assert!(all(dir.path(), &|i| if i == 1 { anyhow::bail!("no") } else { Ok(i as f64) }).is_err());
        all(dir.path(), &|i| Ok(10.0 + i as f64)).unwrap();
        let (_store, task) = task(dir.path(), "f");
        let found = task.outcomes::<Plain>().all;
        let found: Vec<_> =
            found.iter().map(|(_, o)| o.cells.get(&cell(MethodName::MAPPER)).copied()).collect();
        assert_eq!(found, [Some(0.0), Some(11.0), Some(12.0)], "what was done is kept");
    }
}
