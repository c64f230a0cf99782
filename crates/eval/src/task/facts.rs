//! Planted facts: several questions per context, unknown while pruning; the right answer is the planted one.

use anyhow::{Result, ensure};
use pkv_core::{Fingerprint, hinted};
use pkv_data::{FactContext, FactQuestion};
use pkv_recipe::plan::{Answers, TEMPLATE_TOKENS, TaskWork};
use pkv_recipe::{AnswerMatch, EvalSection, Recipe};
use pkv_results::answered::Asked;
use pkv_results::store::About;
use pkv_tasks::Squad;
use serde_json::{Value, json};

use super::{Asks, Question, Right, Task, TaskContext, TaskInfo, Texts};

/// The `facts` task.
pub struct Facts<'a> {
    contexts: &'a [FactContext],
    section: &'a EvalSection,
}

impl<'a> Facts<'a> {
    /// # Errors
    /// There is no context.
    pub fn new(section: &'a EvalSection, contexts: &'a [FactContext]) -> Result<Self> {
        ensure!(
            !contexts.is_empty(),
            hinted(
                "there is no context for the `facts` task",
                "raise `eval.contexts`, or leave `facts` out of `eval.tasks`"
            )
        );
        Ok(Self { contexts, section })
    }

    pub fn work(recipe: &Recipe) -> TaskWork {
        /// Of a question about a planted fact.
        const QUESTION_TOKENS: usize = 24;
        let section = &recipe.eval;
        TaskWork {
            task: "facts".to_owned(),
            contexts: section.contexts,
            context_tokens: section.context_tokens,
            questions: section.facts_per_context,
            question_tokens: QUESTION_TOKENS + TEMPLATE_TOKENS,
            answer_tokens: section.max_answer_tokens,
            answers: Answers::Right,
        }
    }

    /// Settings that determine the contexts.
    pub fn planted(section: &EvalSection, contexts: &[FactContext]) -> Value {
        json!({
            "context_tokens": section.context_tokens,
            "facts_per_context": section.facts_per_context,
            "first": contexts.first().map(content),
        })
    }

    fn question<'q>(&'q self, q: &'q FactQuestion, texts: &Texts) -> Question<'q> {
        let wanted = q.answer_text.as_str();
        let answer_match = self.section.answer_match;
        Question {
            prompt: q.question.iter().chain(texts.tokenizer.switch()).copied().collect(),
            right: Right::Answer {
                // A model without a stop token cannot say that it is done; its answer alone counts.
                tokens: q.answer.iter().chain(texts.tokenizer.stop_tokens().first()).copied().collect(),
                text: wanted.to_owned(),
            },
            max_tokens: self.section.max_answer_tokens,
            asked: Asked {
                question: q.question_text.clone(),
                wanted: vec![wanted.to_owned()],
                part: String::new(),
                fact: Some(q.fact),
            },
            score: Box::new(move |text, is_right| {
                let counts = match answer_match {
                    AnswerMatch::Exact => is_right,
                    AnswerMatch::Contains => is_right || text.to_lowercase().contains(&wanted.to_lowercase()),
                };
                (f64::from(counts), Some(Squad::of(text, [wanted])))
            }),
        }
    }
}

impl Task for Facts<'_> {
    fn info(&self) -> TaskInfo {
        let planted = Self::planted(self.section, self.contexts);
        TaskInfo {
            about: About::Facts { answer_match: self.section.answer_match },
            settings: json!({ "planted": planted, "max_answer_tokens": self.section.max_answer_tokens }),
            contexts: self.contexts.len(),
            what: "contexts asked for planted facts".to_owned(),
            timed: "facts: questions".to_owned(),
        }
    }

    fn context(&self, index: usize, texts: &Texts) -> Result<Option<TaskContext<'_>>> {
        let context = &self.contexts[index];
        Ok(Some(TaskContext {
            tokens: context.tokens.clone(),
            cut: false,
            draw: index as u64,
            asks: Asks::Questions(context.questions.iter().map(|q| self.question(q, texts)).collect()),
        }))
    }
}

/// A hash of all that is in a context. How many there are changes none of them, so the first one represents
/// all: it changes with the documents, the lists of words and the places of facts.
fn content(context: &FactContext) -> String {
    let asked = |q: &FactQuestion| format!("{:?} {} {}", q.fact, q.question_text, q.answer_text);
    let questions: Vec<String> = context.questions.iter().map(asked).collect();
    Fingerprint::new().with("tokens", &context.tokens).with("questions", questions).hash()
}
