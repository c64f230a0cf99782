//! Rows in, shards out.
//!
//! Encoding a row group, which is mostly compression, may take longer than a GPU takes to compute the rows of
//! a small pair. Row groups are therefore encoded side by side, a thread each, and appended in their order:
//! the bytes are the same for any number of threads.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::{
    ArrowColumnChunk, ArrowColumnWriter, ArrowRowGroupWriterFactory, compute_leaves,
};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::ColumnDescPtr;
use pkv_core::{Fingerprint, StoreDtype};

use crate::dir::StageDir;
use crate::index::{SCHEMA_VERSION, ShardEntry};
use crate::page::NumbersChunk;
use crate::reader::StageReader;
use crate::row::{Column, Row};
use pkv_files::{DurableFile, WriteBudget, WriteFailure, own_temporary, write_error, write_error_of_kind};

/// Raw bytes after which a row group ends. Training reads single rows at random and decodes the
/// row group around them, so it is a few rows of a small pair and one row of a big one.
const ROW_GROUP_BYTES: usize = 256 << 10;

/// Most row groups that are encoded at once: with one row of a big pair each, most of the writer's memory.
const MOST_THREADS: usize = 8;

/// Writes a stage's rows in order, `shard_rows` to a shard.
///
/// Continues after [`StageWriter::rows`]; the caller skips those. Dropped without [`StageWriter::finish`] or
/// [`StageWriter::keep`], it leaves the whole shards and no temporary file.
///
/// ```
/// use pkv_core::{Fingerprint, StoreDtype};
/// use pkv_shard::{LabelRow, StageDir, StageReader, StageWriter};
///
/// let dir = tempfile::tempdir()?;
/// let stage = StageDir::open(dir.path(), "label", &Fingerprint::new().with("preset", "original"))?;
/// let mut writer = StageWriter::new(stage, 8, StoreDtype::F16, Some(1))?;
/// let scores = vec![0.25, 0.5];
/// writer.push(LabelRow { id: "a".to_owned(), layers: 1, kv_heads: 1, positions: 2, scores })?;
/// writer.finish()?;
/// assert_eq!(StageReader::<LabelRow>::open(dir.path())?.get(0)?.scores, [0.25, 0.5]);
/// # Ok::<(), anyhow::Error>(())
/// ```
pub struct StageWriter<R: Row> {
    stage: StageDir,
    shard_rows: usize,
    shard: ShardWriter<R>,
}

/// Writes rows in order to one shard.
pub(crate) struct ShardWriter<R: Row> {
    store: StoreDtype,
    /// Rows of the row group to come.
    pending: Vec<R>,
    pending_bytes: usize,
    open: Option<OpenShard>,
}

/// Where a shard goes, and what it says of itself.
pub(crate) struct ShardPlace<'a> {
    pub dir: &'a Path,
    pub number: u64,
    pub stage: &'a str,
    pub fingerprint: &'a Fingerprint,
    pub budget: &'a WriteBudget,
    /// Where other processes write shards of the stage too: the folder of temporary files, each with a name
    /// of its own.
    pub temporary: Option<&'a Path>,
}

/// A shard under its temporary name.
struct OpenShard {
    file: String,
    path: PathBuf,
    writer: SerializedFileWriter<DurableFile>,
    groups: ArrowRowGroupWriterFactory,
    /// Row groups on their way, in order.
    encoding: VecDeque<JoinHandle<Result<Vec<Chunk>>>>,
    failure: WriteFailure,
    /// Row groups begun, and their rows.
    begun: usize,
    rows: usize,
}

/// An encoded column of a row group.
enum Chunk {
    Array(ArrowColumnChunk),
    Numbers(NumbersChunk),
}

impl<R: Row> StageWriter<R> {
    /// `store` is the width of scores and features; `rows_expected` lets [`StageWriter::finish`]
    /// notice a stage that ends early.
    ///
    /// # Errors
    /// The stage is complete already, `shard_rows` is 0, or the index cannot be written.
    pub fn new(
        mut stage: StageDir,
        shard_rows: usize,
        store: StoreDtype,
        rows_expected: Option<u64>,
    ) -> Result<Self> {
        ensure!(shard_rows > 0, "a shard must have at least one row");
        ensure!(!stage.is_complete(), "`{}` is complete already", stage.path().display());
        if stage.index().rows_expected != rows_expected {
            stage.update(|index| index.rows_expected = rows_expected)?;
        }
        let rest = stage.rest();
        let mut this = Self { stage, shard_rows, shard: ShardWriter::new(store) };
        // They are encoded again, so that the shard has the bytes that it has without a stop.
        if let Some(rest) = rest {
            let rows = StageReader::of(rest).and_then(|rest| rest.iter().collect::<Result<Vec<R>>>());
            match rows {
                Ok(rows) => rows.into_iter().try_for_each(|row| this.push(row))?,
                Err(e) => {
                    tracing::warn!("rows that an earlier process kept are made again: {e:#}");
                    this.stage.update(|index| index.rest = None)?;
                }
            }
        }
        Ok(this)
    }

