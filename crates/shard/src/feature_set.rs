//! Features of all sources of a recipe, joined row by row into what the mapper reads.
//!
//! Each source is a stage of its own on disk, so that runs share it, or is made row by row as it is read;
//! [`FeatureLayout`] says how they are joined.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use pkv_core::{FeatureLayout, hinted};

use crate::{FeatureRow, StageReader};

/// Rows of one source's features that come from elsewhere than shards. They are what shards would give.
pub trait FeatureSource: Debug + Send + Sync {
    /// Rows, as many as there are examples.
    fn rows(&self) -> u64;

    /// Features of example `i`, on any thread.
    ///
    /// # Errors
    /// They cannot be made.
    fn row(&self, i: u64) -> Result<FeatureRow>;

    /// Example `i`, of `positions` positions, will be read: its features may be made until then. Lower
    /// `turn`s are read first.
    fn expect(&self, _i: u64, _positions: usize, _turn: u64) {}

    /// One reading of example `i` that was expected will not come.
    fn forget(&self, _i: u64) {}

    /// Path at which they would be stored, for messages.
    fn path(&self) -> &Path;
}

/// Origin of one source's features.
#[derive(Clone, Debug)]
pub enum FeaturesFrom {
    /// The shards in a folder.
    Folder(PathBuf),
    Source(Arc<dyn FeatureSource>),
}

/// Feature folders of a run.
#[derive(Clone, Debug)]
pub struct FeatureFolders {
    /// One for each source, in the layout's order.
    parts: Vec<FeaturesFrom>,
    /// Absent if there is one source: its rows are the mapper's input as they are stored.
    layout: Option<FeatureLayout>,
}

impl FeatureFolders {
    /// The features of one source.
    pub fn one(dir: &Path) -> Self {
        Self { parts: vec![FeaturesFrom::Folder(dir.to_path_buf())], layout: None }
    }

    /// Those of the sources of `layout`, `parts` in its order.
    ///
    /// # Panics
    /// The two differ in length.
    pub fn of(parts: Vec<FeaturesFrom>, layout: FeatureLayout) -> Self {
        assert_eq!(parts.len(), layout.sources().len(), "a place for each source");
        let layout = (parts.len() > 1).then_some(layout);
        Self { parts, layout }
    }
}

/// Reads the features of all sources.
pub struct FeatureSet {
    parts: Vec<Arc<dyn FeatureSource>>,
    layout: Option<FeatureLayout>,
}

impl FeatureSet {
    /// # Errors
    /// A stage is absent or not complete, or the sources differ in their number of rows.
    pub fn open(folders: &FeatureFolders) -> Result<Self> {
        let open = |part: &FeaturesFrom| -> Result<Arc<dyn FeatureSource>> {
            Ok(match part {
                FeaturesFrom::Folder(dir) => Arc::new(Shards(StageReader::open(dir)?)),
                FeaturesFrom::Source(source) => Arc::clone(source),
            })
        };
        let parts = folders.parts.iter().map(open).collect::<Result<Vec<_>>>()?;
        for part in &parts[1..] {
            ensure!(
                part.rows() == parts[0].rows(),
                hinted(
                    format!(
                        "`{}` has features of {} examples, `{}` of {}",
                        parts[0].path().display(),
                        parts[0].rows(),
                        part.path().display(),
                        part.rows()
                    ),
                    "make them anew from the same examples: `--redo extract`"
                )
            );
        }
        Ok(Self { parts, layout: folders.layout.clone() })
    }

    pub fn len(&self) -> u64 {
        self.parts[0].rows()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first source's folder, for messages.
    pub fn path(&self) -> &Path {
        self.parts[0].path()
    }

    /// As [`FeatureSource::expect`], of every source.
    pub fn expect(&self, i: u64, positions: usize, turn: u64) {
        self.parts.iter().for_each(|part| part.expect(i, positions, turn));
    }

    /// As [`FeatureSource::forget`], of every source.
    pub fn forget(&self, i: u64) {
        self.parts.iter().for_each(|part| part.forget(i));
    }

    /// Features of example `i`. Those of several sources are one row of one layer: the heads of all, channels
    /// and globals as the layout says, 0 where a source lacks a channel.
    ///
    /// # Errors
    /// A shard is damaged, or the sources' rows are of different examples or have other channels than the
    /// layout.
    pub fn get(&self, i: u64) -> Result<FeatureRow> {
        let Some(layout) = &self.layout else { return self.parts[0].row(i) };
        let rows = self.parts.iter().map(|part| part.row(i)).collect::<Result<Vec<_>>>()?;
        join(&rows, layout).map_err(|found| {
            hinted(
                format!(
                    "the features of row {i} in `{}` do not belong together: {found}",
                    self.path().display()
                ),
                "make them anew from the same examples: `--redo extract`",
            )
            .into()
        })
    }
}

struct Shards(StageReader<FeatureRow>);

impl Debug for Shards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shards({})", self.path().display())
    }
}

