//! What goes in comes out, in any order, and the same bytes each time.

use std::fs::{self, File};

use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;
use pkv_core::StoreDtype;
use pkv_files::sha256_file;
use pkv_shard::{Example, FeatureRow, INDEX_FILE, LabelRow, Row, StageDir, StageReader, StageWriter};
use tempfile::tempdir;

use crate::common::*;

fn write<R: Row>(dir: &std::path::Path, rows: impl Iterator<Item = R>, store: StoreDtype) {
    let stage = StageDir::open(dir, "label", &choices()).unwrap();
    let mut writer = StageWriter::new(stage, SHARD_ROWS, store, None).unwrap();
    rows.for_each(|row| writer.push(row).unwrap());
    assert!(writer.finish().unwrap().is_complete());
}

#[test]
fn labels_come_back_in_both_widths_and_any_order() {
    for store in [StoreDtype::F16, StoreDtype::F32] {
        let dir = tempdir().unwrap();
        write(dir.path(), (0..37).map(label), store);
        let reader = StageReader::<LabelRow>::open(dir.path()).unwrap();
        assert_eq!((reader.len(), reader.stage().index().shards.len()), (37, 5));
        for i in [36, 0, 8, 7, 23, 23, 1] {
            assert_eq!(reader.get(i).unwrap(), label(i as usize), "row {i} in {store:?}");
        }
        for (i, row) in reader.iter().enumerate() {
            assert_eq!(row.unwrap(), label(i));
        }
        assert!(reader.get(37).unwrap_err().to_string().contains("row 37 of"));
        reader.stage().verify().unwrap();
    }
}

#[test]
fn features_come_back_with_and_without_globals() {
    for globals in [0, 1, 4] {
        let dir = tempdir().unwrap();
        write(dir.path(), (0..11).map(|i| feature(i, globals)), StoreDtype::F16);
        let reader = StageReader::<FeatureRow>::open(dir.path()).unwrap();
        for i in [10, 3, 0] {
            assert_eq!(reader.get(i).unwrap(), feature(i as usize, globals));
            assert_eq!(feature(i as usize, globals).global_channels(), globals);
        }
    }
}

#[test]
fn examples_come_back_with_their_facts() {
    let dir = tempdir().unwrap();
    write(dir.path(), (0..20).map(example), StoreDtype::F16);
    let reader = StageReader::<Example>::open(dir.path()).unwrap();
    for i in (0..20).rev() {
        assert_eq!(reader.get(i).unwrap(), example(i as usize));
    }
}

#[test]
fn one_token_and_no_token_are_rows_like_others() {
    let short = |positions: u32| {
        let mut row = label(1);
        row.positions = positions;
        row.scores.truncate((row.layers * row.kv_heads * positions) as usize);
        row
    };
    let dir = tempdir().unwrap();
    write(dir.path(), [0, 1, 0].map(short).into_iter(), StoreDtype::F32);
    let reader = StageReader::<LabelRow>::open(dir.path()).unwrap();
    for (i, positions) in [0, 1, 0].into_iter().enumerate() {
        assert_eq!(reader.get(i as u64).unwrap(), short(positions));
    }
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
    for dir in [&a, &b] {
        write_labels(StageDir::open(dir.path(), "label", &choices()).unwrap(), 20).unwrap();
    }
    assert_eq!(files(a.path()), files(b.path()));
}

/// Random access must not decode a whole shard: rows of real pairs are megabytes.
#[test]
fn a_big_row_is_a_row_group_of_its_own() {
    let big = |i: usize| {
        let mut row = label(i);
        row.positions = 40_000;
        row.scores = (0..6 * 40_000).map(|j| number(i + j)).collect();
        row
    };
    let dir = tempdir().unwrap();
    write(dir.path(), (0..3).map(big), StoreDtype::F16);
    let file = std::fs::File::open(dir.path().join("labels-00000.parquet")).unwrap();
    let metadata = parquet::file::metadata::ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
    assert_eq!(metadata.row_groups().iter().map(|g| g.num_rows()).collect::<Vec<_>>(), [1, 1, 1]);
    assert_eq!(StageReader::<LabelRow>::open(dir.path()).unwrap().get(1).unwrap(), big(1));
}

