//! Scales from numbers to pixels, and their ticks.

/// Least distance of the ticks of ratios, as a share of the axis: room for a text such as `12.5%`.
const TICKS_APART: f64 = 0.07;

/// Linear or logarithmic scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Linear {
        from: f64,
        to: f64,
    },
    /// Both ends positive; `from` may be the larger one.
    Log {
        from: f64,
        to: f64,
    },
}

/// One axis with its ticks.
#[derive(Clone, Debug)]
pub struct Axis {
    /// The quantity, with its unit.
    pub label: String,
    pub scale: Scale,
    /// Values and their texts.
    pub ticks: Vec<(f64, String)>,
}

impl Scale {
    /// Position of `value` between the ends, 0 to 1; if the ends are equal, the middle.
    pub fn share(self, value: f64) -> f64 {
        let (from, to, value) = match self {
            Self::Linear { from, to } => (from, to, value),
            Self::Log { from, to } => (from.ln(), to.ln(), value.ln()),
        };
        let share = (value - from) / (to - from);
        if share.is_finite() { share } else { 0.5 }
    }
}

impl Axis {
    /// Shares of a whole, in percent, from 0 to 100.
    pub fn percent(label: &str) -> Self {
        let ticks = (0..=5).map(|i| (f64::from(i) * 0.2, format!("{}%", 20 * i))).collect();
        Self { label: label.to_owned(), scale: Scale::Linear { from: 0.0, to: 1.0 }, ticks }
    }

    /// Retention ratios on a log scale, from the most kept (left) to the least.
    ///
    /// Left to right is the direction in which one prunes, and leaves the end where methods
    /// differ beside their labels.
    pub fn kept(label: &str, ratios: &[f64]) -> Self {
        let mut at: Vec<f64> = ratios.to_vec();
        at.sort_by(|a, b| b.total_cmp(a));
        at.dedup();
        let (from, to) = (at.first().copied().unwrap_or(1.0), at.last().copied().unwrap_or(0.01));
        let scale = Scale::Log { from, to };
        // Where ratios lie close together, the one that is shorter to write has the tick: 3% rather than
        // 3.125%.
        let mut shortest = at.clone();
        shortest.sort_by_key(|&r| percent_text(r).len());
        let mut marked: Vec<f64> = Vec::new();
        for r in shortest {
            let apart = |m: &f64| (scale.share(*m) - scale.share(r)).abs() >= TICKS_APART;
            if marked.iter().all(apart) {
                marked.push(r);
            }
        }
        let ticks = at.iter().filter(|r| marked.contains(r)).map(|&r| (r, percent_text(r))).collect();
        Self { label: label.to_owned(), scale, ticks }
    }

    /// Round numbers that enclose `[low, high]`, about `count` of them.
    pub fn nice(label: &str, low: f64, high: f64, count: usize) -> Self {
        let span = if high > low { high - low } else { high.abs().max(1.0) };
        let raw = span / count.max(1) as f64;
        let power = 10f64.powf(raw.log10().floor());
        let step =
            [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|m| m * power).find(|&s| s >= raw * 0.999).unwrap_or(raw);
        let from = (low / step).floor();
        let to = (high / step).ceil().max(from + 1.0);
        let digits = (-step.log10()).ceil().max(0.0) as usize + usize::from(two_digits(step) && step < 10.0);
        let ticks = (0..=(to - from) as u64).map(|i| {
            let v = (from + i as f64) * step;
            (v, format!("{v:.digits$}"))
        });
        Self {
            label: label.to_owned(),
            ticks: ticks.collect(),
            scale: Scale::Linear { from: from * step, to: to * step },
        }
    }

    /// Of values that are shares, where the axis counts in percent.
    pub fn of_shares(mut self) -> Self {
        if let Scale::Linear { from, to } = self.scale {
            self.scale = Scale::Linear { from: from / 100.0, to: to / 100.0 };
        }
        self.ticks.iter_mut().for_each(|t| t.0 /= 100.0);
        self
    }