impl FeatureSource for Shards {
    fn rows(&self) -> u64 {
        self.0.len()
    }

    fn row(&self, i: u64) -> Result<FeatureRow> {
        self.0.get(i)
    }

    fn path(&self) -> &Path {
        self.0.stage().path()
    }
}

/// One row of the rows of all sources, or what does not fit.
fn join(rows: &[FeatureRow], layout: &FeatureLayout) -> Result<FeatureRow, String> {
    let (id, t) = (&rows[0].id, rows[0].positions as usize);
    let channels = layout.channels().len();
    let heads_of = |row: &FeatureRow| (row.layers * row.kv_heads) as usize;
    let n_heads: usize = rows.iter().map(heads_of).sum();
    let mut heads = vec![0.0; n_heads * channels * t];
    let mut globals = Vec::with_capacity(layout.globals() * t);
    let mut first = 0;
    for (row, source) in rows.iter().zip(layout.sources()) {
        if row.id != *id || row.positions as usize != t {
            return Err(format!("`{}` with {} positions beside `{id}` with {t}", row.id, row.positions));
        }
        if row.channels as usize != source.slots.len() {
            let (name, expected) = (source.source.name(), source.slots.len());
            return Err(format!("{} channels of the {name}, expected {expected}", row.channels));
        }
        for (from, values) in row.heads.chunks_exact(t.max(1)).enumerate() {
            let (head, channel) =
                (first + from / source.slots.len(), source.slots[from % source.slots.len()]);
            let at = (head * channels + channel) * t;
            heads[at..at + t].copy_from_slice(values);
        }
        for &global in &source.globals {
            let values = row.globals.get(global * t..(global + 1) * t);
            globals.extend_from_slice(values.ok_or_else(|| format!("there is no global channel {global}"))?);
        }
        first += heads_of(row);
    }
    Ok(FeatureRow {
        id: id.clone(),
        layers: 1,
        kv_heads: n_heads as u32,
        channels: channels as u32,
        positions: t as u32,
        heads,
        globals,
    })
}

#[cfg(test)]
mod tests {
    use pkv_core::{Channel, GlobalChannel, Source};

    use super::*;

    fn row(kv_heads: u32, channels: u32, base: f32) -> FeatureRow {
        let n = (2 * kv_heads * channels * 3) as usize;
        FeatureRow {
            id: "a".into(),
            layers: 2,
            kv_heads,
            channels,
            positions: 3,
            heads: (0..n).map(|i| base + i as f32).collect(),
            globals: (0..6).map(|i| base / 10.0 + i as f32).collect(),
        }
    }

    #[test]
    fn rows_of_two_sources_lie_where_the_layout_says() {
        let layout = FeatureLayout::new(
            &[(Source::Target, &[Channel::KeyNorm, Channel::MaxAll]), (Source::Proxy, &[Channel::MaxAll])],
            &[GlobalChannel::Surprisal, GlobalChannel::Position],
        );
        let (target, proxy) = (row(1, 2, 100.0), row(2, 1, 500.0));
        let joined = join(&[target.clone(), proxy.clone()], &layout).unwrap();
        assert_eq!((joined.layers, joined.kv_heads, joined.channels, joined.global_channels()), (1, 6, 2, 3));
        assert_eq!(joined.heads[..12], target.heads);
        // Head 0 of the proxy is head 2: no key norm, then its own channel.
        assert_eq!(joined.heads[12..18], [0.0, 0.0, 0.0, 500.0, 501.0, 502.0]);
        assert_eq!(joined.globals[..6], target.globals);
        assert_eq!(joined.globals[6..], proxy.globals[..3]);
        let other = FeatureRow { id: "b".into(), ..proxy.clone() };
        assert!(join(&[target.clone(), other], &layout).unwrap_err().contains("`b`"));
        let fewer = FeatureRow { channels: 3, ..proxy };
        assert!(join(&[target, fewer], &layout).unwrap_err().contains("3 channels of the proxy"));
    }
}
