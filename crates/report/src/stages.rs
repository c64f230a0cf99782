//! Time and output of each stage.

use pkv_recipe::plan::{human_bytes, human_secs};
use pkv_shard::{Stage, in_words};
use serde::Serialize;

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
                summary: record(stage.name()).map(|r| in_words(&r.summary)).unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_below_a_second_have_their_unit() {
        let times: Vec<_> = [2e-5, 0.0123, 0.25, 3.2].map(short_time).to_vec();
        assert_eq!(times, ["20 µs", "12.3 ms", "250 ms", "3.2 s"]);
    }
}
