//! The scope of an evaluation, known before a model is loaded: tasks, number of contexts of each, and cells.

use std::path::Path;

use anyhow::Result;
use pkv_core::{Fingerprint, RetentionRatio};
use pkv_data::FactContext;
use pkv_recipe::EvalSection;
use pkv_results::cell::Cell;
use pkv_results::store::{About, Identity, TaskStore};
use pkv_results::{CONTEXTS_FOLDER, RESULTS_FILE, Results};
use pkv_tasks::Benchmark;
use serde_json::json;

use crate::labels::LabelPlan;
use crate::task::{Facts, Task};
use crate::{tasks, worked};

/// Settings that determine the work of one evaluation.
pub struct Asked<'a> {
    pub section: &'a EvalSection,
    /// Settings on which the numbers of every task depend, without those of `section`.
    pub base: &'a Fingerprint,
    /// Examples of the test split.
    pub test_examples: usize,
    /// Contexts of the `facts` task; none without it.
    pub fact_contexts: &'a [FactContext],
    pub benchmarks: &'a [Benchmark<'a>],
}

/// One task.
pub struct AskedTask<'a> {
    pub identity: Identity,
    pub contexts: usize,
    pub cells: Vec<Cell>,
    pub work: Work<'a>,
}

/// Work on each context of a task.
pub enum Work<'a> {
    /// Predictions are held against the stored labels.
    Labels,
    /// Pruned caches are asked.
    Ask(Box<dyn Task + 'a>),
    /// Kept pairs of one context, position by position.
    Example { of_facts: bool },
}

impl<'a> Asked<'a> {
    /// Every task, in the order of the work.
    ///
    /// # Errors
    /// A ratio is out of range, or there is no context for the `facts` task.
    pub fn tasks(&self) -> Result<Vec<AskedTask<'a>>> {
        let section = self.section;
        let of = |about, settings, contexts, cells, work| AskedTask {
            identity: Identity::new(self.base, about, settings),
            contexts,
            cells,
            work,
        };
        let labels = LabelPlan::new(section)?.cells;
        let mut all = vec![of(About::Labels, json!({}), self.test_examples, labels, Work::Labels)];
        let cells = answer_cells(section)?;
        // Of the tasks that read a pruned cache; outcomes from before there was a choice say nothing of it.
        let recent = |settings: serde_json::Value| match section.keep_recent {
            0 => settings,
            newest => json!({ "settings": settings, "keep_recent": newest }),
        };
        for task in tasks::open(self)? {
            let info = task.info();
            all.push(of(info.about, recent(info.settings), info.contexts, cells.clone(), Work::Ask(task)));
        }
        let of_facts = !self.fact_contexts.is_empty();
        if of_facts || self.test_examples > 0 {
            let planted = if of_facts { Facts::planted(section, self.fact_contexts) } else { json!({}) };
            let cells = worked::cells(section)?;
            all.push(of(About::Example { of_facts }, planted, 1, cells, Work::Example { of_facts }));
        }
        Ok(all)
    }

    /// Whether `out` holds results of everything that is asked for.
    ///
    /// # Errors
    /// As [`Asked::tasks`].
    pub fn is_complete(&self, out: &Path, fingerprint: &Fingerprint) -> Result<bool> {
        let Ok(results) = Results::read(&out.join(RESULTS_FILE)) else { return Ok(false) };
        let made = results.made();
        if made.iter().all(|(_, made)| made.fingerprint.is_empty()) {
            // Of an earlier version, which knows its own choices only.
            return Ok(results.fingerprint == fingerprint.hash());
        }
        if results.bootstrap != Some(self.section.bootstrap) {
            // The same outcomes with other intervals.
            return Ok(false);
        }
        let contexts = out.join(CONTEXTS_FOLDER);
        for asked in self.tasks()? {
            let store = TaskStore::at(&contexts, asked.identity);
            let identity = store.identity();
            let count = store.count()?;
            let is_summed_up = match identity.about {
                About::Example { .. } => results.worked_example.is_some(),
                _ => made.iter().any(|(name, made)| {
                    *name == identity.about.name()
                        && made.fingerprint == identity.fingerprint
                        && made.outcomes == count
                }),
            };
            if !is_summed_up {
                return Ok(false);
            }
            for index in 0..asked.contexts {
                if !store.missing(index, &asked.cells)?.is_empty() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// The section's cells of tasks.
fn answer_cells(section: &EvalSection) -> Result<Vec<Cell>> {
    let ratios =
        section.answer_ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    Ok(Cell::all(&section.methods, &section.answer_policies, &ratios))
}

impl AskedTask<'_> {
    /// For the progress bar.
    pub fn what(&self) -> String {
        match &self.work {
            Work::Labels => "test examples against their labels".to_owned(),
            Work::Ask(task) => task.info().what,
            Work::Example { .. } => "worked example".to_owned(),
        }
    }
}
