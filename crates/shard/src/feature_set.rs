//! Features of all sources of a recipe, joined row by row into what the mapper reads.
//!
//! Each source is a stage of its own on disk, so that runs share it; [`FeatureLayout`] says how they are joined.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use pkv_core::{FeatureLayout, hinted};

use crate::{FeatureRow, StageReader};

/// Where the features of a run are.
#[derive(Clone, Debug)]
pub struct FeatureFolders {
    /// One folder for each source, in the layout's order.
    dirs: Vec<PathBuf>,
    /// Absent if there is one source: its rows are the mapper's input as they are stored.
    layout: Option<FeatureLayout>,
}

impl FeatureFolders {
    /// The features of one source.
    pub fn one(dir: &Path) -> Self {
        Self { dirs: vec![dir.to_path_buf()], layout: None }
    }

    /// Those of the sources of `layout`, `dirs` in its order.
    ///
    /// # Panics
    /// The two differ in length.
    pub fn of(dirs: Vec<PathBuf>, layout: FeatureLayout) -> Self {
        assert_eq!(dirs.len(), layout.sources().len(), "a folder for each source");
        let layout = (dirs.len() > 1).then_some(layout);
        Self { dirs, layout }
    }
}

/// Reads the features of all sources.
pub struct FeatureSet {
    parts: Vec<StageReader<FeatureRow>>,
    layout: Option<FeatureLayout>,
}

impl FeatureSet {
    /// # Errors
    /// A stage is absent or not complete, or the sources differ in their number of rows.
    pub fn open(folders: &FeatureFolders) -> Result<Self> {
        let parts =
            folders.dirs.iter().map(|dir| StageReader::open(dir)).collect::<Result<Vec<StageReader<_>>>>()?;
        for part in &parts[1..] {
            ensure!(
                part.len() == parts[0].len(),
                hinted(
                    format!(
                        "`{}` has features of {} examples, `{}` of {}",
                        parts[0].stage().path().display(),
                        parts[0].len(),
                        part.stage().path().display(),
                        part.len()
                    ),
                    "make them anew from the same examples: `--redo extract`"
                )
            );
        }
        Ok(Self { parts, layout: folders.layout.clone() })
    }

    pub fn len(&self) -> u64 {
        self.parts[0].len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first source's folder, for messages.
    pub fn path(&self) -> &Path {
        self.parts[0].stage().path()
    }

    /// Features of example `i`. Those of several sources are one row of one layer: the heads of all, channels and
    /// globals as the layout says, 0 where a source lacks a channel.
    ///
    /// # Errors
    /// A shard is damaged, or the sources' rows are of different examples or have other channels than the layout.
    pub fn get(&self, i: u64) -> Result<FeatureRow> {
        let Some(layout) = &self.layout else { return self.parts[0].get(i) };
        let rows = self.parts.iter().map(|part| part.get(i)).collect::<Result<Vec<_>>>()?;
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
