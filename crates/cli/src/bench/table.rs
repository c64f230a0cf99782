//! The benchmark's report as a text table.

use std::fmt::Write;

use pkv_recipe::plan::{human_bytes, human_flops};

use super::Report;
use super::clock::Row;
use super::roofline::Roofline;

/// Title, ceilings and one line per row, ending in a line break.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    let weights = if report.random_weights { "random weights" } else { "its own weights" };
    let _ = writeln!(
        out,
        "{} of `{}` on {}, {}, {weights}: {}",
        report.stage, report.recipe, report.device, report.dtype, report.shape
    );
    let _ = writeln!(out, "{}", ceilings(&report.roofline));
    if let Some(peer) = &report.peer {
        let _ = writeln!(out, "peer: {peer}, its fastest attention");
    }
    let _ = writeln!(out);
    let mut lines = vec![header(report)];
    lines.extend(report.rows.iter().map(|row| cells(row, report.peer.is_some())));
    out + &aligned(&lines)
}

/// Peak rates of the machine, on one line.
pub fn ceilings(roofline: &Roofline) -> String {
    format!(
        "ceilings measured in this run: matrix product {}/s ({n} x {n} x {n}), copy {}/s",
        human_flops(roofline.flops_per_s),
        human_bytes(roofline.copy_bytes_per_s as u64),
        n = roofline.matrix
    )
}

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

fn header(report: &Report) -> Vec<String> {
    let mut names =
        vec!["", "context", "median", "least", "tokens/s", "work", "of ceiling", "x prefill", "peak memory"];
    if report.peer.is_some() {
        names.extend(["peer", "attention", "peer / ours"]);
    }
    names.into_iter().map(str::to_owned).collect()
}

fn cells(row: &Row, with_peer: bool) -> Vec<String> {
    let dash = || "-".to_owned();
    let mut cells = vec![row.what.to_owned(), row.context.to_string()];
    match &row.measured {
        Some(m) => cells.extend([
            secs(m.median_s),
            secs(m.min_s),
            format!("{:.0}", m.tokens_per_s),
            human_flops(row.flops),
            format!("{:.1}%", 100.0 * m.roofline_share),
            row.over_prefill.map_or_else(dash, |x| format!("{x:.2}")),
            m.peak_bytes.map_or_else(dash, human_bytes),
        ]),
        None => {
            cells.push(row.error.unwrap_or("not measured").to_owned());
            cells.extend([dash(), dash(), human_flops(row.flops), dash(), dash(), dash()]);
        }
    }
    if with_peer {
        cells.extend(match &row.peer {
            Some(p) => [secs(p.median_s), p.attention.clone(), format!("{:.2}", p.ratio)],
            None => [dash(), dash(), dash()],
        });
    }
    cells
}

/// Four significant digits, but no more than six after the point: `0.0123 s` is `0.01230 s`.
fn secs(x: f64) -> String {
    let magnitude = if x > 0.0 { x.log10().floor() as i32 } else { 0 };
    format!("{x:.*} s", (3 - magnitude).clamp(0, 6) as usize)
}
