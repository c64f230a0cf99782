//! Every question from the same cache; what happens is reported as events.

use anyhow::{Error, Result};
use pkv_core::Stop;
use pkv_lm::RaggedCache;

use crate::answer::{Answer, Finish, Question, QuestionRefused, answer};
use crate::input::InputLine;
use crate::opened::Ready;
use crate::summary::{Decoded, FullSummary, Summary};

/// Which cache an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answering {
    Pruned,
    Full,
}

/// What happens, in order. `index` counts questions from 0.
#[derive(Debug)]
pub enum Event<'a> {
    Asked {
        question: &'a str,
    },
    /// An answer begins.
    Begins(Answering),
    /// The next piece of an answer's text.
    Piece {
        index: usize,
        from: Answering,
        text: &'a str,
    },
    Answered {
        index: usize,
        question: &'a str,
        answer: &'a Answer,
    },
    /// The full cache's answer, after the pruned one's.
    FullAnswered {
        index: usize,
        question: &'a str,
        pruned: &'a Answer,
        full: &'a Answer,
    },
    /// The question cannot be asked.
    Refused {
        index: usize,
        question: &'a str,
        error: &'a Error,
    },
    /// A line that is not a question.
    Malformed {
        line: usize,
        error: &'a Error,
    },
}

impl Ready {
    /// Answer `questions` until they end or the user stops; `emit` gets what happens. A question that is
    /// refused does not affect the others.
    ///
    /// # Errors
    /// A question cannot be read, the target fails, or `emit` does.
    pub fn answer_all(
        mut self,
        questions: impl Iterator<Item = Result<InputLine>>,
        stop: &Stop,
        emit: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<Summary> {
        let mut decoded = Decoded::default();
        let mut full = self.whole.as_ref().map(|cache| FullSummary::of(cache.bytes()));
        let (target, tokenizer, summary) = (&self.target, &self.tokenizer, &mut self.summary);
        for asked in questions {
            let text = match asked? {
                InputLine::Question(text) => text,
                InputLine::Malformed { line, error } => {
                    summary.refused += 1;
                    emit(Event::Malformed { line, error: &error })?;
                    continue;
                }
            };
            let (index, question) = (summary.questions, text.as_str());
            summary.questions += 1;
            emit(Event::Asked { question })?;
            let ask = |emit: &mut dyn FnMut(Event) -> Result<()>, cache: &mut RaggedCache, from| {
                emit(Event::Begins(from))?;
                let pieces = &mut |text: &str| emit(Event::Piece { index, from, text });
                Question::new(question, tokenizer, self.max_new_tokens)
                    .and_then(|q| answer(target, tokenizer, cache, &q, stop, pieces))
            };
            match ask(emit, &mut self.prefilled.cache, Answering::Pruned) {
                Ok(pruned) => {
                    emit(Event::Answered { index, question, answer: &pruned })?;
                    summary.answer_tokens += pruned.answer_tokens;
                    summary.decode_tokens_per_s = decoded.add(&pruned);
                    if let (Some(cache), Some(summary)) = (&mut self.whole, &mut full) {
                        let full = ask(emit, cache, Answering::Full)?;
                        summary.add(&pruned, &full);
                        emit(Event::FullAnswered { index, question, pruned: &pruned, full: &full })?;
                    }
                    if pruned.finish == Finish::Interrupted {
                        break;
                    }
                }
                Err(e) if e.downcast_ref::<QuestionRefused>().is_some() => {
                    summary.refused += 1;
                    emit(Event::Refused { index, question, error: &e })?;
                }
                Err(e) => return Err(e),
            }
        }
        summary.interrupted = stop.is_requested();
        summary.full = full;
        Ok(self.summary)
    }
}
