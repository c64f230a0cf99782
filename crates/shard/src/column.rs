//! Nested list columns of f16 or f32: their types, and how they are read. `page` writes them.
//!
//! Lists nest like the tensor's axes, so that `row[layer][head][position]` works in Python and SQL.
//! List elements are called `element`, as the Parquet format asks.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Float16Type, Float32Type};
use half::slice::HalfFloatSliceExt;
use pkv_core::StoreDtype;

/// `depth` lists around numbers of width `store`.
pub fn nested_type(depth: usize, store: StoreDtype) -> DataType {
    let number = match store {
        StoreDtype::F16 => DataType::Float16,
        StoreDtype::F32 => DataType::Float32,
    };
    (0..depth).fold(number, |inner, _| DataType::List(element(inner)))
}

/// The field inside a list.
pub fn element(inner: DataType) -> FieldRef {
    Arc::new(Field::new("element", inner, false))
}

/// List offsets from list lengths.
pub fn offsets(lengths: impl Iterator<Item = usize>) -> Result<OffsetBuffer<i32>> {
    let mut at = 0usize;
    let mut out = vec![0i32];
    for n in lengths {
        at += n;
        out.push(i32::try_from(at).context("a row group holds more than 2^31 numbers")?);
    }
    Ok(OffsetBuffer::new(out.into()))
}

/// Row `row` of the nested column `name`, of the given axes (outermost first), as f32.
///
/// An axis of `None` takes the length it finds; it must still be the same for all its lists.
pub fn decode_nested(
    batch: &RecordBatch,
    name: &str,
    row: usize,
    axes: &[Option<usize>],
) -> Result<(Vec<usize>, Vec<f32>)> {
    let mut column = get(batch, name)?.clone();
    let mut range = row..row + 1;
    let mut shape = Vec::with_capacity(axes.len());
    for (depth, axis) in axes.iter().enumerate() {
        let list = column
            .as_list_opt::<i32>()
            .with_context(|| format!("column `{name}` has {depth} nested lists, expected {}", axes.len()))?;
        let (inner, length) = step(list, range.clone(), *axis)
            .with_context(|| format!("axis {depth} of column `{name}` in row {row}"))?;
        shape.push(length);
        range = inner;
        column = list.values().clone();
    }
    let numbers = match column.data_type() {
        DataType::Float16 => {
            let narrow = &column.as_primitive::<Float16Type>().values()[range];
            let mut wide = vec![0f32; narrow.len()];
            narrow.convert_to_f32_slice(&mut wide);
            wide
        }
        DataType::Float32 => column.as_primitive::<Float32Type>().values()[range].to_vec(),
        other => bail!("column `{name}` holds {other}, expected Float16 or Float32"),
    };
    Ok((shape, numbers))
}

/// From a range of lists to the range of their elements; all lists must be equally long.
fn step(list: &ListArray, range: Range<usize>, expected: Option<usize>) -> Result<(Range<usize>, usize)> {
    let offsets = &list.value_offsets()[range.start..=range.end];
    let length = match (expected, offsets) {
        (Some(n), _) => n,
        (None, [a, b, ..]) => (b - a) as usize,
        (None, _) => 0,
    };
    if let Some(i) = offsets.windows(2).position(|w| (w[1] - w[0]) as usize != length) {
        bail!("list {i} has {} elements, expected {length}", offsets[i + 1] - offsets[i]);
    }
    Ok((offsets[0] as usize..offsets[offsets.len() - 1] as usize, length))
}

/// The column `name`.
pub fn get<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    let column = batch.column_by_name(name).with_context(|| format!("there is no column `{name}`"))?;
    ensure!(column.null_count() == 0, "column `{name}` holds nulls");
    Ok(column)
}

/// Text of row `row`.
pub fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> Result<&'a str> {
    let column = get(batch, name)?;
    let column = column
        .as_string_opt::<i32>()
        .with_context(|| format!("column `{name}` holds {}, expected text", column.data_type()))?;
    Ok(column.value(row))
}

/// A number of row `row` in a primitive column of type `T`.
pub fn number<T: arrow::datatypes::ArrowPrimitiveType>(
    batch: &RecordBatch,
    name: &str,
    row: usize,
) -> Result<T::Native> {
    let column = get(batch, name)?;
    let column = column.as_primitive_opt::<T>().with_context(|| {
        format!("column `{name}` holds {}, expected {}", column.data_type(), T::DATA_TYPE)
    })?;
    Ok(column.value(row))
}
