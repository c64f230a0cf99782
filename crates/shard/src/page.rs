//! Columns of scores and features as Parquet pages: numbers of one width in nested lists without nulls.
//!
//! All lists of an axis are equally long, so the levels that say where lists begin are a few runs for each
//! innermost list, and the numbers are stored as they lie in memory. Arrow's own writer finds levels number
//! by number and puts each f16 into a box of its own. Other columns are left to it; reading is Arrow's for
//! all of them.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use half::f16;
use half::slice::HalfFloatSliceExt;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::column::page::{CompressedPage, Page, PageWriter};
use parquet::column::writer::ColumnCloseResult;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::page_index::offset_index::{OffsetIndexMetaData, PageLocation};
use parquet::file::writer::{SerializedPageWriter, SerializedRowGroupWriter, TrackedWrite};
use parquet::schema::types::ColumnDescPtr;
use pkv_core::StoreDtype;

/// A column of a row group, before compression.
pub struct Numbers {
    rows: usize,
    /// Entries of the level lists: a number each, or an empty list.
    entries: usize,
    depth: usize,
    /// Levels of both kinds, each after its length, and the numbers: a data page of version 1.
    page: Vec<u8>,
}

/// A column chunk, ready for its row group.
pub struct NumbersChunk {
    bytes: Bytes,
    close: ColumnCloseResult,
}

impl Numbers {
    /// Rows of axes and row-major numbers; all rows have the same number of axes.
    pub fn new<'a>(rows: impl Iterator<Item = (Vec<usize>, &'a [f32])>, store: StoreDtype) -> Self {
        let rows: Vec<_> = rows.collect();
        let (mut repetition, mut definition) = (Runs::default(), Runs::default());
        for (shape, _) in &rows {
            // A list without elements is an entry of its own, and ends the nesting there.
            let nested = shape.iter().position(|&n| n == 0).unwrap_or(shape.len());
            repeat_levels(&shape[..nested], &mut repetition);
            definition.push(nested as u8, shape[..nested].iter().product());
        }
        let numbers: usize = rows.iter().map(|(_, values)| values.len()).sum();
        let mut page = Vec::with_capacity(numbers * store.bytes() + repetition.bytes.len() + 64);
        let (entries, depth) = (definition.entries, rows.first().map_or(0, |(shape, _)| shape.len()));
        for levels in [repetition.finish(), definition.finish()] {
            page.extend_from_slice(&(levels.len() as u32).to_le_bytes());
            page.extend_from_slice(&levels);
        }
        for (_, values) in &rows {
            append(&mut page, values, store);
        }
        Self { rows: rows.len(), entries, depth, page }
    }

    /// Compress it as the column `descr`.
    ///
    /// # Errors
    /// The column has another number of lists; more bytes than a page can have (2^31).
    pub fn compress(self, descr: &ColumnDescPtr, level: ZstdLevel) -> Result<NumbersChunk> {
        ensure!(
            usize::try_from(descr.max_rep_level()) == Ok(self.depth),
            "{} nested lists for a column of {}",
            self.depth,
            descr.max_rep_level()
        );
        ensure!(i32::try_from(self.page.len()).is_ok(), "a row group holds more than 2^31 bytes in a column");
        let compressed = zstd::bulk::compress(&self.page, level.compression_level())?;
        let page = Page::DataPage {
            buf: compressed.into(),
            num_values: u32::try_from(self.entries).context("a row group holds more than 2^32 numbers")?,
            encoding: Encoding::PLAIN,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        };
        let mut file = TrackedWrite::new(Vec::new());
        let spec =
            SerializedPageWriter::new(&mut file).write_page(CompressedPage::new(page, self.page.len()))?;
        let metadata = ColumnChunkMetaData::builder(descr.clone())
            .set_compression(Compression::ZSTD(level))
            .set_encodings(vec![Encoding::PLAIN, Encoding::RLE])
            .set_total_compressed_size(spec.compressed_size as i64)
            .set_total_uncompressed_size(spec.uncompressed_size as i64)
            .set_num_values(self.entries as i64)
            .set_data_page_offset(spec.offset as i64)
            .build()?;
        let close = ColumnCloseResult {
            bytes_written: spec.bytes_written,
            rows_written: self.rows as u64,
            metadata,
            bloom_filter: None,
            column_index: None,
            offset_index: Some(OffsetIndexMetaData {
                page_locations: vec![PageLocation {
                    offset: spec.offset as i64,
                    compressed_page_size: spec.compressed_size as i32,
                    first_row_index: 0,
                }],
                unencoded_byte_array_data_bytes: None,
            }),
        };
        Ok(NumbersChunk { bytes: file.into_inner()?.into(), close })
    }
}

impl NumbersChunk {
    /// # Errors
    /// The file cannot be written.
    pub fn append_to_row_group<W: Write + Send>(
        self,
        group: &mut SerializedRowGroupWriter<'_, W>,
    ) -> parquet::errors::Result<()> {
        group.append_column(&self.bytes, self.close)
    }
}

/// Beginnings of the lists of one row: an entry's level is the number of lists that it continues.
fn repeat_levels(shape: &[usize], runs: &mut Runs) {
    let Some((&innermost, outer)) = shape.split_last() else { return runs.push(0, 1) };
    for list in 0..outer.iter().product() {
        let mut stride = 1;
        let mut level = 0;
        for (axis, &n) in outer.iter().enumerate().rev() {
            if list / stride % n != 0 {
                level = axis + 1;
                break;
            }
            stride *= n;
        }
        runs.push(level as u8, 1);
        runs.push(shape.len() as u8, innermost - 1);
    }
}

/// Levels below 256 as runs of Parquet's RLE / bit-packing hybrid.
#[derive(Default)]
struct Runs {
    bytes: Vec<u8>,
    level: u8,
    length: usize,
    entries: usize,
}

impl Runs {
    fn push(&mut self, level: u8, length: usize) {
        if length == 0 {
            return;
        }
        if level != self.level {
            self.flush();
            self.level = level;
        }
        self.length += length;
        self.entries += length;
    }

    /// A run is its length, shifted to say that it is one, as a varint; then the level.
    fn flush(&mut self) {
        if self.length == 0 {
            return;
        }
        let mut header = self.length << 1;
        while header >= 0x80 {
            self.bytes.push(header as u8 | 0x80);
            header >>= 7;
        }
        self.bytes.extend([header as u8, self.level]);
        self.length = 0;
    }

    fn finish(mut self) -> Vec<u8> {
        self.flush();
        self.bytes
    }
}

/// Numbers in the order of their bytes that Parquet wants.
fn append(page: &mut Vec<u8>, values: &[f32], store: StoreDtype) {
    const BLOCK: usize = 4096;
    let start = page.len();
    page.resize(start + values.len() * store.bytes(), 0);
    let bytes = &mut page[start..];
    match store {
        StoreDtype::F16 => {
            let mut narrow = [f16::ZERO; BLOCK];
            for (values, bytes) in values.chunks(BLOCK).zip(bytes.chunks_mut(2 * BLOCK)) {
                let narrow = &mut narrow[..values.len()];
                narrow.convert_from_f32_slice(values);
                for (bytes, x) in bytes.as_chunks_mut().0.iter_mut().zip(narrow) {
                    *bytes = x.to_le_bytes();
                }
            }
        }
        StoreDtype::F32 => {
            for (bytes, x) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = x.to_le_bytes();
            }
        }
    }
}
