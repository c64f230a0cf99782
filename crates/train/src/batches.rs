//! Batching: which examples form a batch, and which window of each.
//!
//! A batch has one length, so that nothing is padded: its examples are of similar length, and each
//! gives a window as long as the shortest of them (or a little less, see [`even`]), at a random place.
//! Features and labels belong to their position, whatever window they are read in, so a window is an example
//! like any other.
//!
//! With a limit on the window's length, a context longer than it gives as many windows per epoch as
//! fit into it: slices of one long labelled context, whose features and labels saw all of it.

use pkv_core::Seed;
use rand::Rng;

/// Lengths within 5% of each other are alike: batches mix anew every epoch, and at most about 5%
/// of a context stays out of its window.
const ALIKE: f64 = 1.05;

/// Batches of every step, by step.
#[derive(Clone, Debug)]
pub struct Batches {
    items: Vec<Item>,
    batch: usize,
    /// Shortest crop of a batch, as a share.
    crop: f64,
    seed: Seed,
}

/// One window of an example, somewhere.
#[derive(Clone, Copy, Debug)]
struct Item {
    row: u64,
    /// Positions of the whole example.
    positions: usize,
    /// Most positions of the window.
    window: usize,
}

/// A batch: windows of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Positions of every window.
    pub length: usize,
    /// Row, and first position of its window.
    pub windows: Vec<(u64, usize)>,
}

impl Batches {
    /// `lengths` are the positions of `rows`; empty examples are left out. `limit` is the most
    /// positions that a window may have. Each batch is cropped to a share of its length drawn from
    /// `crop` (in (0, 1]; 1 is off) to 1.
    pub fn new(
        rows: &[u64],
        lengths: &[usize],
        batch: usize,
        limit: Option<usize>,
        crop: f64,
        seed: Seed,
    ) -> Self {
        let mut items = Vec::new();
        for (&row, &positions) in rows.iter().zip(lengths).filter(|(_, n)| **n > 0) {
            let window = positions.min(limit.unwrap_or(positions)).max(1);
            items.extend(std::iter::repeat_n(Item { row, positions, window }, positions / window));
        }
        let batch = batch.clamp(1, items.len().max(1));
        Self { items, batch, crop, seed }
    }

    /// Windows of one pass over the examples.
    pub fn windows(&self) -> usize {
        self.items.len()
    }

    /// Most positions of a batch, all windows together.
    pub fn largest(&self) -> usize {
        self.items.iter().map(|i| i.window).max().unwrap_or(0) * self.batch
    }

    /// Whole batches of one pass over the examples. What is left over, another part each time, waits for the
    /// next.
    pub fn per_epoch(&self) -> u64 {
        (self.items.len() / self.batch) as u64
    }

    /// The batches of epoch `epoch`, in the order of training.
    pub fn epoch(&self, epoch: u64) -> Vec<Batch> {
        let mut rng = self.seed.stream("train.order", epoch);
        // Its own stream: without crops, everything else is drawn as with them.
        let mut crops = self.seed.stream("train.crop", epoch);
        let mut order: Vec<usize> = (0..self.items.len()).collect();
        shuffle(&mut order, &mut rng);
        order.truncate(self.per_epoch() as usize * self.batch);
        // Stable, so that alike examples stay shuffled.
        let class = |i: usize| ((self.items[i].window as f64).ln() / ALIKE.ln()).floor() as i64;
        order.sort_by_key(|&i| class(i));
        let mut batches: Vec<Batch> = order
            .chunks(self.batch)
            .map(|chunk| {
                let length = chunk.iter().map(|&i| self.items[i].window).min().unwrap_or(0);
                let length = even(self.cropped(length, &mut crops));
                let window = |&i: &usize| {
                    let item = self.items[i];
                    (item.row, below(&mut rng, item.positions - length + 1))
                };
                Batch { length, windows: chunk.iter().map(window).collect() }
            })
            .collect();
        shuffle(&mut batches, &mut rng);
        batches
    }

    fn cropped(&self, length: usize, rng: &mut impl Rng) -> usize {
        if self.crop >= 1.0 {
            return length;
        }
        let shortest = ((length as f64 * self.crop).ceil() as usize).clamp(length.min(1), length);
        shortest + below(rng, length - shortest + 1)
    }

    /// The batches from step `step` on, without end; nothing if there are no examples.
    pub fn from_step(&self, step: u64) -> impl Iterator<Item = Batch> + '_ {
        let per_epoch = self.per_epoch();
        // Of no examples, no epoch.
        let first = step.checked_div(per_epoch).unwrap_or(u64::MAX);
        let skip = step.checked_rem(per_epoch).unwrap_or(0) as usize;
        (first..u64::MAX).flat_map(|e| self.epoch(e)).skip(skip)
    }
}

/// The largest even length within 3% below `length`: a multiple of 32 from 1,024 on, of 16 from 512, of 8
/// from 256.
///
/// Matrix products of a GPU want rows that begin at 16 bytes, and its allocator blocks that fit those it has:
/// of contexts of any length nearly every batch would have a length of its own, and most of them an odd one.
fn even(length: usize) -> usize {
    let step = 1 << (length / 32).max(1).ilog2().min(5);
    length / step * step
}

/// Fisher-Yates, spelt out: a library's shuffle may draw differently in its next version, and a
/// resumed run must not notice.
fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i + 1));
    }
}

