//! Questions asked of one context's caches, full and pruned: what is said, and how far it drifts.
//!
//! One teacher-forced pass over question and wanted answer, behind every keep mask at once, tells whether greedy
//! decoding would give that answer, how far the distributions drifted and which tokens flipped. Only other answers are
//! decoded, from their first other token on. What is wanted is the caller's: the right answer, or the full cache's own.
//!
//! Dimension key: n keep mask, l layer, h KV head, k cached position, w wanted token, v vocabulary.

use anyhow::Result;
use pkv_lm::{Branches, KvCache, LanguageModel, TextTokenizer};
use tch::Tensor;

use crate::cell::Cell;
use crate::context::{PrunedContext, forward_bytes};
use crate::forced::{Batch, Continuation, Drift};

/// Who is asked.
#[derive(Clone, Copy)]
pub struct Asking<'a> {
    pub target: &'a LanguageModel,
    pub tokenizer: &'a TextTokenizer,
}

/// A continuation, and how long an answer may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub continuation: Continuation,
    pub max_tokens: usize,
}

/// What one cache said to one question.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// The decoded answer; `None` where it is the wanted one, token by token.
    pub text: Option<String>,
    /// KL(full || pruned), summed over the wanted tokens, nats.
    pub kl: f64,
    /// Wanted tokens whose most likely token differs from the full cache's.
    pub flipped: u32,
    /// Wanted tokens.
    pub tokens: u32,
}

impl Asking<'_> {
    /// Ask every question of the full cache, then of every cell's pruned one.
    ///
    /// Returns a row per cache, the full one first, each with one entry per question.
    ///
    /// # Errors
    /// There is no question, or a forward pass fails.
    pub fn ask(
        &self,
        questions: &[Question],
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<Vec<Vec<Said>>> {
        let continuations: Vec<Continuation> = questions.iter().map(|q| q.continuation.clone()).collect();
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
        let texts = self.decode_others(questions, &predictions, cells, pruned)?;
        let said = |(p, text): (&Prediction, Option<String>)| Said {
            text,
            kl: p.kl,
            flipped: p.flipped,
            tokens: p.tokens.len() as u32,
        };
        let said: Vec<Said> = predictions.iter().zip(texts).map(said).collect();
        Ok(said.chunks(questions.len()).map(<[Said]>::to_vec).collect())
    }

    /// Whole greedy answers of the full cache, in tokens; whether each ended by a stop token.
    ///
    /// # Errors
    /// There is no question, or a forward pass fails.
    pub fn answer_full(
        &self,
        prompts: &[(Vec<u32>, usize)],
        cache: &KvCache,
    ) -> Result<Vec<(Vec<u32>, bool)>> {
        let mut answers = Vec::with_capacity(prompts.len());
        for (prompt, max_tokens) in prompts {
            // One by one: answers of a context differ widely in length, and the full cache is asked once.
            let mut branches = Branches::new(cache, None, 1, prompt.len() + max_tokens)?;
            let stop = self.tokenizer.stop_tokens();
            let answer =
                self.target.generate_branches(&[prompt], &mut branches, *max_tokens, stop)?.remove(0);
            let ended = answer.len() < *max_tokens;
            answers.push((answer, ended));
        }
        Ok(answers)
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
    fn decode_others(
        &self,
        asked: &[Question],
        predictions: &[Prediction],
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<Vec<Option<String>>> {
        let stop = self.tokenizer.stop_tokens();
        let questions = asked.len();
        let mut texts: Vec<Option<String>> = vec![None; predictions.len()];
        // Per cell (the full cache first), the rows that must be decoded.
        let mut pending: Vec<(usize, Vec<Open>)> = Vec::new();
        for (cell, rows) in predictions.chunks(questions).enumerate() {
            let mut open = Vec::new();
            for (q, (p, question)) in rows.iter().zip(asked).enumerate() {
                let Question { continuation: c, max_tokens } = question;
                let Some(known) = p.known(&c.wanted, stop) else { continue };
                let row = cell * questions + q;
                match known.iter().position(|id| stop.contains(id)) {
                    Some(end) => texts[row] = Some(self.tokenizer.decode(&known[..end])?),
                    None => open.push(Open { row, prompt: &c.prompt, known, max_tokens: *max_tokens }),
                }
            }
            if !open.is_empty() {
                pending.push((cell, open));
            }
        }
        // Masks of one forward need equally many rows: alike ones together, then filled up with their last row.
        pending.sort_by_key(|(cell, open)| (*cell != 0, open.len()));
        let rows_per_forward = self.rows_per_forward(asked);
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
        let new = rows.iter().map(|o| o.max_tokens.saturating_sub(o.known.len())).max().unwrap_or(0);
        let longest = read.iter().map(Vec::len).max().unwrap_or(0);
        let mut branches = Branches::new(cache, keep_nlhk, width, longest + new.max(1))?;
        let read: Vec<&[u32]> = read.iter().map(Vec::as_slice).collect();
        let stop = self.tokenizer.stop_tokens();
        let mut answers = self.target.generate_branches(&read, &mut branches, new, stop)?;
        for (answer, open) in answers.iter_mut().zip(rows) {
            answer.splice(0..0, open.known.iter().copied());
            answer.truncate(open.max_tokens);
        }
        Ok(answers)
    }

    /// Rows that one decoding may carry: as [`Batch::masks_per_forward`], with logits of one token per row.
    fn rows_per_forward(&self, asked: &[Question]) -> usize {
        let shape = self.target.shape();
        let prompt = asked.iter().map(|q| q.continuation.prompt.len()).max().unwrap_or(1);
        let row = 8 * shape.vocab + 4 * prompt * (3 * shape.intermediate + 6 * shape.hidden);
        (forward_bytes(self.target.device()) / row).max(asked.len())
    }
}

/// A row whose answer is not known to its end.
struct Open<'a> {
    /// Index into the predictions.
    row: usize,
    prompt: &'a [u32],
    /// The answer up to and including its first wrong token.
    known: Vec<u32>,
    max_tokens: usize,
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
