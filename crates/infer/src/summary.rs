//! The end of a run of `infer`: what was kept, what it took, and how many questions were answered.

use std::fmt::Write;

use pkv_recipe::plan::human_bytes;
use serde::Serialize;

use crate::answer::{Answer, Finish};
use crate::keep::Kept;
use crate::timeline::PhaseTotal;

/// The end of a run, for programs and for people.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub regime: &'static str,
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
    /// With proxy and mapper on a GPU of their own, by these phases, if they need nothing of the target.
    /// Phases of `streams` slowed each other down, so there it is no forecast.
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
    decoded: Decoded,
}

impl FullSummary {
    pub fn of(cache_bytes: usize) -> Self {
        Self { cache_bytes, ..Self::default() }
    }

    /// The answers of both caches to one question.
    pub fn add(&mut self, pruned: &Answer, full: &Answer) {
        self.questions += 1;
        self.same += usize::from(pruned.tokens == full.tokens);
        self.answer_tokens += full.answer_tokens;
        self.decode_tokens_per_s = self.decoded.add(full);
    }
}

/// Decoding steps and their time, over several answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decoded {
    steps: usize,
    secs: f64,
}

impl Decoded {
    /// One more answer; the rate of all, if they took any time.
    pub fn add(&mut self, a: &Answer) -> Option<f64> {
        // Forwards between the first and the last prediction; the stop token was predicted too.
        self.steps += match a.finish {
            Finish::Stop => a.answer_tokens,
            _ => a.answer_tokens.saturating_sub(1),
        };
        self.secs += a.decode_secs;
        (self.secs > 0.0).then(|| self.steps as f64 / self.secs)
    }
}

impl Summary {
    /// Kept pairs, and the phases with their time and memory, ending in a line break.
    pub fn text(&self) -> String {
        let (s, k) = (self, &self.kept);
        let mut out = String::new();
        let prefix = match k.prefix_pairs {
            0 => String::new(),
            n => format!(", with {n} KV pairs of the chat template"),
        };
        let _ = writeln!(
            out,
            "kept {} of {} KV pairs ({:.1}%), {} to {} per KV head\n\
             cache {} of {}{prefix}\nroom for new tokens {}",
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
        // The phases of a CPU say nothing of two GPUs.
        if let Some(secs) = s.dual_critical_secs.filter(|_| s.device.starts_with("cuda")) {
            let _ = writeln!(
                out,
                "with a GPU each for target and proxy it would take {secs:.4} s, by these phases"
            );
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
}
