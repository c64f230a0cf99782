//! Layers by KV heads, one coloured cell each, with the scale beside it.

use std::fmt::Write;

use super::{Px, escape};

/// Steps of the colour scale; `chart.css` has a class for each, light and dark.
pub const STEPS: usize = 16;

/// A grid of shares.
#[derive(Clone, Debug)]
pub struct HeatMap {
    /// Above the grid.
    pub title: String,
    /// [layer][KV head] in [0, 1]; absent cells are drawn hollow.
    pub cells: Vec<Vec<Option<f64>>>,
    /// Quantity of a cell, for its tooltip: `recall`, `kept`.
    pub what: String,
    /// Meaning of an empty cell.
    pub absent: String,
    pub tone: Tone,
}

/// Colour scale of shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Linear,
    /// By the square root, for shares that are small in most cells.
    Root,
}

impl Tone {
    fn step(self, share: f64) -> usize {
        let share = share.clamp(0.0, 1.0);
        let toned = match self {
            Self::Linear => share,
            Self::Root => share.sqrt(),
        };
        ((toned * STEPS as f64) as usize).min(STEPS - 1)
    }
}

const LEFT: f64 = 46.0;
const TOP: f64 = 30.0;
const SCALE_HEIGHT: f64 = 46.0;

impl HeatMap {
    /// The map as an `<svg>` element about `width` wide.
    pub fn svg(&self, width: f64) -> String {
        let layers = self.cells.len().max(1);
        let heads = self.cells.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let cell_w = ((width - LEFT - 6.0) / heads as f64).min(80.0);
        let cell_h = (440.0 / layers as f64).clamp(9.0, 26.0);
        let grid_h = cell_h * layers as f64;
        let height = TOP + grid_h + 34.0 + SCALE_HEIGHT;
        let mut out = String::new();
        let _ = write!(
            out,
            "<svg class=\"chart heat\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{2}\">\
             <text class=\"name strong\" x=\"{3}\" y=\"16\">{2}</text>",
            Px(width),
            Px(height),
            escape(&self.title),
            Px(LEFT)
        );
        for (l, row) in self.cells.iter().enumerate() {
            let y = TOP + cell_h * l as f64;
            if l % every(layers, grid_h, 13.0) == 0 {
                let _ = write!(
                    out,
                    "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{l}</text>",
                    Px(LEFT - 6.0),
                    Px(y + cell_h / 2.0 + 4.0)
                );
            }
            for (h, &cell) in row.iter().enumerate() {
                self.cell(&mut out, (l, h), cell, (LEFT + cell_w * h as f64, y), (cell_w, cell_h));
            }
        }
        let below = TOP + grid_h + 15.0;
        for h in (0..heads).step_by(every(heads, cell_w * heads as f64, 18.0)) {
            let x = LEFT + cell_w * (h as f64 + 0.5);
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{h}</text>",
                Px(x),
                Px(below)
            );
        }
        let _ = write!(
            out,
            "<text class=\"name\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">KV head</text>\
             <text class=\"name\" transform=\"translate(12 {}) rotate(-90)\" text-anchor=\"middle\">layer</text>",
            Px(LEFT + cell_w * heads as f64 / 2.0),
            Px(below + 16.0),
            Px(TOP + grid_h / 2.0)
        );
        self.scale(&mut out, height - 30.0, (width - LEFT - 6.0).min(220.0));
        out.push_str("</svg>");
        out
    }

    fn cell(
        &self,
        out: &mut String,
        (l, h): (usize, usize),
        cell: Option<f64>,
        at: (f64, f64),
        size: (f64, f64),
    ) {
        let (class, tip) = match cell {
            Some(v) => (format!("h{}", self.tone.step(v)), format!("{} {}", self.what, short_percent(v))),
            None => ("none".to_owned(), self.absent.clone()),
        };
        let _ = write!(
            out,
            "<rect class=\"cell {class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>layer {l}, KV head {h}: {}</title></rect>",
            Px(at.0 + 0.5),
            Px(at.1 + 0.5),
            Px(size.0 - 1.0),
            Px(size.1 - 1.0),
            escape(&tip)
        );
        if let Some(v) = cell
            && size.0 >= 34.0
            && size.1 >= 14.0
        {
            let _ = write!(
                out,
                "<text class=\"value t{}\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                self.tone.step(v),
                Px(at.0 + size.0 / 2.0),
                Px(at.1 + size.1 / 2.0 + 4.0),
                short_percent(v)
            );
        }
    }

    fn scale(&self, out: &mut String, y: f64, width: f64) {
        for i in 0..STEPS {
            let w = width / STEPS as f64;
            let _ = write!(
                out,
                "<rect class=\"h{i}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"9\"/>",
                Px(LEFT + w * i as f64),
                Px(y),
                Px(w + 0.3)
            );
        }
        let marks: &[f64] = match self.tone {
            Tone::Linear => &[0.0, 0.25, 0.5, 0.75, 1.0],
            Tone::Root => &[0.0, 0.05, 0.2, 0.5, 1.0],
        };
        for &v in marks {
            let share = if self.tone == Tone::Root { v.sqrt() } else { v };
            let anchor = if v == 0.0 {
                "start"
            } else if v == 1.0 {
                "end"
            } else {
                "middle"
            };
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                Px(LEFT + width * share),
                Px(y + 23.0),
                short_percent(v)
            );
        }
    }
}

/// Every how manyth of `n` labels fits along `length` pixels at `room` pixels each.
fn every(n: usize, length: f64, room: f64) -> usize {
    let fit = (length / room).max(1.0);
    (n as f64 / fit).ceil().max(1.0) as usize
}

fn short_percent(v: f64) -> String {
    let percent = v * 100.0;
    if percent > 0.0 && percent < 0.95 { format!("{percent:.1}%") } else { format!("{percent:.0}%") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_steps_within_the_scale() {
        assert_eq!(
            (Tone::Linear.step(0.0), Tone::Linear.step(1.0), Tone::Linear.step(0.5)),
            (0, STEPS - 1, STEPS / 2)
        );
        assert!(Tone::Root.step(0.05) > Tone::Linear.step(0.05));
        assert_eq!(Tone::Linear.step(f64::NAN), 0);
    }

    #[test]
    fn absent_cells_are_hollow_and_say_why() {
        let map = HeatMap {
            title: "a < b".to_owned(),
            cells: vec![vec![Some(0.5), None], vec![Some(0.004), Some(1.0)]],
            what: "recall".to_owned(),
            absent: "KVzip keeps nothing".to_owned(),
            tone: Tone::Linear,
        };
        let svg = map.svg(300.0);
        assert!(svg.contains("a &lt; b"));
        assert!(svg.contains("layer 0, KV head 1: KVzip keeps nothing"));
        assert!(svg.contains("recall 0.4%"));
        assert_eq!(svg.matches("class=\"cell ").count(), 4);
    }
}
