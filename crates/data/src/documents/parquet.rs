//! Parquet: one document per row, the text in a string column. Other columns are not read.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::ParquetMetaData;
use parquet::schema::types::ColumnPath;
use pkv_core::{foreign, hinted, refuse_panics};

use super::{Texts, listed};

/// Rows decoded at a time: a row may be a whole book.
const ROWS: usize = 16;

/// A column of a row group that is larger, and so much larger than on disk, is refused.
const GROWN_BYTES: i64 = 128 << 20;
const GROWTH: i64 = 200;

pub(super) fn texts(path: &Path, column: &str) -> Result<Texts> {
    let rows = reader(path, column).with_context(|| format!("cannot read `{}`", path.display()))?;
    Ok(Box::new(Rows { rows, path: path.to_path_buf(), batch: None, done: false }))
}

fn reader(path: &Path, column: &str) -> Result<ParquetRecordBatchReader> {
    pkv_core::check_regular(path)?;
    let mut file = File::open(path)?;
    let mut head = [0; 512];
    let n = file.read(&mut head)?;
    if let Some((what, hint)) = foreign(&head[..n]).filter(|_| !head.starts_with(b"PAR1")) {
        bail!(hinted(format!("it is {what}"), hint));
    }
    ensure!(
        !head.starts_with(b"PARE"),
        hinted("it is an encrypted Parquet file", "write it without encryption")
    );
    // Without the Arrow schema that its writer had in mind: its categories of texts are texts.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = refuse_panics(|| ParquetRecordBatchReaderBuilder::try_new_with_options(file, options))
        .map_err(anyhow::Error::from)
        .and_then(|opened| Ok(opened?))
        .with_context(|| {
            hinted(
                "it is no Parquet file, or was cut off",
                "check `format` in the manifest, or copy the file again",
            )
        })?;
    let fields = builder.schema().fields();
    let Some((index, field)) = fields.iter().enumerate().find(|(_, f)| f.name() == column) else {
        bail!(hinted(
            format!(
                "it has no column `{column}`; its columns are {}",
                listed(fields.iter().map(|f| f.name().as_str()))
            ),
            "name the column that holds the text: `text = \"...\"` in the manifest's source"
        ));
    };
    let same = fields.iter().filter(|f| f.name() == column).count();
    ensure!(
        same == 1,
        hinted(format!("it has {same} columns `{column}`"), "write it again with one column of that name")
    );
    if !matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        bail!(hinted(
            format!("its column `{column}` holds {}, not text", field.data_type()),
            "name a column of strings: `text = \"...\"` in the manifest's source"
        ));
    }
    check_growth(builder.metadata(), column)?;
    let only = ProjectionMask::roots(builder.parquet_schema(), [index]);
    Ok(builder.with_projection(only).with_batch_size(ROWS).build()?)
}

/// # Errors
/// The column becomes so much larger when it is read that it was made to fill the memory: a page is unpacked
/// as a whole, and texts never shrink that far.
fn check_growth(metadata: &ParquetMetaData, column: &str) -> Result<()> {
    let path = ColumnPath::from(column.to_owned());
    let chunks = metadata.row_groups().iter().flat_map(|group| group.columns());
    for chunk in chunks.filter(|chunk| *chunk.column_path() == path) {
        let (stored, unpacked) = (chunk.compressed_size().max(1), chunk.uncompressed_size());
        ensure!(
            unpacked < GROWN_BYTES || unpacked / stored < GROWTH,
            hinted(
                format!("{stored} bytes of its column `{column}` claim to be {unpacked} bytes of text"),
                "it repeats one text; write it with `row_group_size=1000`, or leave it out"
            )
        );
    }
    Ok(())
}

struct Rows {
    rows: ParquetRecordBatchReader,
    path: PathBuf,
    /// Strings that were decoded, and how many of them were handed over.
    batch: Option<(ArrayRef, usize)>,
    done: bool,
}

