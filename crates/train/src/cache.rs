//! Decoded examples kept in memory, up to a budget.
//!
//! Every epoch reads every example once, in another order, so nothing is evicted: an evicted example would be
//! read again. Data beyond the budget is decoded each time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use pkv_gpu::host_memory;

/// One example, f32, row-major, from which the loader copies windows.
#[derive(Debug, PartialEq)]
pub struct CachedExample {
    pub positions: usize,
    /// `[proxy heads x channels, positions]`, raw.
    pub heads: Vec<f32>,
    /// `[global channels, positions]`, raw.
    pub globals: Vec<f32>,
    /// `[target heads, positions]`, pooled log-odds.
    pub targets: Vec<f32>,
}

impl CachedExample {
    /// Of its numbers, in memory.
    pub fn bytes(&self) -> u64 {
        4 * (self.heads.len() + self.globals.len() + self.targets.len()) as u64
    }
}

/// Samples by row.
pub struct Cache {
    budget: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    samples: HashMap<u64, Arc<CachedExample>>,
    bytes: u64,
}

impl Cache {
    /// At most `gb` of samples; a quarter of the machine's free memory if that is left open.
    pub fn new(gb: Option<f64>) -> Self {
        let budget = gb
            .map_or_else(|| host_memory().map_or(8 << 30, |memory| memory.free) / 4, |gb| (gb * 1e9) as u64);
        Self { budget, state: Mutex::default() }
    }

    /// Whether the sample of `row` is here.
    pub fn has(&self, row: u64) -> bool {
        self.lock().samples.contains_key(&row)
    }

    /// The sample of `row`, made by `make` if it is not here.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&self, row: u64, make: impl FnOnce() -> Result<CachedExample>) -> Result<Arc<CachedExample>> {
        if let Some(sample) = self.lock().samples.get(&row) {
            return Ok(sample.clone());
        }
        // Not under the lock: threads decode side by side. Two that want the same row both do.
        let sample = Arc::new(make()?);
        let mut state = self.lock();
        if state.bytes + sample.bytes() <= self.budget && !state.samples.contains_key(&row) {
            state.bytes += sample.bytes();
            state.samples.insert(row, sample.clone());
        }
        Ok(sample)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held leaves whole samples.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn sample(n: usize) -> CachedExample {
        CachedExample { positions: n, heads: vec![n as f32; n], globals: Vec::new(), targets: vec![0.5; n] }
    }

    #[test]
    fn what_fits_is_made_once_and_the_rest_each_time() {
        // Two samples of 100 positions, 800 bytes each, and no third.
        let cache = Cache::new(Some(2000.0 / 1e9));
        let made = Cell::new(0);
        let get = |row: u64| {
            let make = || {
                made.set(made.get() + 1);
                Ok(sample(100))
            };
            assert_eq!(*cache.get(row, make).unwrap(), sample(100));
        };
        (0..3).for_each(|_| (0..4).for_each(&get));
        assert_eq!(made.get(), 2 + 3 * 2);
        assert_eq!([0, 1, 2, 3].map(|row| cache.has(row)), [true, true, false, false]);
        assert!(cache.get(9, || anyhow::bail!("damaged")).is_err());
        let none = Cache::new(Some(0.0));
        none.get(1, || Ok(sample(1))).unwrap();
        assert!(none.state.lock().unwrap().samples.is_empty());
        assert!(Cache::new(None).budget > 0);
    }
}