#[test]
fn what_cannot_be_stored_is_refused_by_name() {
    let dir = tempdir().unwrap();
    let stage = StageDir::open(dir.path(), "label", &choices()).unwrap();
    let mut writer = StageWriter::new(stage, SHARD_ROWS, StoreDtype::F16, None).unwrap();
    let with = |f: fn(&mut Vec<f32>)| {
        let mut row = label(0);
        f(&mut row.scores);
        row
    };
    let mut refused = |row, text: &str, hint: &str| {
        let error = writer.push(row).unwrap_err();
        let (said, hinted) = text_and_hint(&error);
        assert!(
            said.starts_with("cannot store the labels of example `doc-0-0`") && said.contains(text),
            "{said}"
        );
        assert!(hinted.contains(hint), "{hinted}");
    };
    refused(with(|s| s[5] = f32::NAN), "number 5 of its scores is NaN", "target.dtype");
    refused(with(|s| s[5] = 7e4), "its scores reach 70000", "label.store");
    refused(with(|s| s.truncate(239)), "239 scores for 3 layers x 2 KV heads x 40 positions", "");
    writer.push(with(|s| s[5] = 65_504.0)).unwrap();
}

/// Scores and features were once written by Arrow, with other levels, encodings and pages; such shards stay
/// readable.
#[test]
fn shards_that_arrow_wrote_hold_the_same_rows() {
    for store in [StoreDtype::F16, StoreDtype::F32] {
        let folder = tempdir().unwrap();
        let stage = StageDir::open(folder.path(), "extract", &choices()).unwrap();
        let mut writer = StageWriter::new(stage, 5, store, Some(5)).unwrap();
        let mut rows: Vec<FeatureRow> = (0..5).map(|i| feature(i, i % 3)).collect();
        // Axes of one and of none.
        rows[1] =
            FeatureRow { layers: 1, channels: 2, heads: rows[1].heads[..52].to_vec(), ..rows[1].clone() };
        rows[3] = FeatureRow { channels: 0, heads: vec![], ..rows[3].clone() };
        rows[4] = FeatureRow { positions: 0, heads: vec![], globals: vec![], ..rows[4].clone() };
        for row in &rows {
            writer.push(row.clone()).unwrap();
        }
        writer.finish().unwrap();
        let read =
            || StageReader::<FeatureRow>::open(folder.path()).unwrap().iter().collect::<Result<Vec<_>, _>>();
        assert_eq!(read().unwrap(), rows);

        let path = folder.path().join("features-00000.parquet");
        let shard = ParquetRecordBatchReaderBuilder::try_new(File::open(&path).unwrap()).unwrap();
        let (schema, metadata) = (shard.schema().clone(), shard.metadata().clone());
        let batches = shard.build().unwrap().collect::<Result<Vec<_>, _>>().unwrap();
        let properties = WriterProperties::builder()
            .set_key_value_metadata(metadata.file_metadata().key_value_metadata().cloned())
            .build();
        let mut writer =
            ArrowWriter::try_new(File::create(&path).unwrap(), schema, Some(properties)).unwrap();
        for batch in &batches {
            writer.write(batch).unwrap();
        }
        writer.close().unwrap();
        let index = folder.path().join(INDEX_FILE);
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
        let before = json["shards"][0]["sha256"].clone();
        json["shards"][0]["bytes"] = fs::metadata(&path).unwrap().len().into();
        json["shards"][0]["sha256"] = sha256_file(&path).unwrap().into();
        assert_ne!(json["shards"][0]["sha256"], before);
        fs::write(&index, json.to_string()).unwrap();
        assert_eq!(read().unwrap(), rows, "written by Arrow");
    }
}
