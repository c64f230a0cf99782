//! The examples of a run with their labels and features, row by row.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use pkv_core::{Seed, Split, hinted};
use pkv_mapper::MapperDims;
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::TargetPool;
use pkv_shard::{Example, FeatureFolders, FeatureRow, FeatureSet, LabelRow, StageReader};
use tch::Tensor;

use crate::cache::{Cache, Sample};
use crate::loader::Source;

/// Labels and features of all examples, and which split each is in.
pub struct Dataset {
    labels: StageReader<LabelRow>,
    features: FeatureSet,
    ids: Vec<String>,
    splits: Vec<Split>,
    /// Positions of each example.
    lengths: Vec<usize>,
    dims: MapperDims,
}

/// One example on the host, f32, raw: features not standardized, labels KVzip's scores.
#[derive(Debug)]
pub struct Context {
    /// `[proxy heads, channels, positions]`
    pub heads_pct: Tensor,
    /// `[global channels, positions]`
    pub globals_ct: Tensor,
    /// `[target heads, positions]`
    pub scores_ot: Tensor,
}

impl Context {
    /// What the mapper learns: log-odds, span-pooled. f32 `[target heads, positions]`.
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
        let (mut ids, mut splits, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for example in StageReader::<Example>::open(examples)?.iter() {
            let example = example?;
            ids.push(example.id);
            splits.push(example.split);
            lengths.push(example.tokens.len());
        }
        let first = splits.iter().position(|&s| s == Split::Train);
        let first = first.with_context(|| {
            hinted(
                format!("there is no training example in `{}`", examples.display()),
                "raise `data.train`, or lower `data.validation_share` and `data.test_share`",
            )
        })?;
        let labels = open_rows::<LabelRow>(labels, ids.len())?;
        let features = FeatureSet::open(features)?;
        check_rows(features.path(), features.len(), ids.len(), "extract")?;
        let (y, x) = (labels.get(first as u64)?, features.get(first as u64)?);
        let dims = MapperDims {
            proxy_heads: (x.layers * x.kv_heads) as usize,
            channels: x.channels as usize,
            globals: x.global_channels(),
            outputs: (y.layers * y.kv_heads) as usize,
        };
        Ok(Self { labels, features, ids, splits, lengths, dims })
    }

    pub fn dims(&self) -> MapperDims {
        self.dims
    }

    /// Rows of a split, in their order.
    pub fn rows(&self, split: Split) -> Vec<u64> {
        (0..self.splits.len() as u64).filter(|&i| self.splits[i as usize] == split).collect()
    }

    /// Training rows to learn from, in their order: `contexts` of them drawn by `seed`, or all. A smaller draw is part
    /// of a larger one.
    pub fn training_rows(&self, contexts: Option<usize>, seed: Seed) -> Vec<u64> {
        let rows = self.rows(Split::Train);
        draw(rows, contexts, seed)
    }

    /// The example's name in row `i`.
    pub fn id(&self, row: u64) -> &str {
        &self.ids[row as usize]
    }

    /// Positions of row `i`.
    pub fn positions(&self, row: u64) -> usize {
        self.lengths[row as usize]
    }

    /// Row `i` as tensors.
    ///
    /// # Errors
    /// A shard is damaged, or label and feature are not of the same example or of other models.
    pub fn context(&self, row: u64) -> Result<Context> {
        let (label, feature) = self.row(row)?;
        let MapperDims { proxy_heads: p, channels: c, globals: g, outputs: o } = self.dims;
        let t = self.positions(row);
        let shape = |n: &[usize]| n.iter().map(|&n| n as i64).collect::<Vec<_>>();
        Ok(Context {
            heads_pct: Tensor::from_slice(&feature.heads).reshape(shape(&[p, c, t])),
            globals_ct: Tensor::from_slice(&feature.globals).reshape(shape(&[g, t])),
            scores_ot: Tensor::from_slice(&label.scores).reshape(shape(&[o, t])),
        })
    }

    /// Row `i` as the loader copies it, its labels pooled: before any crop, a window's neighbours count.
    ///
    /// # Errors
    /// As [`Self::context`].
    pub fn sample(&self, row: u64, pool: &TargetPool) -> Result<Sample> {
        let (label, feature) = self.row(row)?;
        let scores = Tensor::from_slice(&label.scores).reshape([self.dims.outputs as i64, -1]);
        let targets = pool_targets(&log_odds(&scores), pool).flatten(0, -1);
        Ok(Sample {
            positions: self.positions(row),
            heads: feature.heads,
            globals: feature.globals,
            targets: Vec::try_from(targets).context("cannot read the pooled labels")?,
        })
    }

    /// Label and features of row `i`, which belong together.
    fn row(&self, row: u64) -> Result<(LabelRow, FeatureRow)> {
        let (label, feature) = (self.labels.get(row)?, self.features.get(row)?);
        let (id, t) = (&self.ids[row as usize], self.positions(row));
        let disagree = |what: &str, dir: &Path, found: String, expected: String| {
            anyhow::anyhow!("expected {expected}, found {found}").context(hinted(
                format!("the {what} of row {row} in `{}` do not belong to example `{id}`", dir.display()),
                "label and extract the examples again: `--redo label`, `--redo extract`",
            ))
        };
        let label_shape = (label.id.as_str(), label.layers * label.kv_heads, label.positions);
        let expected = (id.as_str(), self.dims.outputs as u32, t as u32);
        ensure!(
            label_shape == expected,
            disagree("labels", self.labels.stage().path(), describe(label_shape), describe(expected))
        );
        let feature_shape = (feature.id.as_str(), feature.layers * feature.kv_heads, feature.positions);
        let expected = (id.as_str(), self.dims.proxy_heads as u32, t as u32);
        let channels = (feature.channels as usize, feature.global_channels());
        ensure!(
            feature_shape == expected && channels == (self.dims.channels, self.dims.globals),
            disagree(
                "features",
                self.features.path(),
                format!("{}, channels {channels:?}", describe(feature_shape)),
                format!("{}, channels {:?}", describe(expected), (self.dims.channels, self.dims.globals))
            )
        );
        Ok((label, feature))
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

    fn sample(&self, row: u64) -> Result<Arc<Sample>> {
        self.cache.get(row, || self.dataset.sample(row, &self.pool))
    }
}

fn describe((id, heads, positions): (&str, u32, u32)) -> String {
    format!("`{id}` with {heads} KV heads and {positions} positions")
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

fn open_rows<R: pkv_shard::Row>(dir: &Path, expected: usize) -> Result<StageReader<R>> {
    let reader = StageReader::<R>::open(dir)?;
    check_rows(dir, reader.len(), expected, &reader.stage().index().stage)?;
    Ok(reader)
}

fn check_rows(dir: &Path, found: u64, expected: usize, stage: &str) -> Result<()> {
    ensure!(
        found == expected as u64,
        hinted(
            format!("`{}` has {found} rows for {expected} examples", dir.display()),
            format!("make the stage again with `--redo {stage}`")
        )
    );
    Ok(())
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