impl Iterator for Rows {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        while !self.done {
            if let Some((strings, i)) = self.batch.take().filter(|(s, i)| *i < s.len()) {
                let text = string(&strings, i).to_owned();
                self.batch = Some((strings, i + 1));
                return Some(Ok(text));
            }
            let next = refuse_panics(|| self.rows.next()).unwrap_or_else(|e| Some(Err(e.into())));
            match next {
                Some(Ok(batch)) => self.batch = Some((batch.column(0).clone(), 0)),
                Some(Err(e)) => {
                    self.done = true;
                    let context = hinted(
                        format!("cannot read `{}`", self.path.display()),
                        "copy the file again, or write it anew with another codec, such as zstd; its texts must be UTF-8",
                    );
                    return Some(Err(anyhow::Error::from(e).context(context)));
                }
                None => self.done = true,
            }
        }
        None
    }
}

/// A null counts as empty text.
fn string(strings: &ArrayRef, i: usize) -> &str {
    if strings.is_null(i) {
        return "";
    }
    match strings.data_type() {
        DataType::LargeUtf8 => strings.as_string::<i64>().value(i),
        DataType::Utf8View => strings.as_string_view().value(i),
        _ => strings.as_string::<i32>().value(i),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{
        DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
    };
    use arrow::datatypes::{Field, Int32Type, Schema};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::Compression;
    use parquet::file::properties::WriterProperties;

    use super::*;

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>, compression: Compression) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer =
            ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn every_kind_of_string_column_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let texts_in: Vec<_> = (0..40).map(|i| (i != 7).then(|| format!("document {i}"))).collect();
        let wanted: Vec<_> = texts_in.iter().map(|t| t.clone().unwrap_or_default()).collect();
        let categories: DictionaryArray<Int32Type> = texts_in.iter().map(Option::as_deref).collect();
        let kinds: [ArrayRef; 4] = [
            Arc::new(categories),
            Arc::new(StringArray::from(texts_in.clone())),
            Arc::new(LargeStringArray::from(texts_in.clone())),
            Arc::new(StringViewArray::from_iter(texts_in)),
        ];
        for (i, (strings, codec)) in kinds
            .into_iter()
            .zip([
                Compression::LZ4_RAW,
                Compression::SNAPPY,
                Compression::ZSTD(Default::default()),
                Compression::UNCOMPRESSED,
            ])
            .enumerate()
        {
            let path = dir.path().join(format!("{i}.parquet"));
            let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..40));
            write(&path, vec![("id", ids), ("body", strings)], codec);
            let found: Vec<_> = texts(&path, "body").unwrap().map(Result::unwrap).collect();
            assert_eq!(found, wanted, "kind {i}");
        }
    }

    #[test]
    fn a_missing_column_lists_those_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let ids: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        write(&path, vec![("id", ids.clone()), ("size", ids)], Compression::SNAPPY);
        let error = |column| format!("{:#}", texts(&path, column).err().unwrap());
        assert!(
            error("text").contains("it has no column `text`; its columns are `id`, `size`"),
            "{}",
            error("text")
        );
        assert!(error("size").contains("its column `size` holds Int64, not text"), "{}", error("size"));
        std::fs::write(&path, "PAR1 no more").unwrap();
        assert!(error("text").contains("it is no Parquet file, or was cut off"), "{}", error("text"));
    }

    #[test]
    fn what_is_no_table_of_texts_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let refused = || format!("{:#}", texts(&path, "text").err().unwrap());
        for (head, what) in [
            (&b"version https://git-lfs.github.com/spec/v1"[..], "it is a pointer of Git LFS"),
            (b"PARE12345678PARE", "it is an encrypted Parquet file"),
        ] {
            std::fs::write(&path, head).unwrap();
            assert!(refused().contains(what), "{}", refused());
        }

        let column: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
        let fields = vec![Field::new("text", DataType::Utf8, true); 2];
        let batch =
            RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![column.clone(), column]).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        assert!(refused().contains("it has 2 columns `text`"), "{}", refused());
    }

    #[test]
    fn a_column_that_fills_the_memory_is_refused_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let same: ArrayRef = Arc::new(StringArray::from(vec!["a".repeat(2 << 20); 70]));
        let properties = WriterProperties::builder().set_dictionary_enabled(false);
        let properties = properties.set_compression(Compression::ZSTD(Default::default())).build();
        let batch = RecordBatch::try_from_iter([("text", same)]).unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let error = format!("{:#}", texts(&path, "text").err().unwrap());
        assert!(error.contains("claim to be 1468"), "{error}");
    }
}
