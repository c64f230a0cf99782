//! Output of `infer`: streamed answers, then retention and timing.
//!
//! As text, answers go to stdout and the rest to stderr. With `--json` every event is a line on stdout:
//! `pruned`, `token`s and an `answer` (with `--compare-full` a `full_answer`, too) or `refused` per question,
//! an `error` with its `line` for what is no question, and at last a `summary`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Error, Result};
use pkv_infer::{Answer, Kept, Phase, PhaseTotal, Prefilled};
use pkv_recipe::plan::human_bytes;
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::print;
use crate::render::hint;
use crate::{render, terminal};

/// The end of a run, for programs and for people.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub regime: String,
    pub device: String,
    pub proxy_device: String,
    pub dtype: &'static str,
    pub keep: String,
    pub context_tokens: usize,
    /// The longest contexts that the mapper was trained on, where its export says so.
    pub trained_tokens: Option<usize>,
    pub kept: Kept,
    /// From the beginning of the prefill to the pruned cache.
    pub prefill_secs: f64,
    /// Time that the target waited for the scores after its prefill.
    pub waited_secs: f64,
    /// With proxy and mapper on a GPU of their own, by these phases; phases of `streams` slowed each
    /// other down, so there it is no forecast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dual_critical_secs: Option<f64>,
    pub phases: Vec<PhaseTotal>,
    /// Answered, refused or interrupted; lines that are no question are not among them.
    pub questions: usize,
    /// Questions that were refused, and lines that are no question.
    pub refused: usize,
    pub answer_tokens: usize,
    pub decode_tokens_per_s: Option<f64>,
    /// Why nothing was pruned, if nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    pub interrupted: bool,
    /// With `--compare-full`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<FullSummary>,
}

/// Answers, time and memory of the full cache, for comparison.
#[derive(Debug, Default, Serialize)]
pub struct FullSummary {
    /// All that is allocated, room for new tokens included.
    pub cache_bytes: usize,
    pub answer_tokens: usize,
    pub decode_tokens_per_s: Option<f64>,
    /// Questions that both answered, and those with the same tokens.
    pub questions: usize,
    pub same: usize,
    #[serde(skip)]
    decoded: (usize, f64),
}

impl FullSummary {
    pub fn of(cache_bytes: usize) -> Self {
        Self { cache_bytes, ..Self::default() }
    }

    /// The answers of both caches to one question; `steps` are the full one's forwards between first and last
    /// prediction.
    pub fn add(&mut self, pruned: &Answer, full: &Answer, steps: usize) {
        self.questions += 1;
        self.same += usize::from(pruned.tokens == full.tokens);
        self.answer_tokens += full.answer_tokens;
        self.decoded = (self.decoded.0 + steps, self.decoded.1 + full.decode_secs);
        let (tokens, secs) = self.decoded;
        self.decode_tokens_per_s = (secs > 0.0).then(|| tokens as f64 / secs);
    }
}

/// The output streams.
pub struct Output {
    pub json: bool,
    /// More than one question: each is printed before its answer.
    pub many: bool,
    /// Each answer is followed by the full cache's.
    pub compares: bool,
}

impl Output {
    /// Whose answer comes, where there are two.
    ///
    /// # Errors
    /// stdout is closed or full.
    pub fn whose_answer(&self, whose: &str) -> Result<()> {
        if self.json || !self.compares {
            return Ok(());
        }
        let begin = if whose == "full" { "\n" } else { "" };
        print(&format!("{begin}{:<8}", format!("{whose}:")))
    }

    /// A piece of the full cache's answer; programs get it whole.
    ///
    /// # Errors
    /// stdout is closed or full.
    pub fn full_piece(&self, text: &str) -> Result<()> {
        if self.json { Ok(()) } else { print(text) }
    }

