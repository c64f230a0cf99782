//! Time and output of each stage.

use pkv_recipe::plan::{human_bytes, human_secs};
use pkv_shard::Stage;
use serde::Serialize;
use serde_json::Value;

use crate::run::RunData;

/// The table of stages.
#[derive(Serialize)]
pub struct Stages {
    pub rows: Vec<StageRow>,
    /// Which stage took most of the time.
    pub reading: Option<String>,
    pub total_time: String,
    pub total_size: String,
    /// Measured while evaluating: what one prefill, one scoring, one prediction took.
    pub timings: Vec<TimingRow>,
}

#[derive(Serialize)]
pub struct StageRow {
    pub name: String,
    pub what: String,
    pub time: String,
    /// Share of the longest stage's time, percent, for a bar.
    pub bar: f64,
    pub size: String,
    pub summary: String,
}

#[derive(Serialize)]
pub struct TimingRow {
    pub what: String,
    pub times: u64,
    pub each: String,
}

/// Stages that ran or left something; empty for a run that did nothing yet.
pub fn stages(data: &RunData) -> Stages {
    let record = |name: &str| data.run.stages.get(name);
    let secs = |name: &str| record(name).map(|r| r.secs);
    // The page that is being written has no time yet; one of an earlier page would mislead.
    let stages = Stage::ALL.into_iter().filter(|stage| *stage != Stage::Report);
    let longest = stages.clone().filter_map(|stage| secs(stage.name())).fold(0.0, f64::max);
    let rows: Vec<StageRow> = stages
        .clone()
        .filter(|stage| record(stage.name()).is_some() || data.size(*stage).is_some())
        .map(|stage| {
            let secs = secs(stage.name());
            StageRow {
                name: stage.name().to_owned(),
                what: stage.meaning().to_owned(),
                time: secs.map_or_else(|| "–".to_owned(), human_secs),
                bar: secs.map_or(0.0, |s| if longest > 0.0 { 100.0 * s / longest } else { 0.0 }),
                size: data.size(stage).map_or_else(|| "–".to_owned(), human_bytes),
                summary: record(stage.name()).map(|r| brief(&r.summary)).unwrap_or_default(),
            }
        })
        .collect();
    let longest_stage = stages.clone().find(|stage| secs(stage.name()) == Some(longest));
    let total: f64 = stages.filter_map(|stage| secs(stage.name())).sum();
    Stages {
        reading: longest_stage.filter(|_| total > 0.0).map(|stage| {
            let share = 100.0 * longest / total;
            format!("The stage {} took {share:.0}% of the time: {}.", stage.name(), stage.meaning())
        }),
        rows,
        total_time: human_secs(total),
        total_size: human_bytes(data.sizes.iter().map(|s| s.1).sum()),
        timings: timings(data),
    }
}

fn timings(data: &RunData) -> Vec<TimingRow> {
    let timings = data.results.iter().flat_map(|r| &r.timings).filter(|t| t.times > 0);
    timings
        .map(|t| TimingRow {
            what: t.what.clone(),
            times: t.times,
            each: short_time(t.secs / t.times as f64),
        })
        .collect()
}

pub fn short_time(secs: f64) -> String {
    match secs {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 0.0995 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => human_secs(s),
    }
}

/// `examples 640, tokens 850000` of a JSON object; deeper values are left out, and seconds, which have a
/// column.
fn brief(summary: &Value) -> String {
    let show = |v: &Value| match v {
        Value::Number(n) => n.as_f64().map(|f| match f {
            f if f.fract() == 0.0 => grouped(f as i64),
            f if f.abs() < 100.0 => format!("{f:.3}"),
            f => format!("{f:.1}"),
        }),
        Value::String(s) => Some(s.clone()),
        _ => None,
    };
    let entries = summary.as_object().into_iter().flatten().filter(|(k, _)| k.as_str() != "secs");
    entries
        .filter_map(|(k, v)| match (k.as_str(), v.as_f64()) {
            ("compute_s", Some(secs)) => Some(format!("computing {}", short_time(secs))),
            ("idle_share", Some(share)) => Some(format!("idle {:.1}%", 100.0 * share)),
            ("finished", _) => None,
            _ => Some(format!("{} {}", k.replace('_', " "), show(v)?)),
        })
        .collect::<Vec<_>>()
        .join(", ")
}

/// `850 000`, in groups of three parted by narrow spaces.
fn grouped(n: i64) -> String {
    let digits = n.unsigned_abs().to_string();
    let mut out = if n < 0 { "-".to_owned() } else { String::new() };
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digits.len() > 4 {
            out.push('\u{202f}');
        }
        out.push(d);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn summaries_are_short() {
        let summary = json!({"examples": 640, "mean_tokens": 1328.123456, "nested": {"a": 1}, "secs": 3.5, "best": "step 900", "tokens": 850_123});
        assert_eq!(brief(&summary), "examples 640, mean tokens 1328.1, best step 900, tokens 850\u{202f}123");
        assert_eq!(brief(&Value::Null), "");
        assert_eq!(grouped(-1_234_567), "-1\u{202f}234\u{202f}567");
    }

    #[test]
    fn times_below_a_second_have_their_unit() {
        let times: Vec<_> = [2e-5, 0.0123, 0.25, 3.2].map(short_time).to_vec();
        assert_eq!(times, ["20 µs", "12.3 ms", "250 ms", "3.2 s"]);
    }
}
