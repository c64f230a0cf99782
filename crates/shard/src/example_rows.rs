//! The three stages of a run as one: examples with their labels and features, row by row.
//!
//! Owns that they belong together: as many rows of each when they are opened, one example and one size in
//! every row that is read. Tensors are left to the crates above.

use std::path::Path;

use anyhow::{Error, Result, anyhow, ensure};
use pkv_core::{Fingerprint, Split, hinted};

use crate::{Example, FeatureFolders, FeatureRow, FeatureSet, LabelRow, StageReader};

/// Examples, labels and features of a run.
pub struct ExampleRows {
    examples: StageReader<Example>,
    labels: StageReader<LabelRow>,
    features: FeatureSet,
    known: Vec<Known>,
    sizes: Option<Sizes>,
    most_score: f32,
}

/// Data of every example that is kept in memory.
struct Known {
    id: String,
    split: Split,
    positions: usize,
}

/// Sizes that are the same in all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// KV heads of all layers of all sources of features.
    pub heads: usize,
    /// Features per head and position, and per position.
    pub channels: usize,
    pub globals: usize,
    /// Of the target.
    pub layers: usize,
    pub kv_heads: usize,
}

impl Sizes {
    /// KV heads of all layers of the target.
    pub const fn outputs(&self) -> usize {
        self.layers * self.kv_heads
    }
}

impl ExampleRows {
    /// Open the three stages' folders; all must be complete and have as many rows.
    ///
    /// # Errors
    /// A stage is absent, unfinished or damaged, or the stages differ in their number of rows.
    pub fn open(examples: &Path, labels: &Path, features: &FeatureFolders) -> Result<Self> {
        let examples = StageReader::<Example>::open(examples)?;
        let known = |example: Result<Example>| {
            let Example { id, split, tokens, .. } = example?;
            Ok(Known { id, split, positions: tokens.len() })
        };
        let known = examples.iter().map(known).collect::<Result<Vec<_>>>()?;
        let (labels, features) = (StageReader::<LabelRow>::open(labels)?, FeatureSet::open(features)?);
        let checked = |dir: &Path, found: u64, stage: &str| -> Result<()> {
            ensure!(
                found == known.len() as u64,
                hinted(
                    format!("`{}` has {found} rows for {} examples", dir.display(), known.len()),
                    format!("make the stage again with `--redo {stage}`")
                )
            );
            Ok(())
        };
        checked(labels.stage().path(), labels.len(), "label")?;
        checked(features.path(), features.len(), "extract")?;
        let mut this = Self { examples, labels, features, known, sizes: None, most_score: f32::INFINITY };
        if !this.known.is_empty() {
            let (y, x) = this.read(0)?;
            this.sizes = Some(Sizes {
                heads: (x.layers * x.kv_heads) as usize,
                channels: x.channels as usize,
                globals: x.global_channels(),
                layers: y.layers as usize,
                kv_heads: y.kv_heads as usize,
            });
        }
        Ok(this)
    }

    /// Refuse labels above `most`.
    pub fn with_most_score(self, most: f32) -> Self {
        Self { most_score: most, ..self }
    }

    /// The sizes of the first row; none without examples.
    pub const fn sizes(&self) -> Option<Sizes> {
        self.sizes
    }

    /// The split of every row.
    pub fn splits(&self) -> Vec<Split> {
        self.known.iter().map(|k| k.split).collect()
    }

    /// The example's name in row `row`.
    pub fn id(&self, row: u64) -> &str {
        &self.known[row as usize].id
    }

    /// Positions of row `row`.
    pub fn positions(&self, row: u64) -> usize {
        self.known[row as usize].positions
    }

    /// Every choice that the labels depend on.
    pub fn label_fingerprint(&self) -> &Fingerprint {
        self.labels.stage().fingerprint()
    }

    /// # Errors
    /// The shard is damaged, or there is no such row.
    pub fn example(&self, row: u64) -> Result<Example> {
        self.examples.get(row)
    }

    /// Say that row `row` will be read, lower `turn`s first: features that are made when they are read may be
    /// made until then.
    pub fn expect(&self, row: u64, turn: u64) {
        if let Some(known) = self.known.get(row as usize) {
            self.features.expect(row, known.positions, turn);
        }
    }

    /// One reading of row `row` that was expected will not come.
    pub fn forget(&self, row: u64) {
        self.features.forget(row);
    }

    /// Labels and features of row `row`.
    ///
    /// # Errors
    /// A shard is damaged, or label and features are not of this example or not of the first row's sizes.
    pub fn get(&self, row: u64) -> Result<(LabelRow, FeatureRow)> {
        let (label, feature) = self.read(row)?;
        label.check_limit(self.most_score).map_err(|e| {
            let labels = self.labels.stage().path().display();
            e.context(format!("cannot use the labels of row {row}, example `{}`, in `{labels}`", label.id))
        })?;
        let (Some(known), Some(sizes)) = (self.known.get(row as usize), self.sizes) else {
            return Err(anyhow!("there is no row {row} of {} examples", self.known.len()));
        };
        let expected = |heads: usize| (known.id.as_str(), heads, known.positions);
        let found = (label.id.as_str(), (label.layers * label.kv_heads) as usize, label.positions as usize);
        if found != expected(sizes.outputs()) {
            let labels = self.labels.stage().path();
            return Err(self.apart(
                row,
                "labels",
                labels,
                describe(found),
                describe(expected(sizes.outputs())),
            ));
        }
        let found =
            (feature.id.as_str(), (feature.layers * feature.kv_heads) as usize, feature.positions as usize);
        let channels = (feature.channels as usize, feature.global_channels());
        if found != expected(sizes.heads) || channels != (sizes.channels, sizes.globals) {
            let with = |what: String, channels: (usize, usize)| format!("{what}, channels {channels:?}");
            return Err(self.apart(
                row,
                "features",
                self.features.path(),
                with(describe(found), channels),
                with(describe(expected(sizes.heads)), (sizes.channels, sizes.globals)),
            ));
        }
        Ok((label, feature))
    }

    fn read(&self, row: u64) -> Result<(LabelRow, FeatureRow)> {
        Ok((self.labels.get(row)?, self.features.get(row)?))
    }

    fn apart(&self, row: u64, what: &str, dir: &Path, found: String, expected: String) -> Error {
        anyhow!("expected {expected}, found {found}").context(hinted(
            format!(
                "the {what} of row {row} in `{}` do not belong to example `{}`",
                dir.display(),
                self.id(row)
            ),
            "label and extract the examples again: `--redo label`, `--redo extract`",
        ))
    }
}

fn describe((id, heads, positions): (&str, usize, usize)) -> String {
    format!("`{id}` with {heads} KV heads and {positions} positions")
}
