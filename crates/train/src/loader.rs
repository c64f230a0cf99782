//! Prefetching of batches as tensors, on other threads, while the device trains on the one before.

use std::sync::Arc;
use std::thread::Scope;

use anyhow::{Context as _, Result};
use pkv_core::Seed;
use pkv_gpu::HostBuffer;
use pkv_mapper::MapperDims;
use pkv_recipe::{FineLoss, LossSection};
use tch::{Device, Kind, Tensor};

use crate::batches::{Batch, Batches};
use crate::cache::CachedExample;
use crate::in_order::{InOrder, Items};
use crate::loss::draw_pairs;

/// Most threads by default: eight fill batches faster than any GPU empties them.
const THREADS: usize = 8;
/// Bytes of the batches in memory that threads are left out for.
const BATCH_BYTES: usize = 2 << 30;

/// A batch on the training device.
#[derive(Debug)]
pub struct Loaded {
    /// Raw features, f32 `[b, proxy heads, channels, t]`.
    pub heads_bpct: Tensor,
    /// f32 `[b, global channels, t]`.
    pub globals_bct: Tensor,
    /// Pooled log-odds, f32 `[b, target heads, t]`.
    pub y_bot: Tensor,
    /// Places of the `fine` term's pairs, Int `[2, b, pairs]`; nothing if the term is off.
    pub pairs_2bq: Option<Tensor>,
}

impl Loaded {
    /// Positions of all contexts together.
    pub fn tokens(&self) -> u64 {
        let size = self.y_bot.size();
        (size[0] * size[2]) as u64
    }
}

/// A source of samples.
pub trait Source: Sync {
    fn dims(&self) -> MapperDims;

    /// # Errors
    /// The row cannot be read.
    fn sample(&self, row: u64) -> Result<Arc<CachedExample>>;

    /// `row` will be read, lower `turn`s first.
    fn expect(&self, _row: u64, _turn: u64) {}
}

/// Inputs that all batches share.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    source: &'a dyn Source,
    batches: &'a Batches,
    /// Of the `fine` term, if it is on.
    pairs: Option<FineLoss>,
    seed: Seed,
    device: Device,
}

/// A batch in host memory, all of it in one buffer.
struct Host {
    numbers: Tensor,
    contexts: usize,
    positions: usize,
}

/// Threads that read, of which `by_memory` fit into memory, if the recipe leaves it open.
pub fn threads(asked: Option<usize>, by_memory: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    asked.unwrap_or_else(|| by_memory.min(cores.saturating_sub(1)).min(THREADS)).max(1)
}

impl<'a> Loader<'a> {
    pub fn new(
        source: &'a dyn Source,
        batches: &'a Batches,
        loss: &LossSection,
        seed: Seed,
        device: Device,
    ) -> Self {
        let pairs = (loss.fine > 0.0).then_some(loss.fine_pairs);
        Self { source, batches, pairs, seed, device }
    }

    /// Threads for batches of up to `largest` positions (all contexts together), if the recipe leaves it
    /// open.
    pub fn threads(&self, asked: Option<usize>, largest: usize) -> usize {
        let d = self.source.dims();
        let batch_bytes = 4 * largest * (d.flat() + d.outputs);
        let by_memory = BATCH_BYTES / (2 * batch_bytes).max(1);
        threads(asked, by_memory)
    }

