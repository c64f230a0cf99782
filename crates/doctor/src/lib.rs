//! Checks of the machine, and whether it meets a recipe's needs.
//!
//! Changes nothing: no folder is made, nothing is downloaded. Each check reports what it found and, if
//! something is wrong, the command or edit that repairs it. Needs of a recipe come from `plan`, which knows
//! them without opening a model.

mod hub;
mod machine;
mod needs;

use std::fmt::Write;
use std::path::Path;

use anyhow::Error;
use pkv_core::Hinted;
use pkv_hub::Hub;
use pkv_recipe::Recipe;
use pkv_recipe::plan::{Machine, Plan, human_secs};
use serde::Serialize;
use tch::Device;

use hub::{hub_access, token};
use machine::{cpu, disk, gpus, libtorch, memory};
use needs::needs;

/// A plan that takes longer than this on a CPU was hardly meant for one.
const LONG_SECS: f64 = 12.0 * 3600.0;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: String,
    pub status: Status,
    /// The finding.
    pub detail: String,
    /// The repair; empty if the check passed.
    pub hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// It works, but slower or with less than one may expect.
    Warn,
    /// A stage would fail.
    Fail,
}

/// Look at everything; with a recipe also at its models, its data, and whether its plan fits.
///
/// `runs` is the folder that run folders are made in; it need not exist.
pub fn checks(recipe: Option<&Recipe>, device: Device, runs: &Path) -> Vec<Check> {
    let plan = recipe.map(|r| Plan::new(r, on_device(device), &pkv_eval::work(r)));
    let mut out = vec![libtorch()];
    out.extend(gpus());
    out.push(cpu());
    out.push(memory(device, plan.as_ref()));
    out.push(disk(runs, plan.as_ref()));
    let hub = Hub::from_env();
    out.push(hub_access(&hub));
    out.push(token(hub.options()));
    if let (Some(recipe), Some(plan)) = (recipe, &plan) {
        out.extend(needs(recipe, hub));
        out.push(time(device, plan));
    }
    out
}

/// The machine that a device of this one is planned as, with the memory it has.
pub fn on_device(device: Device) -> Machine {
    match device {
        Device::Cuda(i) => {
            let memory = pkv_gpu::cuda_memory(i).ok().map(|m| m.total.max(0) as u64);
            Machine::gpu(pkv_gpu::model_name(i).as_deref(), memory)
        }
        _ => Machine {
            memory_bytes: pkv_gpu::host_memory().map(|memory| memory.total),
            ..Machine::cpu(tch::get_num_threads().max(1) as usize)
        },
    }
}

/// No check failed.
pub fn all_well(checks: &[Check]) -> bool {
    checks.iter().all(|c| c.status != Status::Fail)
}

/// The checks as lines for a terminal, ending in a line break; with `color`, each status has its own.
pub fn table(checks: &[Check], color: bool) -> String {
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for c in checks {
        // Green, yellow, bold red.
        let (status, sign) = match c.status {
            Status::Ok => ("ok  ", "32"),
            Status::Warn => ("warn", "33"),
            Status::Fail => ("FAIL", "1;31"),
        };
        let status = if color { format!("\u{1b}[{sign}m{status}\u{1b}[0m") } else { status.to_owned() };
        let _ = writeln!(out, "{status}  {:width$}  {}", c.name, c.detail);
        if !c.hint.is_empty() {
            let _ = writeln!(out, "      {:width$}  hint: {}", "", c.hint);
        }
    }
    out
}

impl Check {
    fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status: Status::Ok, detail: detail.into(), hint: String::new() }
    }

    fn warn(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status: Status::Warn, detail: detail.into(), hint: hint.into() }
    }

    fn fail(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, detail, hint) }
    }

    /// A failure with the hint that the error carries.
    fn error(name: &str, e: &Error) -> Self {
        Self::fail(name, format!("{e:#}"), Hinted::find(e).map_or("", Hinted::hint))
    }
}

fn time(device: Device, plan: &Plan) -> Check {
    let detail =
        format!("about {} on {} (`plan` shows the stages)", human_secs(plan.secs()), plan.machine.name);
    if device == Device::Cpu && plan.secs() > LONG_SECS {
        Check::warn(
            "time",
            detail,
            "this pair is meant for a GPU; `recipes/demo.toml` runs on a CPU in minutes",
        )
    } else {
        Check::ok("time", detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_count_and_hints_have_a_line() {
        let checks = [Check::ok("cpu", "2 threads"), Check::warn("hub", "out of reach", "use a mirror")];
        assert!(all_well(&checks));
        assert_eq!(
            table(&checks, false),
            "ok    cpu  2 threads\nwarn  hub  out of reach\n           hint: use a mirror\n"
        );
        let full = [Check::fail("disk", "full", "")];
        assert!(!all_well(&full));
        assert_eq!(table(&full, true), "\u{1b}[1;31mFAIL\u{1b}[0m  disk  full\n");
        let e = Error::from(pkv_core::hinted("no model", "fetch it")).context("cannot look");
        let check = Check::error("target", &e);
        assert_eq!((check.detail.as_str(), check.hint.as_str()), ("cannot look: no model", "fetch it"));
    }

    #[test]
    fn a_machine_without_a_recipe_is_looked_at_whole() {
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let found = checks(None, device, Path::new("."));
        for name in ["libtorch", "cpu", "memory", "disk", "hub", "token"] {
            assert!(found.iter().any(|c| c.name == name), "{name}");
        }
        assert!(found.iter().any(|c| c.name.starts_with("gpu")));
    }
}
