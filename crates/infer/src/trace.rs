//! Phases of prefills as a trace for ui.perfetto.dev.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::timeline::Phase;

/// Phases of one prefill.
#[derive(Clone, Debug)]
pub struct Trace {
    pub name: String,
    pub phases: Vec<Phase>,
}

/// Write traces in the Chrome trace format: microseconds, a process per prefill, a row per lane.
///
/// # Errors
/// The file cannot be written.
pub fn write_traces(path: &Path, traces: &[Trace]) -> Result<()> {
    let lanes = ["target", "proxy", "mapper"];
    let row = |lane: &str| lanes.iter().position(|l| *l == lane).unwrap_or(lanes.len());
    let mut events: Vec<Value> = Vec::new();
    for (pid, trace) in traces.iter().enumerate() {
        events.push(json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": trace.name}}));
        events.extend(lanes.iter().map(
            |lane| json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": row(lane), "args": {"name": lane}}),
        ));
        events.extend(trace.phases.iter().map(|p| {
            json!({
                "ph": "X", "name": p.name, "pid": pid, "tid": row(p.lane),
                "ts": p.start_secs * 1e6, "dur": (p.end_secs - p.start_secs) * 1e6,
                "args": {"peak_bytes": p.peak_bytes},
            })
        }));
    }
    let text = serde_json::to_string(&json!({"traceEvents": events}))?;
    std::fs::write(path, text).with_context(|| format!("cannot write the trace `{}`", path.display()))
}
