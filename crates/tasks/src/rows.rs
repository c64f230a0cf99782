//! Rows of a data set, whatever its file: JSON lines, one JSON array, or Parquet with nested columns.
//!
//! A column that is absent, empty or of another type is an error that names it, never a value that scores 0.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::{Hinted, foreign, hinted, json_kind, parse_json};
use serde_json::Value;

/// A row and its place: `row 3 of `file``.
pub struct Row {
    pub value: Value,
    pub place: String,
}

/// The rows of a task's files, one file after the other; further files are left alone once there are `most`
/// rows.
///
/// # Errors
/// As [`read`].
pub fn read_all(paths: &[PathBuf], most: usize) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for path in paths {
        let place = |i| format!("row {} of `{}`", i + 1, path.display());
        all.extend(read(path)?.into_iter().enumerate().map(|(i, value)| Row { value, place: place(i) }));
        if all.len() >= most {
            break;
        }
    }
    Ok(all)
}

/// Every row of `path` as a JSON object, in order; columns that are null are absent from those of Parquet.
///
/// # Errors
/// The file is absent, damaged, of another kind than its name says (`.jsonl`, `.json`, `.parquet`), or holds
/// no row.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let reading = || format!("cannot read the data set `{}`", path.display());
    let rows = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl" | "json") => json_rows(path),
        Some("parquet") => parquet(path),
        _ => Err(hinted(
            "it is no file of a data set that can be read",
            "give a `.jsonl`, `.json` or `.parquet` file; decompress others first",
        )
        .into()),
    };
    let rows = rows.with_context(reading)?;
    let own_file = "the file was cut off or is another's: download it again";
    ensure!(!rows.is_empty(), anyhow!(hinted("it holds no row", own_file)).context(reading()));
    if let Some(i) = rows.iter().position(|row| !row.is_object()) {
        let what = format!("row {} is {}, not an object", i + 1, json_kind(&rows[i]));
        bail!(anyhow!(hinted(what, own_file)).context(reading()));
    }
    Ok(rows)
}

/// A whole JSON file.
///
/// # Errors
/// The file is absent or no JSON.
pub fn json(path: &Path) -> Result<Value> {
    let text = utf8(path)?;
    pkv_core::check_json(text.as_bytes(), path)?;
    parse_json(&text, "download the file again, or check it with `python3 -m json.tool`")
        .with_context(|| format!("cannot read `{}`", path.display()))
}

/// The text of a file, less a byte order mark.
///
/// # Errors
/// The file is absent or no UTF-8.
pub fn utf8(path: &Path) -> Result<String> {
    let text = read_rows(path).with_context(|| {
        hinted(
            format!("cannot read `{}` as UTF-8 text", path.display()),
            "check the path; decompress or convert the file if it is no plain text",
        )
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Benchmarks' files are larger than settings, and no larger than this.
fn read_rows(path: &Path) -> io::Result<String> {
    let bytes = pkv_core::read_at_most(path, 4 << 30)?;
    String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.utf8_error()))
}

/// An array, or an object per line, whatever the file is called.
fn json_rows(path: &Path) -> Result<Vec<Value>> {
    const HINT: &str = "rows are JSON objects, one per line or in one array; download the file again";
    let text = utf8(path)?;
    pkv_core::check_json(text.as_bytes(), path)?;
    if text.trim_start().starts_with('[') {
        return Ok(parse_json(&text, HINT)?);
    }
    let line = |(i, line): (usize, &str)| {
        parse_json(line, HINT).with_context(|| format!("line {} is no row", i + 1))
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect()
}

fn parquet(path: &Path) -> Result<Vec<Value>> {
    let damaged = || hinted("it is no Parquet file, or was damaged", "download the file again");
    let mut head = Vec::new();
    let opening = || hinted("it cannot be opened", "check the path");
    File::open(path).and_then(|file| file.take(512).read_to_end(&mut head)).with_context(opening)?;
    if let Some((what, hint)) = foreign(&head).filter(|_| !head.starts_with(b"PAR1")) {
        bail!(hinted(format!("it is {what}"), hint));
    }
    pkv_core::refuse_panics(|| parquet_rows(path)).with_context(damaged)?
}

fn parquet_rows(path: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    let damaged = || hinted("it is no Parquet file, or was cut off", "download the file again");
    let file = File::open(path).with_context(|| hinted("it cannot be opened", "check the path"))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).with_context(damaged)?;
    // Contexts are megabytes each: a few rows at a time.
    for batch in builder.with_batch_size(16).build().with_context(damaged)? {
        let mut writer = arrow::json::ArrayWriter::new(Vec::new());
        writer.write(&batch.with_context(damaged)?)?;
        writer.finish()?;
        let values: Vec<Value> = serde_json::from_slice(&writer.into_inner())?;
        rows.extend(values);
    }
    Ok(rows)
}

/// A column of a row.
///
/// # Errors
/// It is absent or null.
pub fn column<'a>(row: &'a Value, column: &str) -> Result<&'a Value> {
    row.get(column).filter(|v| !v.is_null()).with_context(|| {
        let columns: Vec<&str> =
            row.as_object().map(|o| o.keys().map(String::as_str).collect()).unwrap_or_default();
        hinted(
            format!("column `{column}` is absent or null; the columns are {}", columns.join(", ")),
            OWN_FILE,
        )
    })
}

