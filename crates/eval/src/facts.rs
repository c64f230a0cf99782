//! Planted facts asked of a pruned cache: several questions per context, unknown while pruning.
//!
//! A context is prefilled and scored once. For every method, policy and retention ratio all its
//! questions are asked of the same pruned cache ([`crate::asking`]); the right answer is the wanted one.

use anyhow::Result;
use pkv_core::RetentionRatio;
use pkv_data::{FactContext, FactQuestion};
use pkv_recipe::{AnswerMatch, EvalSection, MethodName};
use serde::{Deserialize, Serialize};

use crate::answers::{Answer, Asked};
use crate::asking::{Asking, Question, Said};
use crate::bootstrap::Bootstrap;
use crate::cell::Cell;
use crate::context::PrunedContext;
use crate::forced::Continuation;
use crate::results::{FactsCell, FactsResults, Timing};

/// What one context says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FactsOutcome {
    pub asked: Vec<Asked>,
    /// The full cache's answers, one per question.
    pub full: Vec<Answer>,
    /// Answers of each cell.
    pub cells: Vec<Vec<Answer>>,
    pub timings: Vec<Timing>,
}

/// The section's cells, in the order of [`FactsOutcome::cells`].
///
/// # Errors
/// A ratio is out of range; a recipe that was checked has none such.
pub fn cells(section: &EvalSection) -> Result<Vec<Cell>> {
    let ratios =
        section.answer_ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    Ok(Cell::all(&section.methods, &section.answer_policies, &ratios))
}

impl Asking<'_> {
    /// Ask every question of the full cache and of every cell's pruned one; times are left to the caller.
    ///
    /// # Errors
    /// The context has no question, or a forward pass fails.
    pub fn facts(
        &self,
        context: &FactContext,
        section: &EvalSection,
        pruned: &PrunedContext,
    ) -> Result<FactsOutcome> {
        let cells = cells(section)?;
        let questions: Vec<Question> = context
            .questions
            .iter()
            .map(|q| Question {
                continuation: Continuation {
                    prompt: q.question.iter().chain(self.tokenizer.switch()).copied().collect(),
                    // A model without a stop token cannot say that it is done; its answer alone counts.
                    wanted: q.answer.iter().chain(self.tokenizer.stop_tokens().first()).copied().collect(),
                },
                max_tokens: section.max_answer_tokens,
            })
            .collect();
        let answer = |(said, q): (Said, &FactQuestion)| {
            let wanted = &q.answer_text;
            let correct = match (section.answer_match, &said.text) {
                (_, None) => true,
                (AnswerMatch::Exact, Some(_)) => false,
                (AnswerMatch::Contains, Some(t)) => t.to_lowercase().contains(&wanted.to_lowercase()),
            };
            let text = said.text.unwrap_or_else(|| wanted.clone());
            Answer { text, correct, kl: said.kl, flipped: said.flipped, tokens: said.tokens }
        };
        let rows = self.ask(&questions, &cells, pruned)?.into_iter();
        let mut rows = rows.map(|row| row.into_iter().zip(&context.questions).map(answer).collect());
        let full = rows.next().unwrap_or_default();
        let asked = context
            .questions
            .iter()
            .map(|q| Asked { question: q.question_text.clone(), wanted: q.answer_text.clone() });
        Ok(FactsOutcome { asked: asked.collect(), full, cells: rows.collect(), timings: Vec::new() })
    }
}

/// All contexts together.
///
/// # Errors
/// As [`cells`].
pub fn summarize(
    section: &EvalSection,
    outcomes: &[FactsOutcome],
    bootstrap: &Bootstrap,
) -> Result<FactsResults> {
    let cells = cells(section)?;
    let total = |f: &dyn Fn(&FactsOutcome) -> f64| outcomes.iter().map(f).collect::<Vec<f64>>();
    let correct = |answers: &[Answer]| answers.iter().filter(|a| a.correct).count() as f64;
    let questions = total(&|o| o.asked.len() as f64);
    let tokens = total(&|o| o.full.iter().map(|a| f64::from(a.tokens)).sum());
    let share = |above: &[f64], below: &[f64]| {
        bootstrap.ratio(above, below).unwrap_or(crate::results::Interval::exact(0.0))
    };
    let full = total(&|o| correct(&o.full));
    let of_cell = |i: usize| total(&|o| correct(&o.cells[i]));
    let results = cells.iter().enumerate().map(|(i, cell)| {
        let mine = of_cell(i);
        let kvzip = cells
            .iter()
            .position(|c| (c.method, c.policy, c.ratio) == (MethodName::KVZIP, cell.policy, cell.ratio));
        FactsCell {
            method: cell.method,
            policy: cell.policy,
            ratio: cell.ratio.get(),
            accuracy: share(&mine, &questions),
            kl: share(&total(&|o| o.cells[i].iter().map(|a| a.kl).sum()), &tokens),
            flips: share(&total(&|o| o.cells[i].iter().map(|a| f64::from(a.flipped)).sum()), &tokens),
            of_kvzip: kvzip.and_then(|k| bootstrap.ratio(&mine, &of_cell(k))),
            of_full: bootstrap.ratio(&mine, &full),
        }
    });
    Ok(FactsResults {
        contexts: outcomes.len(),
        questions: outcomes.iter().map(|o| o.asked.len()).sum(),
        answer_match: section.answer_match,
        full: share(&full, &questions),
        cells: results.collect(),
    })
}
