//! One example of a benchmark: a context and what is asked of it.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use serde::{Deserialize, Serialize};

use crate::metric::{Metric, Squad};

/// A context and its questions. The context is prefilled and pruned before any question is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Name within its task, the same in every run.
    pub id: String,
    /// All text before the first question, instructions included.
    pub context: String,
    /// At least one.
    pub turns: Vec<Turn>,
    /// Whether a turn sees the turns before it, with their wanted answers; else each is asked of the context
    /// alone.
    pub conversation: bool,
    /// Whether the model's chat template closes the question. Some tasks are continuations (code, few-shot
    /// lists), which the references give to chat models without a template.
    pub chat: bool,
}

/// One question of a context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// Text between the context (or the turn before) and the model's answer.
    pub question: String,
    /// Beginning of the answer, which is given and not generated. Empty for most tasks.
    pub answer_prefix: String,
    /// Answers that count, in the form that the metric reads.
    pub wanted: Vec<String>,
    /// The right answer as later turns of a conversation see it.
    pub given: String,
    /// Further texts that the metric compares with: LongBench's classes, a repository's other functions.
    pub others: Vec<String>,
    pub metric: Metric,
    pub max_new_tokens: usize,
    /// Whether only the answer's first line counts (LongBench's few-shot tasks).
    pub first_line: bool,
    /// Kind of this turn, if a task mixes several; else the task's name.
    pub part: String,
}

impl Turn {
    /// Score of `answer`, in [0, 1].
    pub fn score(&self, answer: &str) -> f64 {
        self.metric.score(self.counted(answer), &self.wanted, &self.others)
    }

    /// Exact match and token F1 of `answer`; `None` where no short answer is wanted.
    pub fn squad(&self, answer: &str) -> Option<Squad> {
        let wanted = self.wanted.iter().map(String::as_str);
        self.metric.is_short_answer(self.wanted.len()).then(|| Squad::of(self.counted(answer), wanted))
    }

    /// The part of an answer that is scored.
    fn counted<'a>(&self, answer: &'a str) -> &'a str {
        match self.first_line {
            true => answer.trim_start_matches('\n').split('\n').next().unwrap_or_default(),
            false => answer,
        }
    }

    /// Whether the right answer is worth anything; where it is not, every answer would score 0.
    pub fn can_score(&self) -> bool {
        // Whether a function is near enough to itself says nothing, and takes long to find out.
        if self.metric == Metric::Function {
            return true;
        }
        let all = self.wanted.join(", ");
        [&self.given, &all].into_iter().chain(&self.wanted).any(|answer| self.score(answer) > 0.0)
    }

    /// # Errors
    /// The wanted answers are too long to compare with, or have not the form that the metric reads.
    pub(crate) fn check_form(&self, column: &str) -> Result<()> {
        /// Metrics compare every letter of an answer with every letter of the wanted ones; the longest
        /// summaries of the benchmarks have some ten thousand.
        const LONGEST: usize = 50_000;
        let length: usize = self.wanted.iter().map(|wanted| wanted.chars().count()).sum();
        ensure!(
            length <= LONGEST,
            hinted(
                format!("column `{column}` wants {length} characters, at most {LONGEST} are compared"),
                "give the data set's own file, unchanged"
            )
        );
        let form = match self.metric {
            Metric::Retrieval => "`Paragraph` and a number",
            Metric::RetrievalZh => "`段落` and a number",
            Metric::Count | Metric::FirstNumber | Metric::MathFind => "a number",
            Metric::Classification => "one of `all_classes`",
            Metric::Choice => "one of the options",
            _ => return Ok(()),
        };
        ensure!(
            self.can_score(),
            hinted(
                format!("column `{column}` holds {:?}, expected {form}: no answer could score", self.given),
                "give the data set's own file, unchanged"
            )
        );
        Ok(())
    }
}
