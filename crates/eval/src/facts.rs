//! Planted facts asked of a pruned cache: several questions per context, unknown while pruning.
//!
//! A context is prefilled and scored once. For every method, policy and retention ratio all its
//! questions are asked of the same pruned cache ([`crate::asking`]); the right answer is the wanted one.

use anyhow::Result;
use pkv_core::RetentionRatio;
use pkv_data::{FactContext, FactQuestion};
use pkv_recipe::{AnswerMatch, EvalSection};
use pkv_tasks::Squad;
use serde::{Deserialize, Serialize};

use crate::answers::{Answer, Asked};
use crate::asking::{Asking, Question, Said};
use crate::bootstrap::Draws;
use crate::cell::{Cell, Cells};
use crate::clock;
use crate::columns::context_id;
use crate::context::PrunedContext;
use crate::forced::Continuation;
use crate::results::{FactsCell, FactsResults, Interval, Made, Timing};
use crate::store::Outcome;

/// What one context says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FactsOutcome {
    /// [`crate::columns::context_id`].
    pub context_id: String,
    pub asked: Vec<Asked>,
    /// The full cache's answers, one per question.
    pub full: Vec<Answer>,
    /// Answers of each cell.
    pub cells: Cells<Vec<Answer>>,
    pub timings: Vec<Timing>,
}

impl Outcome for FactsOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
        clock::add_all(&mut self.timings, &new.timings);
    }
}

/// The section's cells.
///
/// # Errors
/// A ratio is out of range; a recipe that was checked has none such.
pub fn cells(section: &EvalSection) -> Result<Vec<Cell>> {
    let ratios =
        section.answer_ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    Ok(Cell::all(&section.methods, &section.answer_policies, &ratios))
}

impl Asking<'_> {
    /// Ask every question of the full cache and of the pruned one of each of `cells`; times are left to the caller.
    ///
    /// # Errors
    /// The context has no question, or a forward pass fails.
    pub fn facts(
        &self,
        context: &FactContext,
        section: &EvalSection,
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<FactsOutcome> {
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
        let rows = self.ask(&questions, cells, pruned)?.into_iter();
        let mut rows = rows.map(|row| row.into_iter().zip(&context.questions).map(answer).collect());
        let full = rows.next().unwrap_or_default();
        let asked = context
            .questions
            .iter()
            .map(|q| Asked { question: q.question_text.clone(), wanted: q.answer_text.clone() });
        Ok(FactsOutcome {
            context_id: context_id(&context.tokens),
            asked: asked.collect(),
            full,
            cells: cells.iter().copied().zip(rows).collect(),
            timings: Vec::new(),
        })
    }
}

/// All contexts together; each cell over those that have it.
pub fn summarize(
    made: Made,
    answer_match: AnswerMatch,
    outcomes: &[(usize, FactsOutcome)],
    draws: &Draws,
) -> FactsResults {
    let correct = |answers: &[Answer]| answers.iter().filter(|a| a.correct).count() as f64;
    let squad = |o: &FactsOutcome, answers: &[Answer], of: fn(&Squad) -> f64| -> f64 {
        answers.iter().zip(&o.asked).map(|(answer, asked)| of(&answer.squad(asked))).sum()
    };
    let tokens = |o: &FactsOutcome| o.full.iter().map(|a| f64::from(a.tokens)).sum::<f64>();
    let all = || outcomes.iter().map(|(_, o)| o);
    let share = |above: &[f64], below: &[f64]| {
        draws.of(above.len()).ratio(above, below).unwrap_or(Interval::exact(0.0))
    };
    let results = Cell::union(all().flat_map(|o| o.cells.cells())).into_iter().map(|cell| {
        let mine: Vec<(&FactsOutcome, &Vec<Answer>)> =
            all().filter_map(|o| Some((o, o.cells.get(&cell)?))).collect();
        let total = |f: &dyn Fn(&FactsOutcome, &[Answer]) -> f64| -> Vec<f64> {
            mine.iter().map(|(o, answers)| f(o, answers)).collect()
        };
        let tokens = total(&|o, _| tokens(o));
        let accuracy = total(&|_, a| correct(a));
        let questions = total(&|o, _| o.asked.len() as f64);
        let (of_both, of_kvzip): (Vec<f64>, Vec<f64>) = mine
            .iter()
            .filter_map(|(o, a)| Some((correct(a), correct(o.cells.get(&cell.of_kvzip())?))))
            .unzip();
        FactsCell {
            method: cell.method,
            policy: cell.policy,
            ratio: cell.ratio.get(),
            contexts: (mine.len() < outcomes.len()).then_some(mine.len()),
            accuracy: share(&accuracy, &questions),
            exact_match: Some(share(&total(&|o, a| squad(o, a, |s| s.exact)), &questions)),
            f1: Some(share(&total(&|o, a| squad(o, a, |s| s.f1)), &questions)),
            kl: share(&total(&|_, a| a.iter().map(|a| a.kl).sum()), &tokens),
            flips: share(&total(&|_, a| a.iter().map(|a| f64::from(a.flipped)).sum()), &tokens),
            of_kvzip: draws.of(of_both.len()).ratio(&of_both, &of_kvzip),
            of_full: draws.of(mine.len()).ratio(&accuracy, &total(&|o, _| correct(&o.full))),
        }
    });
    let full: Vec<f64> = all().map(|o| correct(&o.full)).collect();
    let questions: Vec<f64> = all().map(|o| o.asked.len() as f64).collect();
    let full_squad = |of: fn(&Squad) -> f64| {
        let sums: Vec<f64> = all().map(|o| squad(o, &o.full, of)).collect();
        Some(share(&sums, &questions))
    };
    FactsResults {
        contexts: outcomes.len(),
        questions: all().map(|o| o.asked.len()).sum(),
        answer_match,
        full: share(&full, &questions),
        full_exact_match: full_squad(|s| s.exact),
        full_f1: full_squad(|s| s.f1),
        cells: results.collect(),
        made,
    }
}

#[cfg(test)]
mod tests {
    use pkv_core::{Policy, Seed};
    use pkv_recipe::MethodName;

    use super::*;

    /// Also of contexts that an earlier version asked: texts are all it takes.
    #[test]
    fn exact_match_and_f1_are_of_the_texts() {
        let answer =
            |text: &str, correct| Answer { text: text.to_owned(), correct, kl: 0.0, flipped: 0, tokens: 2 };
        let asked = |wanted: &str| Asked { question: "?".to_owned(), wanted: wanted.to_owned() };
        let ratio = RetentionRatio::new(0.1).unwrap();
        let cell = Cell { method: MethodName::MAPPER, policy: Policy::Pair, ratio };
        let outcome = FactsOutcome {
            context_id: "c".to_owned(),
            asked: vec![asked("4711"), asked("a silver bell")],
            full: vec![answer("4711", true), answer("a silver bell", true)],
            cells: [(cell, vec![answer("The 4711.", false), answer("Bell", false)])].into_iter().collect(),
            timings: Vec::new(),
        };
        let draws = Draws::new(20, Seed(1));
        let found = summarize(Made::default(), AnswerMatch::Exact, &[(0, outcome)], &draws);
        let mean = |i: Option<Interval>| i.unwrap().mean;
        assert_eq!((found.full.mean, mean(found.full_exact_match), mean(found.full_f1)), (1.0, 1.0, 1.0));
        let cell = &found.cells[0];
        assert_eq!((cell.accuracy.mean, mean(cell.exact_match)), (0.0, 0.5));
        // 1, and a word of one against one of two.
        assert!((mean(cell.f1) - (1.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
    }
}