    /// The full cache's answer beside the pruned one's.
    ///
    /// # Errors
    /// stdout is closed or full.
    pub fn full_answered(&self, index: usize, question: &str, pruned: &Answer, full: &Answer) -> Result<()> {
        let same = pruned.tokens == full.tokens;
        if self.json {
            let mut value = serde_json::to_value(full)?;
            if let Value::Object(fields) = &mut value {
                fields.insert("event".to_owned(), json!("full_answer"));
                fields.insert("question".to_owned(), json!(index));
                fields.insert("question_text".to_owned(), json!(question));
                fields.insert("same".to_owned(), json!(same));
            }
            return event(&value);
        }
        let said = if same { "the same" } else { "different" };
        print(&format!("\n        {said}; {} and {} tokens", pruned.answer_tokens, full.answer_tokens))?;
        print(if self.many { "\n\n" } else { "\n" })
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn pruned(&self, prefilled: &Prefilled, context_tokens: usize) -> Result<()> {
        let why = prefilled.fallback.as_ref().map(|e| format!("{e:#}"));
        if self.json {
            return event(
                &json!({"event": "pruned", "context_tokens": context_tokens, "kept": prefilled.kept, "fallback": why}),
            );
        }
        if let Some(e) = &prefilled.fallback {
            tracing::warn!("nothing was pruned, answers come from the full cache: {e:#}");
        }
        Ok(())
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn asked(&self, question: &str) -> Result<()> {
        if self.json || !self.many {
            return Ok(());
        }
        print(&format!("> {question}\n"))
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn piece(&self, index: usize, text: &str) -> Result<()> {
        if self.json {
            return event(&json!({"event": "token", "question": index, "text": text}));
        }
        print(text)
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn answered(&self, index: usize, question: &str, answer: &Answer) -> Result<()> {
        if !self.json {
            // The full cache's answer follows.
            let end = if self.compares {
                ""
            } else if self.many {
                "\n\n"
            } else {
                "\n"
            };
            return print(end);
        }
        let mut value = serde_json::to_value(answer)?;
        if let Value::Object(fields) = &mut value {
            fields.insert("event".to_owned(), json!("answer"));
            fields.insert("question".to_owned(), json!(index));
            fields.insert("question_text".to_owned(), json!(question));
        }
        event(&value)
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn refused(&self, index: usize, question: &str, error: &Error) -> Result<()> {
        if self.json {
            return event(
                &json!({"event": "refused", "question": index, "question_text": question, "error": chain(error), "hint": hint(error)}),
            );
        }
        terminal::print(&render::error(error));
        Ok(())
    }

    /// A line of the questions that is none.
    ///
    /// # Errors
    /// stdout is closed or full.
    pub fn malformed(&self, line: usize, error: &Error) -> Result<()> {
        if self.json {
            return event(
                &json!({"event": "error", "line": line, "error": chain(error), "hint": hint(error)}),
            );
        }
        terminal::print(&render::error(error));
        Ok(())
    }

    /// # Errors
    /// stdout is closed or full.
    pub fn summary(&self, summary: &Summary) -> Result<()> {
        if !self.json {
            terminal::print(&table(summary));
            return Ok(());
        }
        let mut value = serde_json::to_value(summary)?;
        if let Value::Object(fields) = &mut value {
            fields.insert("event".to_owned(), json!("summary"));
        }
        event(&value)
    }
}

/// An error and its causes in one line, each once: an error may say what its source says.
fn chain(error: &Error) -> String {
    let mut texts: Vec<String> = error.chain().map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}

fn event(value: &Value) -> Result<()> {
    print(&format!("{value}\n"))
}

/// Kept pairs, and the phases with their time and memory.
fn table(s: &Summary) -> String {
    let mut out = String::new();
    let k = &s.kept;
    let prefix = match k.prefix_pairs {
        0 => String::new(),
        n => format!(" (with {n} KV pairs of the chat template)"),
    };
    let _ = writeln!(
        out,
        "kept {} of {} KV pairs ({:.1}%), {} to {} per KV head; cache {} of {}{prefix}, and {} of room for new tokens",
        k.pairs,
        k.of_pairs,
        100.0 * k.ratio,
        k.fewest_in_head,
        k.most_in_head,
        human_bytes(k.kept_bytes as u64),
        human_bytes(k.full_cache_bytes as u64),
        human_bytes(k.room_bytes as u64),
    );
    let _ = writeln!(
        out,
        "{} tokens to a pruned cache in {:.3} s, regime {}, {}",
        s.context_tokens, s.prefill_secs, s.regime, s.device
    );
    for p in &s.phases {
        let memory = p.peak_bytes.map(human_bytes).unwrap_or_default();
        let _ = writeln!(
            out,
            "  {:<7} {:<12} {:>9.4} s  {:>8.4} to {:.4}  {memory}",
            p.lane, p.name, p.secs, p.start_secs, p.end_secs
        );
    }
    if s.waited_secs > 0.0 {
        let _ = writeln!(out, "the target waited {:.4} s for the proxy's side", s.waited_secs);
    }
    if let Some(secs) = s.dual_critical_secs {
        let _ = writeln!(out, "with a GPU each it would take {secs:.4} s, by these phases");
    }
    if let Some(rate) = s.decode_tokens_per_s {
        let _ = writeln!(out, "{} tokens answered, {rate:.1} tokens/s", s.answer_tokens);
    }
    if let Some(full) = &s.full {
        let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
        let _ = writeln!(
            out,
            "{:<12}{:>14}{:>12}{:>12}\n{:<12}{:>14}{:>12}{:>12}\n{:<12}{:>14}{:>12}{:>12}\n{} of {} answers are the same",
            "",
            "KV pairs",
            "memory",
            "tokens/s",
            "pruned cache",
            k.pairs + k.prefix_pairs,
            human_bytes(k.cache_bytes as u64),
            rate(s.decode_tokens_per_s),
            "full cache",
            k.of_pairs + k.prefix_pairs,
            human_bytes(full.cache_bytes as u64),
            rate(full.decode_tokens_per_s),
            full.same,
            full.questions,
        );
    }
    if let Some(why) = &s.fallback {
        let _ = writeln!(out, "the full cache answered: {why}");
    }
    out
}

/// Phases of one prefill, for a trace.
pub struct Trace {
    pub name: String,
    pub phases: Vec<Phase>,
}

/// Phases in the Chrome trace format, which ui.perfetto.dev reads: microseconds, a process per prefill,
/// a row per lane.
///
/// # Errors
/// The file cannot be written.
pub fn write_traces(path: &Path, traces: &[Trace]) -> Result<()> {
    let lanes = ["target", "proxy", "mapper"];
    let row = |lane: &str| lanes.iter().position(|l| *l == lane).unwrap_or(lanes.len());
    let mut events: Vec<Value> = Vec::new();
    for (pid, trace) in traces.iter().enumerate() {
        events.push(json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": trace.name}}));
        events.extend(lanes.iter().map(
            |lane| json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": row(lane), "args": {"name": lane}}),
        ));
        events.extend(trace.phases.iter().map(|p| {
            json!({
                "ph": "X", "name": p.name, "pid": pid, "tid": row(p.lane),
                "ts": p.start_secs * 1e6, "dur": (p.end_secs - p.start_secs) * 1e6,
                "args": {"peak_bytes": p.peak_bytes},
            })
        }));
    }
    let text = serde_json::to_string(&json!({"traceEvents": events}))?;
    std::fs::write(path, text).with_context(|| format!("cannot write the trace `{}`", path.display()))
}
