//! Rows out of shards, at random or in order.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use arrow::array::RecordBatch;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use pkv_core::{StoreDtype, hinted, refuse_panics};
use pkv_files::open_file;

use crate::dir::{StageDir, check_hash, check_size, redo};
use crate::index::{SCHEMA_VERSION, ShardEntry};
use crate::row::Row;

/// Reads a complete stage.
///
/// A shard is compared with its hash the first time it is opened. A row costs one row group; the
/// last one is kept, so rows in order are decoded once.
pub struct StageReader<R: Row> {
    stage: StageDir,
    /// First row of each shard, and the total.
    starts: Vec<u64>,
    state: Mutex<State>,
    rows: PhantomData<fn() -> R>,
}

struct State {
    shards: Vec<Option<Arc<OpenShard>>>,
    /// Shard, row group, and its rows.
    last: Option<(usize, usize, RecordBatch)>,
}

/// A shard whose hash was checked.
struct OpenShard {
    metadata: ArrowReaderMetadata,
    /// First row of each row group, and the total.
    starts: Vec<u64>,
}

impl<R: Row> StageReader<R> {
    /// # Errors
    /// There is no index, it is of another version, or the stage is not complete.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::of(StageDir::read(dir)?)
    }

    pub(crate) fn of(stage: StageDir) -> Result<Self> {
        let dir = stage.path();
        ensure!(
            stage.is_complete(),
            hinted(
                format!(
                    "`{}` is not complete: it has {} {}{}",
                    dir.display(),
                    stage.rows(),
                    R::FILES,
                    stage.index().rows_expected.map_or(String::new(), |n| format!(" of {n}"))
                ),
                format!("continue it with `proxykv-train {}`", stage.index().stage)
            )
        );
        let starts = cumulative(stage.index().shards.iter().map(|s| s.rows));
        let shards = stage.index().shards.iter().map(|_| None).collect();
        Ok(Self { stage, starts, state: Mutex::new(State { shards, last: None }), rows: PhantomData })
    }

    pub fn stage(&self) -> &StageDir {
        &self.stage
    }

    pub fn len(&self) -> u64 {
        self.stage.rows()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `i` of the stage.
    ///
    /// # Errors
    /// There is no such row; its shard is absent, damaged or of another version.
    pub fn get(&self, i: u64) -> Result<R> {
        ensure!(i < self.len(), "row {i} of `{}`, which has {}", self.stage.path().display(), self.len());
        let (shard, in_shard) = locate(&self.starts, i);
        let entry = &self.stage.index().shards[shard];
        // A panic while the lock was held leaves at worst an empty cache.
        let lock = || self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut state = lock();
        let open = match &state.shards[shard] {
            Some(open) => open.clone(),
            None => state.shards[shard].insert(Arc::new(self.open_shard(entry)?)).clone(),
        };
        let (group, in_group) = locate(&open.starts, in_shard);
        let last = match &state.last {
            Some((s, g, batch)) if (*s, *g) == (shard, group) => Some(batch.clone()),
            _ => None,
        };
        // Threads that read rows of different groups decode them side by side.
        drop(state);
        let batch = match last {
            Some(batch) => batch,
            None => {
                let batch = self.read_group(entry, &open, group)?;
                lock().last = Some((shard, group, batch.clone()));
                batch
            }
        };
        // A hash says that a shard is what was written, not that what was written is a score or a feature.
        let read = || {
            let row = R::decode(&batch, in_group as usize)?;
            row.check(StoreDtype::F32).with_context(|| format!("example `{}`", row.id()))?;
            Ok(row)
        };
        read().map_err(|e: anyhow::Error| {
            let failed = format!(
                "cannot read row {in_shard} of shard `{}`",
                self.stage.path().join(&entry.file).display()
            );
            e.context(redo(failed, &self.stage.index().stage))
        })
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<R>> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    fn open_shard(&self, entry: &ShardEntry) -> Result<OpenShard> {
        let (dir, stage) = (self.stage.path(), &self.stage.index().stage);
        let path = check_size(dir, stage, entry)?;
        check_hash(dir, stage, entry)?;
        let read = || -> Result<OpenShard> {
            let metadata = ArrowReaderMetadata::load(&open_file(&path)?, ArrowReaderOptions::new())?;
            let file = metadata.metadata();
            let pairs = file.file_metadata().key_value_metadata();
            let value = |key: &str| {
                pairs.into_iter().flatten().find(|kv| kv.key == key).and_then(|kv| kv.value.as_deref())
            };
            let version = value("proxykv.schema_version").unwrap_or("none");
            ensure!(
                version == SCHEMA_VERSION.to_string(),
                "expected schema version {SCHEMA_VERSION}, found {version}"
            );
            let kind = value("proxykv.rows").unwrap_or("no rows of ours");
            ensure!(kind == R::FILES, "expected {}, found {kind}", R::FILES);
            let starts = cumulative(file.row_groups().iter().map(|g| g.num_rows().max(0) as u64));
            ensure!(
                starts.last() == Some(&entry.rows),
                "expected {} rows, found {}",
                entry.rows,
                starts.last().unwrap_or(&0)
            );
            Ok(OpenShard { metadata, starts })
        };
        refuse_panics(read)
            .map_err(anyhow::Error::from)
            .flatten()
            .with_context(|| redo(format!("cannot read shard `{}`", path.display()), stage))
    }

    fn read_group(&self, entry: &ShardEntry, open: &OpenShard, group: usize) -> Result<RecordBatch> {
        let path = self.stage.path().join(&entry.file);
        let rows = (open.starts[group + 1] - open.starts[group]) as usize;
        let read = || -> Result<RecordBatch> {
            let mut batches =
                ParquetRecordBatchReaderBuilder::new_with_metadata(open_file(&path)?, open.metadata.clone())
                    .with_row_groups(vec![group])
                    .with_batch_size(rows)
                    .build()?;
            let batch = batches.next().context("the row group is empty")??;
            ensure!(batch.num_rows() == rows, "expected {rows} rows, found {}", batch.num_rows());
            Ok(batch)
        };
        refuse_panics(read).map_err(anyhow::Error::from).flatten().with_context(|| {
            redo(
                format!("cannot read row group {group} of shard `{}`", path.display()),
                &self.stage.index().stage,
            )
        })
    }
}

/// 0, n0, n0 + n1, ...
fn cumulative(counts: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut out = vec![0u64];
    for n in counts {
        out.push(out[out.len() - 1].saturating_add(n));
    }
    out
}

/// The part that row `i` is in, and its place there.
fn locate(starts: &[u64], i: u64) -> (usize, u64) {
    let part = starts.partition_point(|&s| s <= i) - 1;
    (part, i - starts[part])
}
