//! Run folders on disk: their paths, their record `run.json`, and the stages' examples, labels and features
//! as Parquet shards with an index of them.
//!
//! A stage's folder holds `index.json` and the shards that it names, each with its row count and
//! SHA-256: what the index names is whole. A shard is written as a temporary file, fsynced and
//! renamed, and only then entered, so a process may die at any moment; the next one continues
//! after the last whole shard. The same rows give the same bytes. A stage may also be made in pieces by
//! several processes (`pieces`), with the same bytes in the end.
//!
//! Tensors are left to the crates above: rows hold plain vectors.

mod column;
mod dir;
mod example;
mod example_rows;
mod feature;
mod feature_set;
mod index;
mod label;
mod layout;
mod page;
mod pieces;
mod reader;
mod row;
mod run_json;
mod stage;
mod writer;

pub use dir::{StageDir, StageState, StaleError};
pub use example::{Example, PlantedFact};
pub use example_rows::{ExampleRows, Sizes};
pub use feature::FeatureRow;
pub use feature_set::{FeatureFolders, FeatureSet, FeatureSource, FeaturesFrom};
pub use index::{INDEX_FILE, Index, SCHEMA_VERSION, ShardEntry};
pub use label::LabelRow;
pub use layout::RunLayout;
pub use pieces::{
    Begun, Claimed, Ended, FailedRow, MAX_FAILURES, Marker, Missing, Piece, PieceWriter, Pieces, PiecesPlan,
    PiecesState, Seal, Signature, Tally, Totals, Worker,
};
pub use reader::StageReader;
pub use row::Row;
pub use run_json::{ModelRecord, RunJson, StageRecord, Tool, in_words};
pub use stage::Stage;
pub use writer::{StageWriter, check_row};