/// Uniform in 0..n, by the high half of a product; the bias is below 2^-32.
fn below(rng: &mut impl Rng, n: usize) -> usize {
    ((u128::from(rng.random::<u64>()) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn batches(lengths: &[usize], batch: usize) -> Batches {
        let rows: Vec<u64> = (100..100 + lengths.len() as u64).collect();
        Batches::new(&rows, lengths, batch, None, 1.0, Seed(3))
    }

    #[test]
    fn windows_lie_in_their_examples_and_are_equally_long() {
        let lengths: Vec<usize> = (0..83).map(|i| 300 + (i * 97) % 1500).collect();
        let b = batches(&lengths, 8);
        assert_eq!(b.per_epoch(), 10);
        for epoch in 0..5 {
            let (mut seen, mut lost, mut all) = (BTreeSet::new(), 0, 0);
            for batch in b.epoch(epoch) {
                assert_eq!(batch.windows.len(), 8);
                for (row, start) in batch.windows {
                    let length = lengths[row as usize - 100];
                    assert!(start + batch.length <= length && seen.insert(row));
                    lost += length - batch.length;
                    all += length;
                }
            }
            assert_eq!(seen.len(), 80);
            assert!(lost * 8 < all, "{lost} of {all} positions cropped");
        }
    }

    #[test]
    fn long_contexts_give_several_windows() {
        let b = Batches::new(&[7, 8, 9], &[1000, 250, 90], 1, Some(100), 1.0, Seed(3));
        assert_eq!(b.windows(), 10 + 2 + 1);
        let mut starts = BTreeSet::new();
        for batch in b.epoch(0) {
            let (row, start) = batch.windows[0];
            let (positions, window) = [(1000, 100), (250, 100), (90, 90)][row as usize - 7];
            assert_eq!(batch.length, even(window));
            assert!(start + window <= positions);
            starts.insert((row, start));
        }
        assert!(starts.len() > 10, "windows lie in different places: {starts:?}");
    }

    #[test]
    fn crops_are_of_any_length_and_change_nothing_else() {
        let (rows, lengths): (Vec<u64>, Vec<usize>) = ((0..40).collect(), vec![200; 40]);
        let new = |crop| Batches::new(&rows, &lengths, 4, None, crop, Seed(3));
        let (whole, cropped) = (new(1.0), new(0.4));
        let (mut shortest, mut longest) = (usize::MAX, 0);
        for epoch in 0..20 {
            for (a, b) in whole.epoch(epoch).iter().zip(cropped.epoch(epoch)) {
                assert!(a.windows.iter().map(|w| w.0).eq(b.windows.iter().map(|w| w.0)));
                assert!(b.windows.iter().all(|w| w.1 + b.length <= 200));
                (shortest, longest) = (shortest.min(b.length), longest.max(b.length));
            }
        }
        assert!((80..90).contains(&shortest) && (190..=200).contains(&longest), "{shortest} to {longest}");
        assert_eq!((whole.largest(), cropped.largest()), (800, 800));
        assert_eq!(whole.epoch(0)[0].length, 200);
        let tiny = Batches::new(&[1], &[1], 1, None, 0.1, Seed(3));
        assert_eq!(tiny.epoch(0)[0], Batch { length: 1, windows: vec![(1, 0)] });
    }

    #[test]
    fn lengths_are_even_and_lose_little() {
        for (length, expected) in
            [(1, 1), (63, 63), (65, 64), (255, 252), (300, 296), (912, 912), (1399, 1376), (4096, 4096)]
        {
            assert_eq!(even(length), expected);
        }
        assert!((1..5000).all(|n| even(n) <= n && (n - even(n)) * 31 < n), "more than 3% lost");
        let lengths: Vec<usize> = (0..400).map(|i| 300 + (i * 97) % 1500).collect();
        let distinct: BTreeSet<usize> = batches(&lengths, 8).epoch(0).iter().map(|b| b.length).collect();
        assert!(distinct.iter().all(|n| n % 8 == 0), "{distinct:?}");
    }

    #[test]
    fn epochs_differ_and_repeat() {
        let b = batches(&vec![500; 40], 8);
        assert_ne!(b.epoch(0), b.epoch(1));
        assert_eq!(b.epoch(7), b.epoch(7));
        let companions = |e: u64| -> BTreeSet<u64> {
            let batch = b.epoch(e).into_iter().find(|x| x.windows.iter().any(|w| w.0 == 100)).unwrap();
            batch.windows.into_iter().map(|w| w.0).collect()
        };
        assert_ne!(companions(0), companions(1));
    }

    #[test]
    fn any_step_can_be_the_first() {
        let b = batches(&[400, 410, 900, 900, 420, 300, 310], 2);
        let all: Vec<Batch> = b.from_step(0).take(12).collect();
        for step in 0..12 {
            assert_eq!(b.from_step(step as u64).take(12 - step).collect::<Vec<_>>(), all[step..]);
        }
    }

    #[test]
    fn few_examples_make_small_batches_and_none_make_none() {
        assert_eq!(batches(&[5, 0, 7], 16).epoch(0)[0].windows.len(), 2);
        assert_eq!(batches(&[5, 0, 7], 16).epoch(0)[0].length, 5);
        assert_eq!(batches(&[], 16).from_step(3).count(), 0);
        assert_eq!(batches(&[0], 16).from_step(0).count(), 0);
    }
}
