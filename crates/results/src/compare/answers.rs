//! Scores by context, read back from the tables that an evaluation leaves.

use std::path::Path;

use anyhow::Result;
use pkv_core::{Policy, sha256_hex};
use pkv_recipe::MethodName;
use serde_json::json;

use crate::columns::Columns;

/// Every answer of an evaluation, summed up by task and context.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    /// In the order of the file.
    pub tasks: Vec<(String, Vec<ContextScores>)>,
}

/// Outcome of one context.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContextScores {
    /// Hash of its tokens and of what was asked; `None` where the file does not tell contexts apart.
    pub id: Option<String>,
    /// Questions; 1 where scores are no sums.
    pub weight: f64,
    /// Sum of the full cache's scores.
    pub full: f64,
    /// Sum of the scores of each cell.
    pub cells: Vec<(MethodName, Policy, f64, f64)>,
}

impl ContextScores {
    /// The sum of one cell.
    pub fn cell(&self, method: MethodName, policy: Policy, ratio: f64) -> Option<f64> {
        let found = self.cells.iter().find(|c| (c.0, c.1, c.2) == (method, policy, ratio));
        found.map(|c| c.3)
    }

    fn add(&mut self, method: MethodName, policy: Policy, ratio: f64, score: f64) {
        match self.cells.iter_mut().find(|c| (c.0, c.1, c.2) == (method, policy, ratio)) {
            Some(cell) => cell.3 += score,
            None => self.cells.push((method, policy, ratio, score)),
        }
    }
}

impl Answers {
    /// Read `eval/answers.parquet`. Rows of methods that this version does not know are left out.
    ///
    /// # Errors
    /// The file is absent or no such table.
    pub fn read(path: &Path) -> Result<Self> {
        let file = Columns::read(path)?;
        let ids = if file.has("context_id") { file.text("context_id")? } else { Vec::new() };
        let (tasks, contexts) = (file.text("task")?, file.counts("context")?);
        let (questions, golds) = (file.text("question_text")?, file.text("gold")?);
        let (methods, policies) = (file.text("method")?, file.text("policy")?);
        let (ratios, scores) = (file.numbers("ratio")?, file.numbers("score")?);
        let mut out = Self::default();
        // What was asked of the context that is being read, and where it is.
        let mut asked = String::new();
        let mut at: Option<(usize, u32)> = None;
        for row in 0..tasks.len() {
            let task = match out.tasks.iter().position(|t| t.0 == tasks[row]) {
                Some(task) => task,
                None => {
                    out.tasks.push((tasks[row].clone(), Vec::new()));
                    out.tasks.len() - 1
                }
            };
            let all = &mut out.tasks[task].1;
            if at != Some((task, contexts[row])) {
                at = Some((task, contexts[row]));
                asked.clear();
                all.push(ContextScores {
                    id: ids.get(row).filter(|id| !id.is_empty()).cloned(),
                    ..ContextScores::default()
                });
            }
            let Some(context) = all.last_mut() else { continue };
            if methods[row] == "full" {
                asked.push_str(&json!([questions[row], golds[row]]).to_string());
                context.weight += 1.0;
                context.full += scores[row];
                // Of the tokens alone until the next question, then of all that was asked.
                if let Some(id) = ids.get(row).filter(|id| !id.is_empty()) {
                    context.id = Some(sha256_hex(format!("{id}{asked}").as_bytes()));
                }
            } else if let Some(policy) = Policy::named(&policies[row]) {
                context.add(MethodName::new(&methods[row]), policy, ratios[row], scores[row]);
            }
        }
        Ok(out)
    }

    pub fn task(&self, name: &str) -> Option<&[ContextScores]> {
        self.tasks.iter().find(|t| t.0 == name).map(|t| t.1.as_slice())
    }
}

/// Recall of KVzip's kept set by context, of one method, from `eval/agreement.parquet`.
///
/// # Errors
/// The file is no such table.
pub fn per_context_recall(path: &Path, of: MethodName) -> Result<Vec<ContextScores>> {
    let file = Columns::read(path)?;
    let (ids, methods) = (file.text("context_id")?, file.text("method")?);
    let (policies, ratios) = (file.text("policy")?, file.numbers("ratio")?);
    let recall = file.numbers("recall")?;
    let mut out: Vec<ContextScores> = Vec::new();
    for row in (0..ids.len()).filter(|&row| methods[row] == of.name()) {
        let Some(policy) = Policy::named(&policies[row]) else { continue };
        let cell = (of, policy, ratios[row]);
        // A context that occurs twice begins anew where a cell comes again.
        let same = out
            .last()
            .is_some_and(|c| c.id.as_deref() == Some(&ids[row]) && c.cell(cell.0, cell.1, cell.2).is_none());
        if !same {
            out.push(ContextScores { id: Some(ids[row].clone()), weight: 1.0, ..ContextScores::default() });
        }
        if let Some(context) = out.last_mut() {
            context.cells.push((cell.0, cell.1, cell.2, recall[row]));
        }
    }
    Ok(out)
}
