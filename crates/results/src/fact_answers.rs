//! Single answers to planted facts, read back from `eval/answers.parquet`.

use std::path::Path;

use anyhow::Result;
use pkv_core::Policy;
use pkv_recipe::MethodName;

use crate::columns::Columns;

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct FactAnswer {
    /// Number of the context, and of the question about it.
    pub place: (u32, u32),
    pub question: String,
    pub wanted: String,
    /// Method, policy and ratio of a pruned cache; `None` is the full one.
    pub cell: Option<(MethodName, Policy, f64)>,
    pub answer: String,
    pub is_right: bool,
    pub context_tokens: Option<u32>,
    /// Kind of fact; empty if unknown.
    pub kind: String,
    /// Place of the fact in its context, from 0 to 1.
    pub depth: Option<f64>,
    /// Of the fact's KV pairs, the share that the cache holds.
    pub kept: Option<f64>,
}

/// Every answer of the `facts` task. Files of earlier versions lack the last four columns.
///
/// # Errors
/// The file is absent or no such table.
pub fn fact_answers(path: &Path) -> Result<Vec<FactAnswer>> {
    let file = Columns::read(path)?;
    let texts = |name| if file.has(name) { file.text(name) } else { Ok(Vec::new()) };
    let numbers = |name| if file.has(name) { file.optional_numbers(name) } else { Ok(Vec::new()) };
    let (tasks, contexts, questions) =
        (file.text("task")?, file.counts("context")?, file.counts("question")?);
    let (asked, wanted, answers) = (file.text("question_text")?, file.text("gold")?, file.text("answer")?);
    let (methods, policies) = (file.text("method")?, file.text("policy")?);
    let (ratios, scores) = (file.numbers("ratio")?, file.numbers("score")?);
    let lengths = if file.has("context_tokens") { file.counts("context_tokens")? } else { Vec::new() };
    let (kinds, depths, kept) = (texts("kind")?, numbers("depth")?, numbers("kept")?);
    let one = |row: usize| {
        let policy = Policy::named(&policies[row]);
        Some(FactAnswer {
            place: (contexts[row], questions[row]),
            question: asked[row].clone(),
            wanted: wanted[row].clone(),
            cell: match methods[row].as_str() {
                "full" => None,
                method => Some((MethodName::new(method), policy?, ratios[row])),
            },
            answer: answers[row].clone(),
            is_right: scores[row] == 1.0,
            context_tokens: lengths.get(row).copied().filter(|&n| n > 0),
            kind: kinds.get(row).cloned().unwrap_or_default(),
            depth: depths.get(row).copied().flatten(),
            kept: kept.get(row).copied().flatten(),
        })
    };
    Ok((0..tasks.len()).filter(|&row| tasks[row] == "facts").filter_map(one).collect())
}
