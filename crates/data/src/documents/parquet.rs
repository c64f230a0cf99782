//! Parquet: one document per row, the text in a string column. Other columns are not read.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use pkv_core::{hinted, refuse_panics};

use super::{Texts, listed};

/// Rows decoded at a time: a row may be a whole book.
const ROWS: usize = 16;

pub(super) fn texts(path: &Path, column: &str) -> Result<Texts> {
    let rows = reader(path, column).with_context(|| format!("cannot read `{}`", path.display()))?;
    Ok(Box::new(Rows { rows, path: path.to_path_buf(), batch: None, done: false }))
}

fn reader(path: &Path, column: &str) -> Result<ParquetRecordBatchReader> {
    let file = File::open(path)?;
    let builder = refuse_panics(|| ParquetRecordBatchReaderBuilder::try_new(file))
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
    if !matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        bail!(hinted(
            format!("its column `{column}` holds {}, not text", field.data_type()),
            "name a column of strings: `text = \"...\"` in the manifest's source"
        ));
    }
    let only = ProjectionMask::roots(builder.parquet_schema(), [index]);
    Ok(builder.with_projection(only).with_batch_size(ROWS).build()?)
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
                        "copy the file again, or write it anew with another codec, such as zstd",
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

    use arrow::array::{Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray};
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
        let kinds: [ArrayRef; 3] = [
            Arc::new(StringArray::from(texts_in.clone())),
            Arc::new(LargeStringArray::from(texts_in.clone())),
            Arc::new(StringViewArray::from_iter(texts_in)),
        ];
        for (i, (strings, codec)) in kinds
            .into_iter()
            .zip([Compression::SNAPPY, Compression::ZSTD(Default::default()), Compression::UNCOMPRESSED])
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
}
