//! The training data of a run: the split of each row, and its labels and features as tensors.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use pkv_core::{Seed, Split, hinted};
use pkv_mapper::MapperDims;
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::{LabelSection, TargetPool};
use pkv_shard::{ExampleRows, FeatureFolders};
use tch::Tensor;

use crate::cache::{Cache, CachedExample};
use crate::loader::Source;

/// Labels and features of all examples, and which split each is in.
pub struct Dataset {
    rows: ExampleRows,
    splits: Vec<Split>,
    dims: MapperDims,
}

/// One example on the host, f32, raw: features not standardized, labels KVzip's scores.
#[derive(Debug)]
pub struct ContextTensors {
    /// `[proxy heads, channels, positions]`
    pub heads_pct: Tensor,
    /// `[global channels, positions]`
    pub globals_ct: Tensor,
    /// `[target heads, positions]`
    pub scores_ot: Tensor,
}

impl ContextTensors {
    /// Training targets of the mapper: log-odds, span-pooled. f32 `[target heads, positions]`.
    pub fn targets(&self, pool: &TargetPool) -> Tensor {
        pool_targets(&log_odds(&self.scores_ot), pool)
    }
}

impl Dataset {
    /// Open the three stages' folders; all must be complete and of the same examples.
    ///
    /// # Errors
    /// A stage is absent, unfinished or damaged; the stages differ in their number of rows; there
    /// is no training example.
    pub fn open(examples: &Path, labels: &Path, features: &FeatureFolders) -> Result<Self> {
        let rows = ExampleRows::open(examples, labels, features)?;
        let most = LabelSection::most_score(rows.label_fingerprint());
        let rows = rows.with_most_score(most);
        let splits = rows.splits();
        let sizes = rows.sizes().filter(|_| splits.contains(&Split::Train)).with_context(|| {
            hinted(
                format!("there is no training example in `{}`", examples.display()),
                "raise `data.train`, or lower `data.validation_share` and `data.test_share`",
            )
        })?;
        let dims = MapperDims {
            proxy_heads: sizes.heads,
            channels: sizes.channels,
            globals: sizes.globals,
            outputs: sizes.outputs(),
        };
        Ok(Self { rows, splits, dims })
    }

    pub fn dims(&self) -> MapperDims {
        self.dims
    }

    /// Rows of a split, in their order.
    pub fn rows(&self, split: Split) -> Vec<u64> {
        (0..self.splits.len() as u64).filter(|&i| self.splits[i as usize] == split).collect()
    }

    /// Training rows to learn from, in their order: `contexts` of them drawn by `seed`, or all. A smaller
    /// draw is part of a larger one.
    pub fn training_rows(&self, contexts: Option<usize>, seed: Seed) -> Vec<u64> {
        let rows = self.rows(Split::Train);
        draw(rows, contexts, seed)
    }

    /// The example's name in row `i`.
    pub fn id(&self, row: u64) -> &str {
        self.rows.id(row)
    }

    /// Positions of row `i`.
    pub fn positions(&self, row: u64) -> usize {
        self.rows.positions(row)
    }

    /// As [`ExampleRows::expect`].
    pub fn expect(&self, row: u64, turn: u64) {
        self.rows.expect(row, turn);
    }

    /// Row `i` as tensors.
    ///
    /// # Errors
    /// A shard is damaged, or label and feature are not of the same example or of other models.
    pub fn context(&self, row: u64) -> Result<ContextTensors> {
        let (label, feature) = self.rows.get(row)?;
        let MapperDims { proxy_heads: p, channels: c, globals: g, outputs: o } = self.dims;
        let t = self.positions(row);
        let shape = |n: &[usize]| n.iter().map(|&n| n as i64).collect::<Vec<_>>();
        Ok(ContextTensors {
            heads_pct: Tensor::from_slice(&feature.heads).reshape(shape(&[p, c, t])),
            globals_ct: Tensor::from_slice(&feature.globals).reshape(shape(&[g, t])),
            scores_ot: Tensor::from_slice(&label.scores).reshape(shape(&[o, t])),
        })
    }

    /// Row `i` as the loader copies it, its labels pooled: before any crop, a window's neighbours count.
    ///
    /// # Errors
    /// As [`Self::context`].
    pub fn sample(&self, row: u64, pool: &TargetPool) -> Result<CachedExample> {
        let (label, feature) = self.rows.get(row)?;
        let scores = Tensor::from_slice(&label.scores).reshape([self.dims.outputs as i64, -1]);
        let targets = pool_targets(&log_odds(&scores), pool).flatten(0, -1);
        Ok(CachedExample {
            positions: self.positions(row),
            heads: feature.heads,
            globals: feature.globals,
            targets: Vec::try_from(targets).context("cannot read the pooled labels")?,
        })
    }
}

/// The training examples, those decoded before from memory.
pub struct Samples<'a> {
    dataset: &'a Dataset,
    pool: TargetPool,
    cache: Cache,
}

impl<'a> Samples<'a> {
    pub fn new(dataset: &'a Dataset, pool: TargetPool, cache_gb: Option<f64>) -> Self {
        Self { dataset, pool, cache: Cache::new(cache_gb) }
    }
}

impl Source for Samples<'_> {
    fn dims(&self) -> MapperDims {
        self.dataset.dims()
    }

    fn sample(&self, row: u64) -> Result<Arc<CachedExample>> {
        let mut is_read = false;
        let sample = self.cache.get(row, || {
            is_read = true;
            self.dataset.sample(row, &self.pool)
        })?;
        if !is_read {
            // Another thread has read it since it was expected.
            self.dataset.rows.forget(row);
        }
        Ok(sample)
    }

    fn expect(&self, row: u64, turn: u64) {
        if !self.cache.has(row) {
            self.dataset.expect(row, turn);
        }
    }
}

/// `count` of `rows` in their order: those whose random number is lowest.
fn draw(rows: Vec<u64>, count: Option<usize>, seed: Seed) -> Vec<u64> {
    let Some(count) = count.filter(|n| *n < rows.len()) else { return rows };
    let mut drawn = rows;
    drawn.sort_by_cached_key(|&row| seed.derive("train.contexts", row));
    drawn.truncate(count);
    drawn.sort_unstable();
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaller_draws_are_part_of_larger_ones() {
        let rows: Vec<u64> = (3..203).collect();
        let drawn = |n, seed| draw(rows.clone(), Some(n), Seed(seed));
        let (few, many) = (drawn(10, 1), drawn(100, 1));
        assert!(few.len() == 10 && many.len() == 100);
        assert!(few.is_sorted() && few.iter().all(|row| many.contains(row)));
        assert_ne!(few, drawn(10, 2));
        assert!(few.iter().any(|row| *row > 20), "not the first ones: {few:?}");
        assert_eq!(drawn(1000, 1), rows);
        assert_eq!(draw(rows.clone(), None, Seed(1)), rows);
    }
}
