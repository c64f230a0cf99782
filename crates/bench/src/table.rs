//! Text tables of reports.

use std::fmt::Write;

/// Lines of cells in columns: the first to the left, the others to the right.
pub fn aligned(lines: &[Vec<String>]) -> String {
    let mut out = String::new();
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| lines.iter().filter_map(|l| l.get(c)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in lines {
        let mut text = format!("  {:<w$}", line[0], w = widths[0]);
        for (cell, &w) in line.iter().zip(&widths).skip(1) {
            let _ = write!(text, "  {cell:>w$}");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out
}

/// A value, or a dash for none.
pub fn cell<T>(value: Option<T>, text: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

/// A ratio with two decimals, or a dash.
pub fn ratio(value: Option<f64>) -> String {
    cell(value, |x| format!("{x:.2}"))
}
