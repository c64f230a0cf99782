//! Greedy answers from a pruned cache, token by token.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Result, ensure};
use pkv_core::{FailureKind, Hinted, Stop, hinted};
use pkv_lm::{LanguageModel, RaggedCache};
use pkv_text::TextTokenizer;
use serde::Serialize;

use crate::text::TextStream;

/// A question as the target reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Tokens after the context: an empty line, the question, the template's turn to the model.
    pub tokens: Vec<u32>,
    pub max_new_tokens: usize,
}

/// A question that cannot be asked; the cache and all other questions are not affected.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct QuestionRefused(#[source] Hinted);

impl QuestionRefused {
    pub const fn new(why: Hinted) -> Self {
        Self(why)
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model said so.
    Stop,
    /// As long as was allowed.
    Length,
    /// The target was made for no more positions.
    Positions,
    /// The user stopped it.
    Interrupted,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    pub text: String,
    #[serde(skip)]
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub question_tokens: usize,
    pub answer_tokens: usize,
    /// From the question to the first token.
    pub first_token_secs: f64,
    /// From the first token to the last.
    pub decode_secs: f64,
}

impl Question {
    /// A question in words, asked as in training and evaluation: after an empty line, before the
    /// template's switch to the model.
    ///
    /// # Errors
    /// It is empty ([`QuestionRefused`]), or the tokenizer cannot encode it.
    pub fn new(text: &str, tokenizer: &TextTokenizer, max_new_tokens: usize) -> Result<Self> {
        ensure!(
            !text.trim().is_empty(),
            QuestionRefused::new(hinted("the question is empty", "write what is to be answered"))
        );
        let mut tokens = tokenizer.encode(&format!("\n\n{text}"))?;
        tokens.extend_from_slice(tokenizer.switch());
        Ok(Self { tokens, max_new_tokens })
    }
}

/// Answer `question` after the contexts of `cache`, which must hold one sequence; what was read since
/// the context is forgotten first, so every question meets the same cache.
///
/// `emit` is called with each piece of text as tokens complete it. `stop` is checked before each token; if
/// it was requested, the answer ends there and is still valid.
///
/// # Errors
/// [`QuestionRefused`] where the question is longer than what is left of the position range, or there is no
/// memory for it; errors of `emit`. The cache can be asked again after all of them.
pub fn answer(
    target: &LanguageModel,
    tokenizer: &TextTokenizer,
    cache: &mut RaggedCache,
    question: &Question,
    stop: &Stop,
    emit: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Answer> {
    let _no_grad = tch::no_grad_guard();
    ensure!(cache.sequences() == 1, "a cache of {} contexts has no one to ask", cache.sequences());
    ensure!(!question.tokens.is_empty(), "there is no token to answer");
    cache.rewind();
    let (limit, at) = (target.config().max_positions, cache.next_position(0));
    let left = limit.saturating_sub(at);
    ensure!(
        question.tokens.len() < left,
        QuestionRefused::new(hinted(
            format!(
                "the question has {} tokens, the context ends at position {at} of {limit}: {left} are left for \
                 question and answer",
                question.tokens.len()
            ),
            "shorten the question or the context"
        ))
    );
    let begun = Instant::now();
    cache.reserve(question.tokens.len()).map_err(|e| match e.downcast::<Hinted>() {
        Ok(no_room) if no_room.kind() == FailureKind::Environment => QuestionRefused::new(no_room).into(),
        Ok(other) => other.into(),
        Err(other) => other,
    })?;
    let mut text = TextStream::new(tokenizer);
    let mut whole = String::new();
    let (mut first_token_secs, mut last_secs) = (0.0, 0.0);
    // The answer's k-th token is read at the position k - 1 after the question, but for the last.
    let most = question.max_new_tokens.min(left - question.tokens.len() + 1);
    let mut finish = match most == question.max_new_tokens {
        true => Finish::Length,
        false => Finish::Positions,
    };
    let mut each = |id: Option<u32>| -> Result<ControlFlow<()>> {
        last_secs = begun.elapsed().as_secs_f64();
        if text.ids().is_empty() {
            first_token_secs = last_secs;
        }
        let Some(id) = id else {
            finish = Finish::Stop;
            return Ok(ControlFlow::Continue(()));
        };
        let piece = text.push(id)?;
        if !piece.is_empty() {
            emit(&piece)?;
        }
        whole.push_str(&piece);
        if stop.is_requested() {
            finish = Finish::Interrupted;
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    };
    if stop.is_requested() {
        finish = Finish::Interrupted;
    } else {
        target.generate_ragged(&question.tokens, cache, most, tokenizer.stop_tokens(), &mut each)?;
    }
    let rest = text.finish()?;
    if !rest.is_empty() {
        emit(&rest)?;
        whole.push_str(&rest);
    }
    Ok(Answer {
        text: whole,
        finish,
        question_tokens: question.tokens.len(),
        answer_tokens: text.ids().len(),
        tokens: text.ids().to_vec(),
        first_token_secs,
        decode_secs: last_secs - first_token_secs,
    })
}