    /// Powers of ten, with as many of their doubles and fivefolds between as there is room for; all positive.
    pub fn nice_log(label: &str, low: f64, high: f64) -> Self {
        let (low, high) = (low.min(high * 0.8), high.max(low * 1.25));
        let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let steps: &[f64] = match (high / low).log10() {
            d if d < 0.6 => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0],
            d if d < 1.2 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            d if d < 2.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let all = decades.flat_map(|d| steps.iter().map(move |s| (s * 10f64.powi(d), d)));
        let ticks = all
            .filter(|(v, _)| (low * 0.999..=high * 1.001).contains(v))
            .map(|(v, d)| (v, format!("{v:.*}", (1 - d).clamp(0, 9) as usize)))
            .map(|(v, text)| (v, trim_zeros(text)))
            .collect();
        Self { label: label.to_owned(), scale: Scale::Log { from: low, to: high }, ticks }
    }
}

/// `0.5`, not `0.50`.
fn trim_zeros(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Steps of 2.5, 0.25 and so on need one digit more than their power of ten.
fn two_digits(step: f64) -> bool {
    let mantissa = step / 10f64.powf(step.log10().floor());
    (mantissa - 2.5).abs() < 1e-6
}

/// `5%`, `0.5%`.
pub fn percent_text(ratio: f64) -> String {
    let percent = (ratio * 1e6).round() / 1e4;
    format!("{percent}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_kept_is_further_left() {
        let axis = Axis::kept("kept", &[0.01, 0.1, 0.5, 0.1]);
        assert_eq!(axis.ticks.iter().map(|t| t.1.as_str()).collect::<Vec<_>>(), ["50%", "10%", "1%"]);
        let close = [0.5, 0.3, 0.2, 0.125, 0.1, 0.0625, 0.05, 0.03125, 0.03, 0.02, 0.01];
        let axis = Axis::kept("kept", &close);
        let texts: Vec<&str> = axis.ticks.iter().map(|t| t.1.as_str()).collect();
        assert_eq!(texts, ["50%", "30%", "20%", "10%", "5%", "3%", "2%", "1%"], "no two texts overlap");
        assert_eq!((axis.scale.share(0.5), axis.scale.share(0.01)), (0.0, 1.0));
        let middle = axis.scale.share(0.1);
        assert!((0.35..0.45).contains(&middle), "{middle}");
    }

    #[test]
    fn a_single_value_lies_in_the_middle() {
        assert_eq!(Axis::kept("kept", &[0.05]).scale.share(0.05), 0.5);
    }

    #[test]
    fn ticks_of_a_log_axis_lie_on_it() {
        for (low, high) in [(0.4, 1.7), (0.03, 2.0), (1e-4, 50.0), (0.5, 0.5), (0.41, 0.44)] {
            let axis = Axis::nice_log("y", low, high);
            assert!((1..=9).contains(&axis.ticks.len()), "{low} {high}: {:?}", axis.ticks);
            for (v, text) in &axis.ticks {
                assert!((-0.01..=1.01).contains(&axis.scale.share(*v)), "{v}");
                assert!((text.parse::<f64>().unwrap() / v - 1.0).abs() < 1e-9, "{v} {text}");
            }
        }
    }

    #[test]
    fn nice_ticks_enclose_the_range() {
        for (low, high) in [
            (0.0, 1.0),
            (0.31, 0.934),
            (-3.0, 12.0),
            (5.0, 5.0),
            (0.0, 1.7e-4),
            (0.0, 1500.0),
            (80.1, 92.2),
            (0.0, 110.0),
        ] {
            let axis = Axis::nice("y", low, high, 5);
            let (first, last) = (axis.ticks[0].0, axis.ticks[axis.ticks.len() - 1].0);
            assert!(first <= low && high <= last * (1.0 + 1e-12), "{low} {high}: {first} {last}");
            assert!((3..=8).contains(&axis.ticks.len()) || low == high, "{:?}", axis.ticks);
            let mut texts: Vec<_> = axis.ticks.iter().map(|t| &t.1).collect();
            texts.dedup();
            assert_eq!(texts.len(), axis.ticks.len(), "texts repeat: {:?}", axis.ticks);
            for (v, text) in &axis.ticks {
                assert!((text.parse::<f64>().unwrap() - v).abs() <= 1e-9 * v.abs(), "{v} is written {text}");
            }
        }
    }
}
