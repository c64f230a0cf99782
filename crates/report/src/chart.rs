//! Charts as SVG text: scales, axes, lines with intervals, heat maps.
//!
//! Colours and strokes are classes of `templates/chart.css`, so that one chart serves light and
//! dark pages; the numbers come from `figures`. Every chart is one `<svg>` with a
//! `role="img"` and a label, and every mark has a `<title>` that a browser shows as a tooltip.

mod axis;
mod heat;
mod labels;
mod line;

pub use axis::{Axis, Scale, percent_text};
pub use heat::{HeatMap, Tone};
pub use line::{LineChart, Marker, Point, Series};

use std::fmt::{self, Display};

use minijinja::HtmlEscape;

/// Colours of charts, light and dark.
pub const CSS: &str = include_str!("../templates/chart.css");

/// `text` for an element's content or a quoted attribute.
pub fn escape(text: &str) -> impl Display {
    HtmlEscape(text)
}

/// A coordinate: a tenth of a pixel is finer than any screen shows.
#[derive(Clone, Copy)]
pub(crate) struct Px(pub f64);

impl Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0 * 10.0).round() / 10.0;
        // `-0` would be a needless difference between machines.
        write!(f, "{}", if tenths == 0.0 { 0.0 } else { tenths })
    }
}

/// The chart as a file of its own, with its colours and a ground to lie on.
pub fn standalone(svg: &str) -> String {
    let at = svg.find('>').map_or(0, |i| i + 1);
    let (open, rest) = svg.split_at(at);
    let open = open.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 1);
    format!(
        "{open}<style>{CSS}</style><rect class=\"ground\" width=\"100%\" height=\"100%\" rx=\"8\"/>{rest}"
    )
}