    /// Rows that are there, those of the shard at work included.
    pub fn rows(&self) -> u64 {
        self.stage.rows() + self.shard.rows() as u64
    }

    /// The stage, with the shards that are whole.
    pub fn stage(&self) -> &StageDir {
        &self.stage
    }

    /// Add the next row.
    ///
    /// # Errors
    /// The row contradicts itself or holds a number that cannot be stored; the disk is full or
    /// fails. The index stays consistent, and the folder can be reopened and continued.
    pub fn push(&mut self, row: R) -> Result<()> {
        check_row(&row, self.shard.store)?;
        self.shard.push(row, &place(&self.stage))?;
        if self.shard.rows() == self.shard_rows {
            self.close_shard()?;
        }
        Ok(())
    }

    /// Write the last shard and mark the stage complete.
    ///
    /// # Errors
    /// The disk is full or fails, or there are fewer or more rows than expected.
    pub fn finish(mut self) -> Result<StageDir> {
        self.close_shard()?;
        let (found, expected) = (self.stage.rows(), self.stage.index().rows_expected);
        if let Some(expected) = expected {
            ensure!(
                found == expected,
                "`{}` has {found} {}, expected {expected}",
                self.stage.path().display(),
                R::FILES
            );
        }
        // Complete is what is there, not what was written.
        self.stage.check_files()?;
        self.stage.update(|index| index.complete = true)?;
        Ok(self.stage)
    }

    /// Keep the rows of the shard at work beside the whole ones: the next writer goes on after them. For a
    /// process that ends before the stage does.
    ///
    /// # Errors
    /// The disk is full or fails; the whole shards are safe.
    pub fn keep(mut self) -> Result<()> {
        match self.shard.publish(&place(&self.stage))? {
            Some(entry) => self.stage.update(|index| index.rest = Some(entry)),
            None => Ok(()),
        }
    }

    /// The open shard gets its name, then its entry in the index.
    fn close_shard(&mut self) -> Result<()> {
        let Some(entry) = self.shard.publish(&place(&self.stage))? else { return Ok(()) };
        self.stage.update(|index| {
            index.shards.push(entry);
            index.rest = None;
        })
    }
}

/// The place of the shard at work.
fn place(stage: &StageDir) -> ShardPlace<'_> {
    let index = stage.index();
    ShardPlace {
        dir: stage.path(),
        number: index.shards.len() as u64,
        stage: &index.stage,
        fingerprint: &index.fingerprint,
        budget: stage.write_budget(),
        temporary: None,
    }
}

/// # Errors
/// The row contradicts itself or holds a number that cannot be stored; the error names its example.
pub fn check_row<R: Row>(row: &R, store: StoreDtype) -> Result<()> {
    row.check(store).with_context(|| format!("cannot store the {} of example `{}`", R::FILES, row.id()))
}

impl<R: Row> ShardWriter<R> {
    pub fn new(store: StoreDtype) -> Self {
        Self { store, pending: Vec::new(), pending_bytes: 0, open: None }
    }

    /// Rows that were given.
    pub fn rows(&self) -> usize {
        self.pending.len() + self.open.as_ref().map_or(0, |s| s.rows)
    }

    /// Add a row that was checked.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn push(&mut self, row: R, place: &ShardPlace) -> Result<()> {
        let bytes = row.raw_bytes(self.store);
        if !self.pending.is_empty() && self.pending_bytes + bytes > ROW_GROUP_BYTES {
            self.write_group(place)?;
        }
        self.pending.push(row);
        self.pending_bytes += bytes;
        Ok(())
    }

    /// Pending rows become one row group.
    fn write_group(&mut self, place: &ShardPlace) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        let shard = match &mut self.open {
            Some(shard) => shard,
            None => {
                let shard = open_shard::<R>(place, self.store)?;
                self.open.insert(shard)
            }
        };
        let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_THREADS);
        let begun = shard.begin(rows, self.store).and_then(|()| shard.append(threads - 1));
        if begun.is_err() {
            self.open = None;
        }
        begun
    }

    /// The shard gets its name; `None` if no row was given.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn publish(&mut self, place: &ShardPlace) -> Result<Option<ShardEntry>> {
        self.write_group(place)?;
        let Some(mut shard) = self.open.take() else { return Ok(None) };
        shard.append(0)?;
        let OpenShard { file, path, writer, failure, rows, .. } = shard;
        let durable = writer.into_inner().map_err(|e| encode_error(&path, &failure, e))?;
        let published = durable.publish().map_err(|e| write_error(&path, e))?;
        Ok(Some(ShardEntry { file, rows: rows as u64, bytes: published.bytes, sha256: published.sha256 }))
    }
}

