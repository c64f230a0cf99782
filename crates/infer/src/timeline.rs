//! Timeline of a prefill: start, end, device and memory of each phase.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use tch::Device;

use crate::lane::Lane;

/// One stretch of work on one lane.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// `target`, `proxy` or `mapper`.
    pub lane: &'static str,
    /// Name of the phase, such as `prefill`.
    pub name: &'static str,
    /// Since the timeline's beginning.
    pub start_secs: f64,
    pub end_secs: f64,
    /// GPU: most bytes in tensors, since the phase began where phases follow each other, since the
    /// timeline's beginning where they overlap. CPU: bytes of the process in memory at the end.
    pub peak_bytes: Option<u64>,
}

/// A phase with all its stretches together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseTotal {
    pub lane: &'static str,
    pub name: &'static str,
    /// Time at work.
    pub secs: f64,
    pub start_secs: f64,
    pub end_secs: f64,
    pub peak_bytes: Option<u64>,
}

/// Phases as they come, from any thread.
#[derive(Debug)]
pub struct Timeline {
    begun: Instant,
    /// One phase at a time: each has its own memory peak.
    one_at_a_time: bool,
    phases: Mutex<Vec<Phase>>,
}

impl Timeline {
    /// Begin now. `one_at_a_time` promises that phases do not overlap.
    pub fn new(one_at_a_time: bool) -> Self {
        Self { begun: Instant::now(), one_at_a_time, phases: Mutex::default() }
    }

    /// Do `work` as a phase: from the end of what the lane had queued to the end of what `work` queues.
    ///
    /// # Errors
    /// Those of `work`, which is then no phase; a kernel queued before failed.
    pub fn time<R>(&self, lane: &Lane, name: &'static str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        lane.settle()?;
        if let (true, Device::Cuda(gpu)) = (self.one_at_a_time, lane.device()) {
            pkv_gpu::reset_peak(gpu)?;
        }
        let start_secs = self.secs();
        let result = work()?;
        lane.settle()?;
        self.push(Phase {
            lane: lane.name(),
            name,
            start_secs,
            end_secs: self.secs(),
            peak_bytes: peak_bytes(lane.device()),
        });
        Ok(result)
    }

    /// Seconds since the beginning.
    pub fn secs(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    fn push(&self, phase: Phase) {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push(phase);
    }

    /// All stretches, by their ends.
    pub fn phases(&self) -> Vec<Phase> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Phases by lane and name, in the order in which they first ended.
    pub fn totals(&self) -> Vec<PhaseTotal> {
        let mut totals: Vec<PhaseTotal> = Vec::new();
        for p in self.phases() {
            let secs = p.end_secs - p.start_secs;
            match totals.iter_mut().find(|t| t.lane == p.lane && t.name == p.name) {
                Some(t) => {
                    t.secs += secs;
                    t.start_secs = t.start_secs.min(p.start_secs);
                    t.end_secs = t.end_secs.max(p.end_secs);
                    t.peak_bytes = t.peak_bytes.max(p.peak_bytes);
                }
                None => totals.push(PhaseTotal {
                    lane: p.lane,
                    name: p.name,
                    secs,
                    start_secs: p.start_secs,
                    end_secs: p.end_secs,
                    peak_bytes: p.peak_bytes,
                }),
            }
        }
        totals
    }

    /// Time at work of one lane, all its phases together or those of one name.
    pub fn busy_secs(&self, lane: &str, name: Option<&str>) -> f64 {
        let of = |p: &&Phase| p.lane == lane && name.is_none_or(|n| n == p.name);
        self.phases().iter().filter(of).map(|p| p.end_secs - p.start_secs).sum()
    }

    /// Estimated time of these phases with proxy and mapper on a second device: the longer of the
    /// two sides, then the scores' way to the target, then pruning.
    ///
    /// Honest only of phases that did not slow each other down: those of the sequential regime.
    pub fn dual_critical_secs(&self) -> f64 {
        let side = self.busy_secs("proxy", None) + self.busy_secs("mapper", None);
        let target = |name| self.busy_secs("target", Some(name));
        target("prefill").max(side) + target("copy scores") + target("prune")
    }
}

/// Most bytes in a GPU's tensors since the last reset; on a CPU, what the process holds now.
fn peak_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(gpu) => pkv_gpu::cuda_memory(gpu).ok().map(|m| m.allocated_peak as u64),
        _ => resident_bytes(),
    }
}

/// Linux tells in pages of 4 KiB on every machine that libtorch's wheel runs on.
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    text.split_whitespace().nth(1)?.parse::<u64>().ok().map(|pages| pages * 4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_critical_path_is_the_longer_side() {
        let timeline = Timeline::new(true);
        let mut at = 0.0;
        for (lane, name, secs) in [
            ("proxy", "features", 0.3),
            ("mapper", "scores", 0.02),
            ("mapper", "scores", 0.03),
            ("target", "prefill", 1.5),
            ("target", "copy scores", 0.01),
            ("target", "prune", 0.2),
        ] {
            timeline.push(Phase { lane, name, start_secs: at, end_secs: at + secs, peak_bytes: Some(7) });
            at += secs;
        }
        assert!((timeline.dual_critical_secs() - 1.71).abs() < 1e-9);
        assert!((timeline.busy_secs("mapper", None) - 0.05).abs() < 1e-9);
        let totals = timeline.totals();
        assert_eq!(totals.len(), 5);
        assert!((totals[1].secs - 0.05).abs() < 1e-9);
        // A proxy slower than its target is the longer side.
        timeline.push(Phase {
            lane: "proxy",
            name: "features",
            start_secs: at,
            end_secs: at + 2.0,
            peak_bytes: None,
        });
        assert!((timeline.dual_critical_secs() - (2.35 + 0.21)).abs() < 1e-9);
    }

    #[test]
    fn a_process_is_in_memory() {
        assert!(resident_bytes().unwrap() > 1 << 20);
    }
}