/// A text column of a row, which may be empty.
///
/// # Errors
/// It is absent or no text.
pub fn text<'a>(row: &'a Value, name: &str) -> Result<&'a str> {
    let value = column(row, name)?;
    value.as_str().with_context(|| unfit(name, value, "text"))
}

/// A text column that says something.
///
/// # Errors
/// It is absent, no text, or blank.
pub fn filled<'a>(row: &'a Value, name: &str) -> Result<&'a str> {
    let text = text(row, name)?;
    ensure!(!text.trim().is_empty(), hinted(format!("column `{name}` is empty"), OWN_FILE));
    Ok(text)
}

/// A column that is a list.
///
/// # Errors
/// It is absent, no list, or empty.
pub fn list<'a>(row: &'a Value, name: &str) -> Result<&'a [Value]> {
    let value = column(row, name)?;
    let list = value.as_array().with_context(|| unfit(name, value, "a list"))?;
    ensure!(!list.is_empty(), hinted(format!("column `{name}` is an empty list"), OWN_FILE));
    Ok(list)
}

/// A column that is a list of texts, each of which says something.
///
/// # Errors
/// It is absent, no list, empty, or one of it is something else.
pub fn texts(row: &Value, name: &str) -> Result<Vec<String>> {
    let one = |(i, value): (usize, &Value)| match value {
        Value::String(text) if !text.trim().is_empty() => Ok(text.clone()),
        other => Err(unfit(&format!("{name}[{i}]"), other, "text that is not empty").into()),
    };
    list(row, name)?.iter().enumerate().map(one).collect()
}

/// A text or number, or a list of such: what answers are.
///
/// # Errors
/// The column is absent, empty, or something else.
pub fn scalars(row: &Value, name: &str) -> Result<Vec<String>> {
    let one = |name: &str, value: &Value| match value {
        Value::Number(_) => Ok(value.to_string()),
        Value::String(text) if !text.trim().is_empty() => Ok(text.clone()),
        other => Err(unfit(name, other, "text or a number")),
    };
    let value = column(row, name)?;
    let Some(all) = value.as_array() else { return Ok(vec![one(name, value)?]) };
    ensure!(!all.is_empty(), hinted(format!("column `{name}` is an empty list"), OWN_FILE));
    Ok(all.iter().enumerate().map(|(i, v)| one(&format!("{name}[{i}]"), v)).collect::<Result<_, _>>()?)
}

const OWN_FILE: &str = "give the data set's own file, unchanged";

/// A column that holds something else than is expected.
pub(crate) fn unfit(name: &str, value: &Value, expected: &str) -> Hinted {
    let found = match value {
        Value::String(text) if text.trim().is_empty() => "empty text",
        other => json_kind(other),
    };
    hinted(format!("column `{name}` holds {found}, expected {expected}"), OWN_FILE)
}

