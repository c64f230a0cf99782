//! Output of `infer`: streamed answers, then retention and timing.
//!
//! As text, answers go to stdout and the rest to stderr. With `--json` every event is a line on stdout:
//! `pruned`, `token`s and an `answer` (with `--compare-full` a `full_answer`, too) or `refused` per question,
//! an `error` with its `line` for what is no question, and at last a `summary`.

use anyhow::{Error, Result};
use pkv_infer::{Answering, Event, Prefilled, Summary};
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::print;
use crate::render::hint;
use crate::{render, terminal};

/// The output streams.
pub struct Output {
    pub json: bool,
    /// More than one question: each is printed before its answer.
    pub many: bool,
    /// Each answer is followed by the full cache's.
    pub compares: bool,
    /// Questions are typed where their answers are shown: each is prompted for, and not repeated.
    pub prompts: bool,
}

impl Output {
    /// # Errors
    /// stdout is closed or full.
    pub fn pruned(&self, prefilled: &Prefilled, context_tokens: usize) -> Result<()> {
        let why = prefilled.fallback.as_ref().map(|e| format!("{e:#}"));
        if self.json {
            return line(
                &json!({"event": "pruned", "context_tokens": context_tokens, "kept": prefilled.kept, "fallback": why}),
            );
        }
        if let Some(why) = why {
            tracing::warn!("nothing was pruned, answers come from the full cache: {why}");
        }
        if self.prompts {
            terminal::print("Type a question; Ctrl-D ends.\n\n> ");
        }
        Ok(())
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn event(&self, event: &Event) -> Result<()> {
        if self.json {
            return as_json(event);
        }
        self.as_text(event)?;
        let is_end = match event {
            Event::Answered { .. } => !self.compares,
            Event::FullAnswered { .. } | Event::Refused { .. } | Event::Malformed { .. } => true,
            Event::Asked { .. } | Event::Begins(_) | Event::Piece { .. } => false,
        };
        if self.prompts && is_end {
            terminal::print("> ");
        }
        Ok(())
    }

    fn as_text(&self, event: &Event) -> Result<()> {
        let end = if self.many { "\n\n" } else { "\n" };
        match event {
            Event::Asked { question } if self.many && !self.prompts => print(&format!("> {question}\n")),
            Event::Begins(Answering::Pruned) if self.compares => print("pruned: "),
            Event::Begins(Answering::Full) => print("\nfull:   "),
            Event::Piece { text, .. } => print(text),
            // The full cache's answer follows.
            Event::Answered { .. } if !self.compares => print(end),
            Event::FullAnswered { pruned, full, .. } => {
                let said = if pruned.tokens == full.tokens { "the same" } else { "different" };
                let (a, b) = (pruned.answer_tokens, full.answer_tokens);
                print(&format!("\n        {said}; {a} and {b} tokens{end}"))
            }
            Event::Refused { error, .. } | Event::Malformed { error, .. } => {
                terminal::print(&render::error(error));
                Ok(())
            }
            Event::Asked { .. } | Event::Begins(_) | Event::Answered { .. } => Ok(()),
        }
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn summary(&self, summary: &Summary) -> Result<()> {
        if self.json {
            return line(&with(summary, json!({"event": "summary"}))?);
        }
        if self.prompts {
            terminal::print("\n");
        }
        terminal::print(&summary.text());
        Ok(())
    }
}

fn as_json(event: &Event) -> Result<()> {
    line(&match event {
        // Programs get the full cache's answer whole.
        Event::Piece { index, from: Answering::Pruned, text } => {
            json!({"event": "token", "question": index, "text": text})
        }
        Event::Answered { index, question, answer } => {
            with(answer, json!({"event": "answer", "question": index, "question_text": question}))?
        }
        Event::FullAnswered { index, question, pruned, full } => {
            let same = pruned.tokens == full.tokens;
            let more =
                json!({"event": "full_answer", "question": index, "question_text": question, "same": same});
            with(full, more)?
        }
        Event::Refused { index, question, error } => {
            let (why, hint) = (chain(error), hint(error));
            json!({"event": "refused", "question": index, "question_text": question, "error": why, "hint": hint})
        }
        Event::Malformed { line, error } => {
            json!({"event": "error", "line": line, "error": chain(error), "hint": hint(error)})
        }
        Event::Asked { .. } | Event::Begins(_) | Event::Piece { .. } => return Ok(()),
    })
}

/// The fields of `value`, then those of `more`.
fn with(value: &impl Serialize, more: Value) -> Result<Value> {
    let mut value = serde_json::to_value(value)?;
    if let (Value::Object(fields), Value::Object(more)) = (&mut value, more) {
        fields.extend(more);
    }
    Ok(value)
}

/// An error and its causes in one line, each once: an error may say what its source says.
fn chain(error: &Error) -> String {
    let mut texts: Vec<String> = error.chain().map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}

fn line(value: &Value) -> Result<()> {
    print(&format!("{value}\n"))
}