impl OpenShard {
    /// Encode `rows` as the next row group, on a thread of its own.
    fn begin<R: Row>(&mut self, rows: Vec<R>, store: StoreDtype) -> Result<()> {
        let columns = self.groups.create_column_writers(self.begun);
        let columns = columns.map_err(|e| encode_error(&self.path, &self.failure, e))?;
        let leaves = self.writer.schema_descr().columns().to_vec();
        self.begun += 1;
        self.rows += rows.len();
        let encode = thread::Builder::new().name("encode".to_owned());
        let encode = encode.spawn(move || encode_group(&rows, store, columns, &leaves));
        self.encoding.push_back(encode.context("starting a thread to encode a row group")?);
        Ok(())
    }

    /// Append row groups in their order until at most `waiting` are on their way.
    fn append(&mut self, waiting: usize) -> Result<()> {
        while self.encoding.len() > waiting
            && let Some(group) = self.encoding.pop_front()
        {
            let columns = group.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let columns =
                columns.with_context(|| format!("cannot encode rows for `{}`", self.path.display()))?;
            let mut written = self.writer.next_row_group().and_then(|mut group| {
                columns.into_iter().try_for_each(|column| match column {
                    Chunk::Array(column) => column.append_to_row_group(&mut group),
                    Chunk::Numbers(column) => column.append_to_row_group(&mut group),
                })?;
                group.close().map(drop)
            });
            if written.is_ok() {
                written = self.writer.flush().map_err(Into::into);
            }
            written.map_err(|e| encode_error(&self.path, &self.failure, e))?;
        }
        Ok(())
    }
}

/// The column chunks of one row group, a writer and a description for each.
fn encode_group<R: Row>(
    rows: &[R],
    store: StoreDtype,
    writers: Vec<ArrowColumnWriter>,
    leaves: &[ColumnDescPtr],
) -> Result<Vec<Chunk>> {
    let mut chunks = Vec::with_capacity(leaves.len());
    let mut leaves = writers.into_iter().zip(leaves);
    let mut next = || leaves.next().context("more columns than the schema has");
    for (field, column) in R::schema(store).fields().iter().zip(R::encode(rows, store)?) {
        match column {
            Column::Array(array) => {
                for leaf in compute_leaves(field, &array)? {
                    let (mut writer, _) = next()?;
                    writer.write(&leaf)?;
                    chunks.push(Chunk::Array(writer.close()?));
                }
            }
            Column::Numbers(numbers) => {
                chunks.push(Chunk::Numbers(numbers.compress(next()?.1, zstd_level()?)?))
            }
        }
    }
    Ok(chunks)
}

/// Of features of f16, 1 takes a fifth less time and a tenth more of the disk; encoding is no bottleneck at
/// either.
fn zstd_level() -> Result<ZstdLevel> {
    ZstdLevel::try_new(3).context("zstd level 3")
}

fn open_shard<R: Row>(place: &ShardPlace, store: StoreDtype) -> Result<OpenShard> {
    let file = format!("{}-{:05}.parquet", R::FILES, place.number);
    let path = place.dir.join(&file);
    let meta = |key: &str, value: String| KeyValue::new(format!("proxykv.{key}"), value);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(zstd_level()?))
        // Scores and features hardly repeat, so a dictionary would be built and thrown away; and
        // they are never searched by value.
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_key_value_metadata(Some(vec![
            meta("schema_version", SCHEMA_VERSION.to_string()),
            meta("rows", R::FILES.to_owned()),
            meta("stage", place.stage.to_owned()),
            meta("fingerprint", serde_json::to_string(place.fingerprint)?),
        ]))
        .build();
    let budget = place.budget.clone();
    let durable = match place.temporary {
        Some(folder) => DurableFile::create_as(&path, own_temporary(folder, &path), budget),
        None => DurableFile::create(&path, budget),
    };
    let durable = durable.map_err(|e| write_error(&path, e))?;
    let failure = durable.failure();
    let (writer, groups) = ArrowWriter::try_new(durable, R::schema(store), Some(properties))
        .and_then(ArrowWriter::into_serialized_writer)
        .map_err(|e| encode_error(&path, &failure, e))?;
    Ok(OpenShard { file, path, writer, groups, encoding: VecDeque::new(), failure, begun: 0, rows: 0 })
}

/// The disk's error if there was one, the encoder's otherwise.
fn encode_error(path: &Path, failure: &WriteFailure, error: ParquetError) -> anyhow::Error {
    write_error_of_kind(path, failure.kind().unwrap_or(ErrorKind::Other), error.into())
}