/// A scalar as text: texts as they are, numbers as JSON writes them.
pub fn spell(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        assert!(error.contains("line 2 is no row: it is no JSON"), "{error}");
    }

    #[test]
    fn names_and_marks_do_not_matter_and_other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            read(&path).map_err(|e| {
                assert!(e.chain().any(|c| c.is::<Hinted>()) || e.is::<Hinted>(), "no hint: {e:#}");
                format!("{e:#}")
            })
        };
        let rows = vec![serde_json::json!({"a": 1}), serde_json::json!({"a": 2})];
        for (name, text) in [
            ("array.jsonl", "[{\"a\": 1},\n {\"a\": 2}]\n"),
            ("lines.json", "{\"a\": 1}\n{\"a\": 2}\n"),
            ("mark.jsonl", "\u{feff}{\"a\": 1}\r\n\r\n{\"a\": 2}\r\n"),
        ] {
            assert_eq!(read(name, text.as_bytes()).unwrap(), rows, "{name}");
        }
        for (name, bytes, expected) in [
            ("c.zip", &b"PK"[..], "no file of a data set"),
            ("c.jsonl.gz", b"\x1f\x8b", "no file of a data set"),
            ("c.jsonl", b"", "it holds no row"),
            ("c.json", b"[]", "it holds no row"),
            ("c.jsonl", b"\n \n", "it holds no row"),
            ("c.jsonl", b"{\"a\": 1}\n3\n", "row 2 is a number, not an object"),
            ("c.json", b"[{}, [1]]", "row 2 is a list, not an object"),
            ("c.jsonl", b"{\"a\": \"\\ud83d\"}", "line 1 is no row: `\\ud83d` is half of a character"),
            ("c.jsonl", b"{\"a\": \"\xe9\"}", "as UTF-8 text"),
            ("c.parquet", b"{\"a\": 1}", "no Parquet file"),
            ("e.parquet", b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
            ("e.jsonl", b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
            ("e.json", b"<!DOCTYPE html>", "is a web page, not JSON"),
        ] {
            let error = read(name, bytes).unwrap_err();
            assert!(error.contains(name) && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn columns_that_do_not_fit_are_named() {
        let row = serde_json::json!({"t": "x", "blank": " ", "n": 3, "null": null, "l": ["a", 2], "e": [], "g": ["a"]});
        let of = |error: anyhow::Error| error.to_string();
        assert_eq!(text(&row, "t").unwrap(), "x");
        assert_eq!(text(&row, "blank").unwrap(), " ");
        assert_eq!(
            (texts(&row, "g").unwrap(), scalars(&row, "l").unwrap()),
            (vec!["a".into()], vec!["a".into(), "2".into()])
        );
        assert_eq!(
            (scalars(&row, "n").unwrap(), scalars(&row, "t").unwrap()),
            (vec!["3".to_owned()], vec!["x".to_owned()])
        );
        assert!(
            of(text(&row, "no").unwrap_err())
                .starts_with("column `no` is absent or null; the columns are t, blank")
        );
        assert!(of(text(&row, "null").unwrap_err()).starts_with("column `null` is absent"));
        assert_eq!(of(text(&row, "n").unwrap_err()), "column `n` holds a number, expected text");
        assert_eq!(of(filled(&row, "blank").unwrap_err()), "column `blank` is empty");
        assert_eq!(of(texts(&row, "t").unwrap_err()), "column `t` holds text, expected a list");
        assert_eq!(
            of(texts(&row, "l").unwrap_err()),
            "column `l[1]` holds a number, expected text that is not empty"
        );
        assert_eq!(of(texts(&row, "e").unwrap_err()), "column `e` is an empty list");
        assert_eq!(of(scalars(&row, "e").unwrap_err()), "column `e` is an empty list");
        assert_eq!(
            of(scalars(&row, "blank").unwrap_err()),
            "column `blank` holds empty text, expected text or a number"
        );
    }
}
