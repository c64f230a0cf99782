//! Planted facts asked of a pruned cache: several questions per context, unknown while pruning.
//!
//! A context is prefilled and scored once. For every method, policy and retention ratio all its
//! questions are asked of the same pruned cache: one teacher-forced pass over question, chat
//! template and wanted answer tells whether greedy decoding would give that answer, how far the
//! distributions drifted and which tokens flipped. Only wrong answers are decoded, for their text.
//!
//! Dimension key: n keep mask, l layer, h KV head, k cached position, w wanted token, v vocabulary.

use anyhow::Result;
use pkv_core::RetentionRatio;
use pkv_data::FactContext;
use pkv_lm::{Branches, KvCache, LanguageModel, TextTokenizer};
use pkv_recipe::{AnswerMatch, EvalSection, Method};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::answers::{Answer, Asked};
use crate::bootstrap::Bootstrap;
use crate::cell::Cell;
use crate::context::{PrunedContext, forward_bytes};
use crate::forced::{Batch, Continuation, Drift};
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

/// How questions are asked and judged.
pub struct Asking<'a> {
    pub target: &'a LanguageModel,
    pub tokenizer: &'a TextTokenizer,
    pub section: &'a EvalSection,
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
    pub fn ask(&self, context: &FactContext, pruned: &PrunedContext) -> Result<FactsOutcome> {
        let cells = cells(self.section)?;
        let continuations: Vec<Continuation> = context
            .questions
            .iter()
            .map(|q| Continuation {
                prompt: q.question.iter().chain(self.tokenizer.switch()).copied().collect(),
                // A model without a stop token cannot say that it is done; its answer alone counts.
                wanted: q.answer.iter().chain(self.tokenizer.stop_tokens().first()).copied().collect(),
            })
            .collect();
        let wanted_texts: Vec<&str> = context.questions.iter().map(|q| q.answer_text.as_str()).collect();
        let batch = Batch::new(&continuations, self.target.device())?;
        let full_wv = batch.log_probs(self.target, &pruned.cache, None)?.squeeze_dim(0);
        let reference = Drift::new(&full_wv, &full_wv.unsqueeze(0))?;
        let full_tokens = &reference.most_likely[0];

        // Pass 1: what every row predicts, without decoding.
        let per_forward = batch.masks_per_forward(self.target, forward_bytes(self.target.device()));
        let mut predictions = self.predictions(&batch, &reference, 0, full_tokens);
        for group in cells.chunks(per_forward) {
            let keep_nlhk = pruned.keep_masks(group)?;
            let pruned_nwv = batch.log_probs(self.target, &pruned.cache, Some(&keep_nlhk))?;
            let drift = Drift::new(&full_wv, &pruned_nwv)?;
            for n in 0..group.len() {
                predictions.extend(self.predictions(&batch, &drift, n, full_tokens));
            }
        }
        // Pass 2: the text of what is not exact. Rows of the full cache come first.
        let texts = self.decode_wrong(&continuations, &predictions, &cells, pruned)?;
        let questions = continuations.len();
        let answer = |(i, (p, text)): (usize, (&Prediction, Option<String>))| {
            let wanted = wanted_texts[i % questions];
            let correct = match (self.section.answer_match, &text) {
                (_, None) => true,
                (AnswerMatch::Exact, Some(_)) => false,
                (AnswerMatch::Contains, Some(t)) => t.to_lowercase().contains(&wanted.to_lowercase()),
            };
            let text = text.unwrap_or_else(|| wanted.to_owned());
            Answer { text, correct, kl: p.kl, flipped: p.flipped, tokens: p.tokens.len() as u32 }
        };
        let mut answers: Vec<Answer> = predictions.iter().zip(texts).enumerate().map(answer).collect();
        let rest = answers.split_off(questions);
        let asked = context
            .questions
            .iter()
            .map(|q| Asked { question: q.question_text.clone(), wanted: q.answer_text.clone() });
        Ok(FactsOutcome {
            asked: asked.collect(),
            full: answers,
            cells: rest.chunks(questions).map(<[Answer]>::to_vec).collect(),
            timings: Vec::new(),
        })
    }

    /// What mask `n` of `drift` says about each question.
    fn predictions(&self, batch: &Batch, drift: &Drift, n: usize, full_tokens: &[i64]) -> Vec<Prediction> {
        let one = |range: std::ops::Range<usize>| {
            let tokens = &drift.most_likely[n][range.clone()];
            Prediction {
                kl: drift.kl[n][range.clone()].iter().sum(),
                flipped: tokens.iter().zip(&full_tokens[range]).filter(|(a, b)| a != b).count() as u32,
                tokens: tokens.iter().map(|&id| id as u32).collect(),
            }
        };
        batch.ranges().into_iter().map(one).collect()
    }

    /// Decode the rows whose predictions are not the wanted tokens; `None` for the others.
    ///
    /// A row's tokens are known up to and including its first wrong one, so only the rest is decoded.
    fn decode_wrong(
        &self,
        continuations: &[Continuation],
        predictions: &[Prediction],
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<Vec<Option<String>>> {
        let stop = self.tokenizer.stop_tokens();
        let questions = continuations.len();
        let mut texts: Vec<Option<String>> = vec![None; predictions.len()];
        // Per cell (the full cache first), the rows that must be decoded.
        let mut pending: Vec<(usize, Vec<Open>)> = Vec::new();
        for (cell, rows) in predictions.chunks(questions).enumerate() {
            let mut open = Vec::new();
            for (q, (p, c)) in rows.iter().zip(continuations).enumerate() {
                let Some(known) = p.known(&c.wanted, stop) else { continue };
                let row = cell * questions + q;
                match known.iter().position(|id| stop.contains(id)) {
                    Some(end) => texts[row] = Some(self.tokenizer.decode(&known[..end])?),
                    None => open.push(Open { row, prompt: &c.prompt, known }),
                }
            }
            if !open.is_empty() {
                pending.push((cell, open));
            }
        }
        // Masks of one forward need equally many rows: alike ones together, then filled up with their last row.
        pending.sort_by_key(|(cell, open)| (*cell != 0, open.len()));
        let rows_per_forward = self.rows_per_forward(continuations);
        let mut rest = pending.as_slice();
        while let Some((first, _)) = rest.first() {
            let width = |group: &[(usize, Vec<_>)]| group.iter().map(|(_, o)| o.len()).max().unwrap_or(0);
            let mut n = 1;
            // The full cache has no mask, so it stays alone.
            while *first != 0 && n < rest.len() && (n + 1) * width(&rest[..=n]) <= rows_per_forward {
                n += 1;
            }
            let (group, after) = rest.split_at(n);
            rest = after;
            let width = width(group);
            let keep_nlhk = match *first {
                0 => None,
                _ => Some(
                    pruned.keep_masks(&group.iter().map(|(cell, _)| cells[cell - 1]).collect::<Vec<_>>())?,
                ),
            };
            let filled = group.iter().flat_map(|(_, open)| (0..width).map(|i| &open[i.min(open.len() - 1)]));
            let rows: Vec<&Open> = filled.collect();
            for (open, tokens) in
                rows.iter().zip(self.decode(&rows, width, keep_nlhk.as_ref(), &pruned.cache)?)
            {
                texts[open.row] = Some(self.tokenizer.decode(&tokens)?);
            }
        }
        Ok(texts)
    }

    /// Whole answers of `rows`, `width` of them behind each mask.
    fn decode(
        &self,
        rows: &[&Open],
        width: usize,
        keep_nlhk: Option<&Tensor>,
        cache: &KvCache,
    ) -> Result<Vec<Vec<u32>>> {
        let read: Vec<Vec<u32>> = rows.iter().map(|o| [o.prompt, &o.known].concat()).collect();
        let max = self.section.max_answer_tokens;
        let known = rows.iter().map(|o| o.known.len()).min().unwrap_or(0);
        let new = max.saturating_sub(known);
        let longest = read.iter().map(Vec::len).max().unwrap_or(0);
        let mut branches = Branches::new(cache, keep_nlhk, width, longest + new.max(1))?;
        let read: Vec<&[u32]> = read.iter().map(Vec::as_slice).collect();
        let stop = self.tokenizer.stop_tokens();
        let mut answers = self.target.generate_branches(&read, &mut branches, new, stop)?;
        for (answer, open) in answers.iter_mut().zip(rows) {
            answer.splice(0..0, open.known.iter().copied());
            answer.truncate(max);
        }
        Ok(answers)
    }

    /// Rows that one decoding may carry: as [`Batch::masks_per_forward`], with logits of one token per row.
    fn rows_per_forward(&self, continuations: &[Continuation]) -> usize {
        let shape = self.target.shape();
        let prompt = continuations.iter().map(|c| c.prompt.len()).max().unwrap_or(1);
        let row = 8 * shape.vocab + 4 * prompt * (3 * shape.intermediate + 6 * shape.hidden);
        (forward_bytes(self.target.device()) / row).max(continuations.len())
    }
}

/// A row whose answer is not known to its end.
struct Open<'a> {
    /// Index into the predictions.
    row: usize,
    prompt: &'a [u32],
    /// The answer up to and including its first wrong token.
    known: Vec<u32>,
}

/// What one row predicts, the wanted tokens read.
struct Prediction {
    kl: f64,
    flipped: u32,
    /// The most likely token wherever a wanted one follows.
    tokens: Vec<u32>,
}

impl Prediction {
    /// The answer's tokens up to and including the first that is not the wanted one; `None` if all are.
    ///
    /// Any stop token is as good as the wanted one.
    fn known(&self, wanted: &[u32], stop: &[u32]) -> Option<Vec<u32>> {
        let same = |(a, b): (&u32, &u32)| a == b || (stop.contains(a) && stop.contains(b));
        let wrong = self.tokens.iter().zip(wanted).position(|pair| !same(pair))?;
        Some(self.tokens[..=wrong].to_vec())
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
            .position(|c| (c.method, c.policy, c.ratio) == (Method::Kvzip, cell.policy, cell.ratio));
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
