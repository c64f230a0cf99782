//! Rows of a data set, whatever its file: JSON lines, one JSON array, or Parquet with nested columns.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::hinted;
use serde_json::Value;

/// Every row of `path` as JSON, in order; columns that are null are absent.
///
/// # Errors
/// The file is absent, damaged, or of another kind than its name says (`.jsonl`, `.json`, `.parquet`).
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let rows = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => lines(path),
        Some("json") => match json(path)? {
            Value::Array(rows) => Ok(rows),
            _ => bail!("`{}` is no JSON array of rows", path.display()),
        },
        Some("parquet") => parquet(path),
        _ => bail!(hinted(
            format!("`{}` is no file of a data set that can be read", path.display()),
            "give a `.jsonl`, `.json` or `.parquet` file"
        )),
    };
    rows.with_context(|| format!("reading the data set `{}`", path.display()))
}

/// A whole JSON file.
///
/// # Errors
/// The file is absent or no JSON.
pub fn json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path)?;
    let line = |(i, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("line {} is no JSON", i + 1))
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect()
}

fn parquet(path: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    // Contexts are megabytes each: a few rows at a time.
    for batch in ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?.with_batch_size(16).build()? {
        let mut writer = arrow::json::ArrayWriter::new(Vec::new());
        writer.write(&batch?)?;
        writer.finish()?;
        let values: Vec<Value> = serde_json::from_slice(&writer.into_inner())?;
        rows.extend(values);
    }
    Ok(rows)
}

/// A text column of a row.
///
/// # Errors
/// It is absent or no text.
pub fn text<'a>(row: &'a Value, column: &str) -> Result<&'a str> {
    row.get(column).and_then(Value::as_str).with_context(|| {
        let columns: Vec<&str> =
            row.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default();
        format!("column `{column}` is absent or no text; the columns are {}", columns.join(", "))
    })
}

/// A list column of a row; empty where it is absent.
pub fn list<'a>(row: &'a Value, column: &str) -> &'a [Value] {
    row.get(column).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// A scalar as text: texts as they are, numbers as JSON writes them.
pub fn spell(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::json::ReaderBuilder;
    use parquet::arrow::ArrowWriter;
    use std::io::Cursor;
    use std::sync::Arc;

    #[test]
    fn every_kind_of_file_gives_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [
            r#"{"id":1,"context":"a\nb","multi_turns":[{"input":"q","answer":"x"},{"input":"r","answer":"y"}]}"#,
            r#"{"id":2,"context":"c","multi_turns":[{"input":"s","answer":"z"}]}"#,
        ];
        let wanted: Vec<Value> = rows.iter().map(|r| serde_json::from_str(r).unwrap()).collect();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a.jsonl"), rows.join("\n") + "\n\n").unwrap();
        fs::write(path("a.json"), format!("[{}]", rows.join(","))).unwrap();
        let text = rows.join("\n");
        let (schema, _) = arrow::json::reader::infer_json_schema(Cursor::new(&text), None).unwrap();
        let schema = Arc::new(schema);
        let batch =
            ReaderBuilder::new(schema.clone()).build(Cursor::new(&text)).unwrap().next().unwrap().unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(path("a.parquet")).unwrap(), schema, None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        for name in ["a.jsonl", "a.json", "a.parquet"] {
            assert_eq!(read(&path(name)).unwrap(), wanted, "{name}");
        }
        fs::write(path("b.jsonl"), "{\"a\": 1}\n{\"a\": \n").unwrap();
        let error = format!("{:#}", read(&path("b.jsonl")).unwrap_err());
        assert!(error.contains("line 2 is no JSON"), "{error}");
        assert!(read(&path("c.zip")).unwrap_err().to_string().contains("no file of a data set"));
    }
}
