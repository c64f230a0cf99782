//! The start of a process's part in a stage: its plan, and which pieces have a marker.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use pkv_core::{Task, hinted};
use pkv_files::{WriteBudget, is_changed};

use super::{PLAN_FILE, PiecesPlan, PiecesState, folder, piece_of, read_marker, read_plan, write_sealed};
use crate::dir::check_fresh;

/// Names in a page of a bucket's listing.
const PAGE: u64 = 1000;

/// Pieces that had a marker when a process began.
#[derive(Debug)]
pub(super) struct Listed(Option<BTreeSet<u64>>);

impl Listed {
    /// By a listing, where each look for a name is a request, and those for the pieces of `task` are more
    /// than its pages. Otherwise nothing is known.
    pub fn of(dir: &Path, plan: &PiecesPlan, task: Task) -> Result<Self> {
        let pages = plan.shards / PAGE + 1;
        if plan.of_task(task).count() as u64 <= pages {
            return Ok(Self(None));
        }
        let names = pkv_files::names(&folder(dir))?;
        Ok(Self(names.map(|names| names.iter().filter_map(|name| piece_of(name)).collect())))
    }

    /// Whether a piece may have had one.
    pub fn may_hold(&self, shard: u64) -> bool {
        self.0.as_ref().is_none_or(|listed| listed.contains(&shard))
    }
}

/// Write the plan unless it is there; the pieces of `task` that have failed, of those that are `listed`.
pub(super) fn join(
    dir: &Path,
    plan: &PiecesPlan,
    task: Task,
    listed: &Listed,
    budget: &WriteBudget,
) -> Result<BTreeSet<u64>> {
    if read_plan(dir)?.as_ref() == Some(plan) {
        let has_failed = |shard: &u64| {
            listed.may_hold(*shard) && read_marker(dir, plan, *shard).is_some_and(|m| !m.is_done())
        };
        return Ok(plan.of_task(task).filter(has_failed).collect());
    }
    match &PiecesState::read(dir)? {
        // A plan of which nothing is done may be replaced.
        Some(state) if state.done_rows() > 0 => {
            check_fresh(dir, &plan.stage, &state.plan.fingerprint, &plan.fingerprint)?;
            ensure!(
                (state.plan.rows, state.plan.shard_rows) == (plan.rows, plan.shard_rows),
                hinted(
                    format!(
                        "`{}` is made in shards of {} of {} rows, not {} of {}",
                        dir.display(),
                        state.plan.shard_rows,
                        state.plan.rows,
                        plan.shard_rows,
                        plan.rows
                    ),
                    format!("make it again with `--redo {}`", plan.stage)
                )
            );
        }
        _ => {}
    }
    match write_sealed(&folder(dir).join(PLAN_FILE), plan, budget) {
        // Another process was first, on another machine.
        Err(e) if is_changed(&e) && read_plan(dir)?.as_ref() == Some(plan) => {}
        written => written?,
    }
    Ok(BTreeSet::new())
}
