//! Row types that can be stored, with their Arrow schema.

use anyhow::{Result, ensure};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::SchemaRef;
use pkv_core::{StoreDtype, hinted};

use crate::page::Numbers;

/// A row of a stage's shards.
pub trait Row: Sized + Send + 'static {
    /// Plural noun: the shards are `<FILES>-00000.parquet`, and messages say it.
    const FILES: &'static str;

    /// The columns, with scores and features of width `store`.
    fn schema(store: StoreDtype) -> SchemaRef;

    /// The example that the row belongs to.
    fn id(&self) -> &str;

    /// Bytes of the row's columns, before compression.
    fn raw_bytes(&self, store: StoreDtype) -> usize;

    /// Lengths agree with each other, and `store` can hold every number.
    fn check(&self, store: StoreDtype) -> Result<()>;

    /// The columns of `rows`, in the schema's order.
    ///
    /// # Errors
    /// More elements than a list column can index (2^31); `rows` have passed [`Row::check`].
    fn encode(rows: &[Self], store: StoreDtype) -> Result<Vec<Column>>;

    /// Row `i` of `batch`, in whichever width it was stored.
    ///
    /// # Errors
    /// A column is absent, has another type, or its lists disagree with the row's counts.
    fn decode(batch: &RecordBatch, i: usize) -> Result<Self>;
}

/// A column of a row group.
pub enum Column {
    /// Any column that Arrow writes.
    Array(ArrayRef),
    /// Scores or features.
    Numbers(Numbers),
}

/// Refuse what would be stored as infinity or NaN: a later ranking would be silently wrong.
pub(crate) fn check_numbers(what: &str, values: &[f32], store: StoreDtype) -> Result<()> {
    /// The largest finite f16 plus half a unit in the last place, from where rounding gives infinity.
    const F16_OVERFLOW: f32 = 65_520.0;
    let most = match store {
        StoreDtype::F16 => F16_OVERFLOW,
        StoreDtype::F32 => f32::INFINITY,
    };
    // Every row passes here before it is queued: without branches this is as fast as memory.
    if values.iter().fold(true, |fits, x| fits & (x.abs() < most)) {
        return Ok(());
    }
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        return Err(hinted(
            format!("number {i} of its {what} is {}", values[i]),
            "the model overflowed on this context; try `--set target.dtype=\"f32\"` (or `proxy.dtype`)",
        )
        .into());
    }
    if store == StoreDtype::F16 {
        let at = values.iter().position(|x| x.abs() >= F16_OVERFLOW);
        ensure!(
            at.is_none(),
            hinted(
                format!("its {what} reach {}, more than f16 holds", values[at.unwrap_or(0)]),
                "store f32: `--set label.store=\"f32\"` (or `extract.store`)"
            )
        );
    }
    Ok(())
}