    /// Start `threads` threads that make the batches of steps `first..end`.
    pub fn start<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        threads: usize,
        first: u64,
        end: u64,
    ) -> Feed<'a>
    where
        'a: 'scope,
    {
        let batches = InOrder::start(scope, threads, move |thread, to| {
            self.make(first, end, thread, threads, to);
        });
        Feed { loader: self, batches }
    }

    /// Send every `threads`-th batch until the receiver goes away; an error is sent too, and ends it.
    fn make(self, first: u64, end: u64, thread: usize, threads: usize, to: &Items<Host>) {
        let steps = (first..end).zip(self.batches.from_step(first));
        // The rows of the next batch are made, where they are made when they are read, while this one is
        // read.
        let mut steps = steps.skip(thread).step_by(threads).inspect(|(step, batch)| {
            batch.windows.iter().for_each(|&(row, _)| self.source.expect(row, *step));
        });
        let mut next = steps.next();
        while let Some((step, batch)) = next {
            next = steps.next();
            if !to.put(self.assemble(step, &batch)) {
                return;
            }
        }
    }

    /// Copy a batch's windows side by side: heads, globals, targets, then the pairs' places as integers.
    fn assemble(&self, step: u64, batch: &Batch) -> Result<Host> {
        let (contexts, length, d) = (batch.windows.len(), batch.length, self.source.dims());
        let pairs = self.pairs.map_or_else(Vec::new, |fine| {
            let n = (d.outputs * length) as i64;
            draw_pairs(&fine, self.seed.derive("train.pairs", step), contexts as i64, n)
        });
        let rows = [d.proxy_heads * d.channels, d.globals, d.outputs];
        let sizes = rows.map(|r| contexts * r * length);
        let mut buffer = HostBuffer::new(sizes.iter().sum::<usize>() + pairs.len(), self.device)?;
        let (heads, rest) = buffer.as_mut_slice().split_at_mut(sizes[0]);
        let (globals, rest) = rest.split_at_mut(sizes[1]);
        let (targets, places) = rest.split_at_mut(sizes[2]);
        for (i, &(row, start)) in batch.windows.iter().enumerate() {
            let sample = self.source.sample(row)?;
            let parts =
                [(&sample.heads, &mut *heads), (&sample.globals, globals), (&sample.targets, targets)];
            for ((from, to), rows) in parts.into_iter().zip(rows) {
                for r in 0..rows {
                    let at = (i * rows + r) * length;
                    let window = r * sample.positions + start;
                    to[at..at + length].copy_from_slice(&from[window..window + length]);
                }
            }
        }
        for (to, &place) in places.iter_mut().zip(&pairs) {
            // Its bits: the buffer is read as integers there.
            *to = f32::from_bits(place as u32);
        }
        Ok(Host { numbers: buffer.into_tensor(), contexts, positions: length })
    }

    /// A batch on its way to the device: work queued from now on sees it.
    fn upload(&self, host: Host) -> Result<Loaded> {
        let (b, t) = (host.contexts as i64, host.positions as i64);
        let [p, c, g, o] = self.source.dims().sizes();
        let numbers = pkv_gpu::upload_beside(host.numbers, self.device)?;
        let mut at = 0;
        let mut take = |shape: &[i64]| {
            let n = shape.iter().product();
            at += n;
            numbers.narrow(0, at - n, n).view(shape)
        };
        let (heads_bpct, globals_bct, y_bot) = (take(&[b, p, c, t]), take(&[b, g, t]), take(&[b, o, t]));
        let pairs_2bq = self.pairs.map(|f| take(&[2, b, f.pairs as i64]).view_dtype(Kind::Int));
        Ok(Loaded { heads_bpct, globals_bct, y_bot, pairs_2bq })
    }

    /// The batch of one step, without a thread.
    ///
    /// # Errors
    /// A row cannot be read, or there are no batches.
    pub fn one(&self, step: u64) -> Result<Loaded> {
        let batch = self.batches.from_step(step).next().context("there are no batches")?;
        self.upload(self.assemble(step, &batch)?)
    }
}

/// Batches in their order; the threads end when it is dropped.
pub struct Feed<'a> {
    loader: Loader<'a>,
    batches: InOrder<Host>,
}

