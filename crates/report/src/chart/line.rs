//! Lines over one x axis, each named at its end, with 95% intervals as whiskers.
//!
//! A page gets every chart twice and shows the one that fits its column: a wide one, and a narrow one that
//! leaves the names to the legend. Charts that stand side by side come in a third size. Letters keep their
//! size in all.

use std::fmt::Write;

use super::axis::Axis;
use super::labels::spread;
use super::{Px, escape};

/// A chart of lines.
#[derive(Clone, Debug)]
pub struct LineChart {
    /// Description for screen readers.
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    /// Drawn in this order: the last one lies on top.
    pub series: Vec<Series>,
    /// A height worth a dashed line of its own, such as the full cache's accuracy.
    pub reference: Option<(f64, String)>,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Series {
    /// Empty for a line that needs no name.
    pub label: String,
    /// Class of `chart.css` that gives colour and stroke.
    pub class: String,
    pub marker: Marker,
    pub points: Vec<Point>,
}

/// One point; without an interval, `low` and `high` are `y`.
#[derive(Clone, Debug)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
    pub tip: String,
}

/// Shapes tell lines apart where colours do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    Circle,
    Square,
    Diamond,
    TriangleUp,
    TriangleDown,
    Ring,
    /// A line of many points.
    None,
}

const TOP: f64 = 24.0;
const LABEL_GAP: f64 = 15.0;
/// Width of a letter of a label.
const LETTER: f64 = 7.4;

/// Units of the drawing; `chart.css` sees to it that one is about a pixel.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Size {
    width: f64,
    height: f64,
    /// On the left of the axes and below them, for ticks and the axes' names.
    left: f64,
    below: f64,
    /// On the right of the axes, for the names of lines.
    label_width: f64,
    /// Whether lines are named at their ends.
    names: bool,
    /// Whether axes are named, and intervals drawn.
    full: bool,
    /// Between the whiskers of one line and the next.
    apart: f64,
}

const WIDE: f64 = 860.0;
const NARROW: Size = Size {
    width: 400.0,
    height: 310.0,
    left: 72.0,
    below: 48.0,
    label_width: 12.0,
    names: false,
    full: true,
    apart: 1.7,
};
const SMALL: Size = Size {
    width: 264.0,
    height: 190.0,
    left: 46.0,
    below: 30.0,
    label_width: 10.0,
    names: false,
    full: false,
    apart: 0.0,
};

/// A chart in one size.
struct Drawing<'a> {
    chart: &'a LineChart,
    size: Size,
}

impl LineChart {
    fn wide(&self) -> Size {
        let labels = self.series.iter().filter(|s| s.has_label()).map(|s| s.label.chars().count());
        let height = (TOP + NARROW.below + LABEL_GAP * labels.clone().count() as f64).max(400.0);
        let label_width = (34.0 + LETTER * labels.max().unwrap_or(0) as f64).min(280.0);
        Size { width: WIDE, height, label_width, names: true, apart: 2.2, ..NARROW }
    }

    /// The wide chart as an `<svg>` element.
    pub fn svg(&self) -> String {
        Drawing { chart: self, size: self.wide() }.svg("wide")
    }

    /// One of several side by side, as an `<svg>` element.
    pub fn small(&self) -> String {
        Drawing { chart: self, size: SMALL }.svg("small")
    }

    /// The chart in both sizes, with a legend that switches lines on and off.
    pub fn figure(&self) -> String {
        let narrow = Drawing { chart: self, size: NARROW }.svg("narrow");
        format!("{}{}{narrow}", self.legend(), self.svg())
    }

    /// One box per line, the one on top first; `page.css` hides the lines of those that are not ticked.
    pub fn legend(&self) -> String {
        let mut out = format!("<fieldset class=\"legend\"><legend>Lines: {}</legend>", escape(&self.title));
        for (i, s) in self.series.iter().enumerate().filter(|(_, s)| s.has_label()).rev() {
            let _ = write!(
                out,
                "<label class=\"series {}\"><input type=\"checkbox\" class=\"l{i}\" checked autocomplete=\"off\">\
                 <svg viewBox=\"0 0 24 12\" aria-hidden=\"true\"><path class=\"line\" d=\"M0 6L24 6\"/>",
                escape(&s.class)
            );
            s.marker.draw(&mut out, 12.0, 6.0, "");
            let _ = write!(out, "</svg>{}</label>", escape(&s.label));
        }
        out.push_str("</fieldset>");
        out
    }
}

