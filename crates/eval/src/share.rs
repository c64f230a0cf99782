//! One task's contexts, done once each by whoever comes first.

use std::time::Duration;

use anyhow::Result;
use pkv_core::Progress;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::ContextStore;

/// How long to wait for other processes before looking again.
const PAUSE: Duration = Duration::from_millis(300);

/// The outcomes of contexts `0..n` of `task`, in order: those that are stored, those that others compute, and the
/// rest from `make`. `advance` is told of each outcome once.
///
/// # Errors
/// `make` or `check_stop` fail, or the store.
pub fn share<T: Serialize + DeserializeOwned>(
    store: &ContextStore,
    task: &str,
    n: usize,
    progress: &dyn Progress,
    check_stop: &dyn Fn() -> Result<()>,
    mut make: impl FnMut(usize) -> Result<T>,
) -> Result<Vec<T>> {
    let mut outcomes: Vec<Option<T>> = (0..n).map(|_| None).collect();
    loop {
        let (mut elsewhere, mut worked) = (0, false);
        for (index, slot) in outcomes.iter_mut().enumerate() {
            if slot.is_some() {
                continue;
            }
            *slot = store.get(task, index);
            if slot.is_none() {
                let Some(_claim) = store.claim(task, index)? else {
                    elsewhere += 1;
                    continue;
                };
                // Who held the claim before may have stored it.
                *slot = match store.get(task, index) {
                    Some(outcome) => Some(outcome),
                    None => Some(store.put(task, index, make(index)?)?),
                };
                worked = true;
            }
            progress.advance(1);
            check_stop()?;
        }
        if elsewhere == 0 {
            return Ok(outcomes.into_iter().flatten().collect());
        }
        if !worked {
            check_stop()?;
            std::thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use pkv_core::NoProgress;

    use super::*;

    #[test]
    fn workers_share_the_contexts_and_all_get_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let made = AtomicUsize::new(0);
        let work = || {
            let store = ContextStore::open(dir.path().join("c"), "f".to_owned()).unwrap();
            share(&store, "t", 20, &NoProgress, &|| Ok(()), |i| {
                made.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
                Ok(i * i)
            })
            .unwrap()
        };
        std::thread::scope(|s| {
            let workers: Vec<_> = (0..3).map(|_| s.spawn(work)).collect();
            for worker in workers {
                assert_eq!(worker.join().unwrap(), (0..20).map(|i| i * i).collect::<Vec<_>>());
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 20, "nothing was done twice");
    }

    #[test]
    fn a_claim_ends_with_the_failure_of_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContextStore::open(dir.path().join("c"), "f".to_owned()).unwrap();
        let all =
            |make: &dyn Fn(usize) -> Result<usize>| share(&store, "t", 3, &NoProgress, &|| Ok(()), make);
        assert!(all(&|i| if i == 1 { anyhow::bail!("no") } else { Ok(i) }).is_err());
        assert_eq!(all(&|i| Ok(10 + i)).unwrap(), [0, 11, 12], "what was done is kept");
    }
}