impl Feed<'_> {
    /// The next batch, on its way to the device.
    ///
    /// # Errors
    /// A row cannot be read, or all steps' batches were taken.
    pub fn take(&mut self) -> Result<Loaded> {
        self.loader.upload(self.batches.take()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct MadeUp;

    const DIMS: MapperDims = MapperDims { proxy_heads: 3, channels: 2, globals: 1, outputs: 4 };

    impl Source for MadeUp {
        fn dims(&self) -> MapperDims {
            DIMS
        }

        /// Every number says its row, its line and its position.
        fn sample(&self, row: u64) -> Result<Arc<CachedExample>> {
            anyhow::ensure!(row != 13, "row 13 is damaged");
            let positions = 20 + row as usize;
            let numbers = |part: usize, rows: usize| {
                let number = |i: usize| {
                    (row * 10_000 + part as u64 * 1000 + (i / positions) as u64 * 100) as f32
                        + (i % positions) as f32
                };
                (0..rows * positions).map(number).collect()
            };
            Ok(Arc::new(CachedExample {
                positions,
                heads: numbers(0, 6),
                globals: numbers(1, 1),
                targets: numbers(2, 4),
            }))
        }
    }

    fn all(
        threads: usize,
        rows: &[u64],
        loss: &LossSection,
        steps: std::ops::Range<u64>,
    ) -> Result<Vec<Loaded>> {
        pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu)?;
        let lengths: Vec<usize> = rows.iter().map(|r| 20 + *r as usize).collect();
        let batches = Batches::new(rows, &lengths, 3, None, 0.5, Seed(5));
        let loader = Loader::new(&MadeUp, &batches, loss, Seed(5), Device::Cpu);
        std::thread::scope(|scope| {
            let mut feed = loader.start(scope, threads, steps.start, steps.end);
            steps.map(|_| feed.take()).collect()
        })
    }

    #[test]
    fn threads_change_neither_order_nor_bytes() {
        let loss = LossSection { fine: 0.3, ..LossSection::default() };
        let rows: Vec<u64> = (0..11).collect();
        let one = all(1, &rows, &loss, 0..13).unwrap();
        for threads in [2, 3, 5, 20] {
            let several = all(threads, &rows, &loss, 4..13).unwrap();
            for (a, b) in one[4..].iter().zip(&several) {
                assert_eq!(a.heads_bpct, b.heads_bpct);
                assert_eq!(a.globals_bct, b.globals_bct);
                assert_eq!(a.y_bot, b.y_bot);
                assert_eq!(a.pairs_2bq, b.pairs_2bq);
            }
        }
        let same = |a: &Loaded, b: &Loaded| a.y_bot.size() == b.y_bot.size() && a.y_bot == b.y_bot;
        assert!(!same(&one[0], &one[1]));
    }

    #[test]
    fn windows_hold_their_rows_and_pairs_are_the_losss_own() {
        let loss = LossSection { fine: 0.3, ..LossSection::default() };
        for (step, batch) in all(2, &[3, 4, 5], &loss, 0..4).unwrap().iter().enumerate() {
            let (b, t) = (3, batch.y_bot.size()[2]);
            assert_eq!(batch.heads_bpct.size(), [b, 3, 2, t]);
            assert_eq!((batch.globals_bct.size(), batch.tokens()), (vec![b, 1, t], (b * t) as u64));
            for i in 0..b {
                let first = batch.heads_bpct.double_value(&[i, 0, 0, 0]);
                let row = (first / 10_000.0).floor();
                assert!((3.0..=5.0).contains(&row));
                let start = first - row * 10_000.0;
                let expect = |part: f64, line: f64| row * 10_000.0 + part * 1000.0 + line * 100.0 + start;
                assert_eq!(
                    batch.heads_bpct.double_value(&[i, 2, 1, t - 1]),
                    expect(0.0, 5.0) + (t - 1) as f64
                );
                assert_eq!(batch.globals_bct.double_value(&[i, 0, t - 1]), expect(1.0, 0.0) + (t - 1) as f64);
                assert_eq!(batch.y_bot.double_value(&[i, 3, 0]), expect(2.0, 3.0));
            }
            let seed = Seed(5).derive("train.pairs", step as u64);
            let expected = draw_pairs(&loss.fine_pairs, seed, b, 4 * t);
            let pairs_2bq = batch.pairs_2bq.as_ref().unwrap();
            assert_eq!(pairs_2bq.size(), [2, b, loss.fine_pairs.pairs as i64]);
            let found = Vec::<i64>::try_from(pairs_2bq.to_kind(Kind::Int64).flatten(0, -1)).unwrap();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_damaged_row_is_told_and_ends_the_threads() {
        let error = all(3, &[11, 12, 13], &LossSection::default(), 0..9).unwrap_err();
        assert!(format!("{error:#}").contains("row 13 is damaged"));
    }

    #[test]
    fn large_batches_take_fewer_threads() {
        let batches = Batches::new(&[], &[], 1, None, 1.0, Seed(0));
        let loader = Loader::new(&MadeUp, &batches, &LossSection::default(), Seed(0), Device::Cpu);
        assert_eq!(loader.threads(Some(5), 1 << 40), 5);
        assert_eq!(loader.threads(None, 1 << 40), 1);
        assert!((1..=8).contains(&loader.threads(None, 10)));
    }
}
