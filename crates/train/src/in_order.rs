//! Work of several threads, handed over in the order of its numbers.
//!
//! Thread i of n makes items i, i + n, i + 2n and so on: order and content are the same for any n, and at
//! most two items per thread are in memory.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use anyhow::{Context as _, Result};

/// Items in their order; the threads end when it is dropped.
pub struct InOrder<T> {
    from: Vec<Receiver<Result<T>>>,
    next: usize,
}

/// Where a thread puts its items.
pub struct Items<T>(SyncSender<Result<T>>);

impl<T> Items<T> {
    /// Whether more items are wanted: not after an error, or when the receiver is gone.
    pub fn put(&self, item: Result<T>) -> bool {
        let failed = item.is_err();
        self.0.send(item).is_ok() && !failed
    }
}

impl<T: Send> InOrder<T> {
    /// Start `threads` threads; `make` has the number of its thread.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        threads: usize,
        make: impl Fn(usize, &Items<T>) + Copy + Send + 'scope,
    ) -> Self
    where
        T: 'scope,
    {
        let mut from = Vec::new();
        for thread in 0..threads {
            let (to, end_of) = sync_channel(1);
            from.push(end_of);
            scope.spawn(move || make(thread, &Items(to)));
        }
        Self { from, next: 0 }
    }

    /// The next item.
    ///
    /// # Errors
    /// It could not be made, or all items were taken.
    pub fn take(&mut self) -> Result<T> {
        let item = self.from[self.next].recv().context("a thread that reads ended early")??;
        self.next = (self.next + 1) % self.from.len();
        Ok(item)
    }
}