impl Drawing<'_> {
    fn svg(&self, class: &str) -> String {
        let mut out = String::new();
        let _ = write!(
            out,
            "<svg class=\"chart {class}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">",
            Px(self.size.width),
            Px(self.size.height),
            escape(&self.chart.title)
        );
        self.axes(&mut out);
        if let Some((at, text)) = &self.chart.reference {
            let y = self.y_px(*at);
            let _ = write!(
                out,
                "<g class=\"reference\"><title>{0}</title><line x1=\"{1}\" x2=\"{2}\" y1=\"{3}\" y2=\"{3}\"/>\
                 <text x=\"{2}\" y=\"{4}\" text-anchor=\"end\">{0}</text></g>",
                escape(text),
                Px(self.size.left),
                Px(self.right()),
                Px(y),
                Px(y - 7.0)
            );
        }
        self.lines(&mut out);
        out.push_str("</svg>");
        out
    }

    fn right(&self) -> f64 {
        self.size.width - self.size.label_width
    }

    fn bottom(&self) -> f64 {
        self.size.height - self.size.below
    }

    fn x_px(&self, x: f64) -> f64 {
        // Room for half a marker, and for whiskers beside each other, at the outermost points.
        let room = 8.0 + self.shift(self.chart.series.len() - 1);
        let (from, to) = (self.size.left + room, self.right() - room);
        from + (to - from) * self.chart.x.scale.share(x)
    }

    /// Of a line with its whiskers to the right, so that those of several methods lie beside each other.
    fn shift(&self, index: usize) -> f64 {
        let has_whiskers = self.chart.series.iter().flat_map(|s| &s.points).any(|p| p.high > p.low);
        let from_middle = index as f64 - (self.chart.series.len() as f64 - 1.0) / 2.0;
        if has_whiskers { from_middle * self.size.apart } else { 0.0 }
    }

    fn y_px(&self, y: f64) -> f64 {
        let share = self.chart.y.scale.share(y).clamp(0.0, 1.0);
        self.bottom() + (TOP - self.bottom()) * share
    }

    fn axes(&self, out: &mut String) {
        let (right, bottom) = (self.right(), self.bottom());
        for (value, text) in &self.chart.y.ticks {
            let y = self.y_px(*value);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{2}\" y2=\"{2}\"/>\
                 <text class=\"tick\" x=\"{3}\" y=\"{4}\" text-anchor=\"end\">{5}</text>",
                Px(self.size.left),
                Px(right),
                Px(y),
                Px(self.size.left - 8.0),
                Px(y + 4.0),
                escape(text)
            );
        }
        let mut free_from = f64::NEG_INFINITY;
        for (value, text) in &self.chart.x.ticks {
            let x = self.x_px(*value);
            let _ = write!(
                out,
                "<line class=\"axis\" x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{2}\"/>",
                Px(x),
                Px(bottom),
                Px(bottom + 4.0)
            );
            // A tick without room for its text stays a tick.
            let half = 3.6 * text.chars().count() as f64;
            if x - half >= free_from {
                free_from = x + half + 4.0;
                let _ = write!(
                    out,
                    "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                    Px(x),
                    Px(bottom + 18.0),
                    escape(text)
                );
            }
        }
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{0}\" x2=\"{1}\" y1=\"{2}\" y2=\"{2}\"/>",
            Px(self.size.left),
            Px(right),
            Px(bottom)
        );
        if !self.size.full {
            return;
        }
        let _ = write!(
            out,
            "<text class=\"name\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text class=\"name\" transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            Px((self.size.left + right) / 2.0),
            Px(self.size.height - 8.0),
            escape(&self.chart.x.label),
            Px((TOP + bottom) / 2.0),
            escape(&self.chart.y.label)
        );
    }

    fn lines(&self, out: &mut String) {
        let at = |i: usize, p: &Point| (self.x_px(p.x) + self.shift(i), self.y_px(p.y));
        let end =
            |(i, s): (usize, &Series)| s.points.last().map_or((self.right(), self.bottom()), |p| at(i, p));
        let ends: Vec<(f64, f64)> = self.chart.series.iter().enumerate().map(end).collect();
        let named: Vec<usize> = (0..ends.len()).filter(|&i| self.chart.series[i].has_label()).collect();
        let wanted: Vec<f64> = named.iter().map(|&i| ends[i].1).collect();
        let heights = spread(&wanted, LABEL_GAP, TOP, self.bottom());
        for (i, s) in self.chart.series.iter().enumerate().filter(|(_, s)| !s.points.is_empty()) {
            let _ = write!(out, "<g class=\"series s{i} {}\">", escape(&s.class));
            let step = |(k, p): (usize, &Point)| {
                let (x, y) = at(i, p);
                format!("{}{} {}", if k == 0 { "M" } else { "L" }, Px(x), Px(y))
            };
            let path: String = s.points.iter().enumerate().map(step).collect();
            let _ =
                write!(out, "<path class=\"line\" d=\"{path}\"><title>{}</title></path>", escape(&s.label));
            for p in &s.points {
                let (x, y) = at(i, p);
                if p.high > p.low && self.size.full {
                    let _ = write!(
                        out,
                        "<line class=\"whisker\" x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{2}\"/>",
                        Px(x),
                        Px(self.y_px(p.low)),
                        Px(self.y_px(p.high))
                    );
                }
                s.marker.draw(out, x, y, &p.tip);
            }
            if let Some(place) = named.iter().position(|&n| n == i).filter(|_| self.size.names) {
                self.label(out, s, ends[i], heights[place]);
            }
            out.push_str("</g>");
        }
    }

    fn label(&self, out: &mut String, s: &Series, end: (f64, f64), height: f64) {
        let x = self.right() + 14.0;
        let _ = write!(
            out,
            "<path class=\"leader\" d=\"M{} {}L{} {}L{} {}\"/><text class=\"end\" x=\"{}\" y=\"{}\">{}</text>",
            Px(end.0 + 6.0),
            Px(end.1),
            Px(self.right() + 1.0),
            Px(height),
            Px(x - 3.0),
            Px(height),
            Px(x),
            Px(height + 4.5),
            escape(&s.label)
        );
    }
}

