//! A table as one Parquet file: written whole or not at all, read back column by column.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, UInt32Type};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use pkv_core::{hinted, refuse_panics, sha256_hex};
use pkv_files::{WriteBudget, write_file};

/// Write `columns`, each with whether it may hold nulls; zstd, the same bytes for the same values.
///
/// # Errors
/// The folder cannot be written to.
pub fn write_columns(path: &Path, columns: Vec<(&str, bool, ArrayRef)>) -> Result<()> {
    let field = |(name, nullable, values): &(&str, bool, ArrayRef)| {
        Field::new(*name, values.data_type().clone(), *nullable)
    };
    let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
    let encode = || -> Result<Vec<u8>> {
        let batch = RecordBatch::try_new(schema.clone(), columns.into_iter().map(|c| c.2).collect())?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_created_by("proxykv-train".to_owned())
            .build();
        let mut bytes = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut bytes, schema.clone(), Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(bytes)
    };
    let bytes = encode().with_context(|| format!("cannot encode `{}`", path.display()))?;
    write_file(path, &bytes, &WriteBudget::from_env()).map(drop)
}

/// A table that was read.
pub struct Columns {
    batches: Vec<RecordBatch>,
}

impl Columns {
    /// # Errors
    /// The file is absent or no such table.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let batches = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?.build()?;
            Ok(Self { batches: batches.collect::<Result<_, _>>()? })
        };
        refuse_panics(read).map_err(anyhow::Error::from).flatten().with_context(|| {
            hinted(
                format!("cannot read `{}`", path.display()),
                "evaluate again: `proxykv-train eval --redo eval`",
            )
        })
    }

    pub fn has(&self, name: &str) -> bool {
        self.batches.iter().all(|b| b.column_by_name(name).is_some())
    }

    /// Text, empty where null.
    ///
    /// # Errors
    /// There is no such column of text.
    pub fn text(&self, name: &str) -> Result<Vec<String>> {
        self.each(name, &DataType::Utf8, |a| {
            a.as_string::<i32>().iter().map(|v| v.unwrap_or_default().to_owned()).collect()
        })
    }

    /// # Errors
    /// There is no such column of numbers.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        self.each(name, &DataType::Float64, |a| a.as_primitive::<Float64Type>().values().to_vec())
    }

    /// Numbers, absent where null.
    ///
    /// # Errors
    /// There is no such column of numbers.
    pub fn optional_numbers(&self, name: &str) -> Result<Vec<Option<f64>>> {
        self.each(name, &DataType::Float64, |a| a.as_primitive::<Float64Type>().iter().collect())
    }

    /// # Errors
    /// There is no such column of counts.
    pub fn counts(&self, name: &str) -> Result<Vec<u32>> {
        self.each(name, &DataType::UInt32, |a| a.as_primitive::<UInt32Type>().values().to_vec())
    }

    fn each<T>(&self, name: &str, kind: &DataType, of: impl Fn(&dyn Array) -> Vec<T>) -> Result<Vec<T>> {
        let mut out = Vec::new();
        for batch in &self.batches {
            let column = batch.column_by_name(name).filter(|c| c.data_type() == kind);
            out.extend(of(column.with_context(|| format!("there is no column `{name}` of {kind}"))?));
        }
        Ok(out)
    }
}

/// Identity of a context in all evaluations: a hash of its tokens.
pub fn context_id(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    sha256_hex(&bytes)[..16].to_owned()
}
