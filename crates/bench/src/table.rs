//! Cells of text tables of reports.

pub use pkv_recipe::plan::aligned;

/// A value, or a dash for none.
pub fn cell<T>(value: Option<T>, text: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

/// A ratio with two decimals, or a dash.
pub fn ratio(value: Option<f64>) -> String {
    cell(value, |x| format!("{x:.2}"))
}