impl Series {
    fn has_label(&self) -> bool {
        !self.label.is_empty() && !self.points.is_empty()
    }
}

impl Marker {
    fn draw(self, out: &mut String, x: f64, y: f64, tip: &str) {
        let polygon = |corners: &[(f64, f64)]| {
            let points: Vec<String> =
                corners.iter().map(|c| format!("{},{}", Px(x + c.0), Px(y + c.1))).collect();
            format!("polygon class=\"mark\" points=\"{}\"", points.join(" "))
        };
        let (tag, shape) = match self {
            Self::Circle => {
                ("circle", format!("circle class=\"mark\" cx=\"{}\" cy=\"{}\" r=\"3.6\"", Px(x), Px(y)))
            }
            Self::Ring => {
                ("circle", format!("circle class=\"mark ring\" cx=\"{}\" cy=\"{}\" r=\"3.4\"", Px(x), Px(y)))
            }
            Self::Square => ("polygon", polygon(&[(-3.1, -3.1), (3.1, -3.1), (3.1, 3.1), (-3.1, 3.1)])),
            Self::Diamond => ("polygon", polygon(&[(0.0, -4.6), (4.6, 0.0), (0.0, 4.6), (-4.6, 0.0)])),
            Self::TriangleUp => ("polygon", polygon(&[(0.0, -4.4), (4.2, 3.2), (-4.2, 3.2)])),
            Self::TriangleDown => ("polygon", polygon(&[(0.0, 4.4), (4.2, -3.2), (-4.2, -3.2)])),
            Self::None => return,
        };
        let _ = write!(out, "<{shape}><title>{}</title></{tag}>", escape(tip));
    }
}
