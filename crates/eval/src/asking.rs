//! Asks questions of one context's caches, full and pruned: the answers, and the drift of their
//! distributions.
//!
//! One teacher-forced pass over question and wanted answer, after every keep mask at once, tells whether
//! greedy decoding would give that answer, how far the distributions drifted and which tokens flipped. Only
//! other answers are decoded: from their first other token on, all methods, ratios and questions together,
//! and in the cache of the first pass. What is wanted is the task's: the right answer, or the full cache's
//! own.
//!
//! Dimension key: n keep mask, l layer, h KV head, k cached position, w wanted token, m hidden, v vocabulary.

use anyhow::{Context, Result};
use pkv_lm::{Branches, KvCache, LanguageModel};
use pkv_results::answered::Answer;
use pkv_results::cell::Cell;
use pkv_text::TextTokenizer;

use crate::context::PrunedContext;
use crate::forced::{Batch, Continuation, Drift};
use crate::groups::{Groups, forward_bytes};
use crate::task::{Question, Right};

/// Who is asked.
#[derive(Clone, Copy)]
pub struct Asking<'a> {
    pub target: &'a LanguageModel,
    pub tokenizer: &'a TextTokenizer,
}

/// A continuation, and how long an answer may be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Forced {
    continuation: Continuation,
    max_tokens: usize,
}

/// Answer of one cache to one question.
#[derive(Clone, Debug, PartialEq)]
struct Said {
    /// The decoded answer; `None` where it is the wanted one, token by token.
    text: Option<String>,
    /// KL(full || pruned), summed over the wanted tokens, nats.
    kl: f64,
    /// Wanted tokens whose most likely token differs from the full cache's.
    flipped: u32,
    /// Wanted tokens.
    tokens: u32,
}

impl Asking<'_> {
    /// Ask every question of the full cache, then of every cell's pruned one.
    ///
    /// Returns a row per cache, the full one first, each with one answer per question.
    ///
    /// # Errors
    /// There is no question, or a forward pass fails.
    pub fn answers(
        &self,
        questions: &[Question],
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<Vec<Vec<Answer>>> {
        let own = |q: &&Question| matches!(q.right, Right::FullCache);
        let prompts: Vec<(Vec<u32>, usize)> =
            questions.iter().filter(own).map(|q| (q.prompt.clone(), q.max_tokens)).collect();
        let mut full = match prompts.is_empty() {
            true => Vec::new(),
            false => self.answer_full(&prompts, &pruned.cache)?,
        }
        .into_iter();
        let (mut texts, mut forced) = (Vec::new(), Vec::new());
        for q in questions {
            let (wanted, text) = match &q.right {
                Right::Answer { tokens, text } => (tokens.clone(), text.clone()),
                Right::FullCache => {
                    let (answer, ended) = full.next().context("the full cache answers every question")?;
                    let text = self.tokenizer.decode(&answer)?;
                    let stop = self.tokenizer.stop_tokens().first().filter(|_| ended);
                    (answer.into_iter().chain(stop.copied()).collect(), text)
                }
            };
            let continuation = Continuation { prompt: q.prompt.clone(), wanted };
            forced.push(Forced { continuation, max_tokens: q.max_tokens });
            texts.push(text);
        }
        let mut rows: Vec<Vec<Said>> = vec![Vec::new(); cells.len() + 1];
        for group in self.groups(&forced) {
            for (row, said) in rows.iter_mut().zip(self.ask(group, cells, pruned)?) {
                row.extend(said);
            }
        }
        let answer = |(i, said): (usize, Said)| {
            let is_right = said.text.is_none();
            let text = said.text.unwrap_or_else(|| texts[i].clone());
            let (score, squad) = (questions[i].score)(&text, is_right);
            Answer { text, score, kl: said.kl, flipped: said.flipped, tokens: said.tokens, squad, kept: None }
        };
        Ok(rows.into_iter().map(|row| row.into_iter().enumerate().map(answer).collect()).collect())
    }

    /// Questions that are asked together: the log-probabilities of one mask stay within half of a forward's
    /// memory.
    fn groups<'q>(&self, questions: &'q [Forced]) -> Vec<&'q [Forced]> {
        let vocab = self.target.shape().vocab;
        let most = (forward_bytes(self.target.device()) / 2 / (8 * vocab)).max(1);
        let mut groups = Vec::new();
        let mut rest = questions;
        loop {
            let mut tokens = 0;
            let fits = rest.iter().take_while(|q| {
                tokens += q.continuation.wanted.len();
                tokens <= most
            });
            let (group, after) = rest.split_at(fits.count().max(1).min(rest.len()));
            groups.push(group);
            rest = after;
            if rest.is_empty() {
                return groups;
            }
        }
    }

    fn ask(&self, questions: &[Forced], cells: &[Cell], pruned: &PrunedContext) -> Result<Vec<Vec<Said>>> {
        let continuations: Vec<Continuation> = questions.iter().map(|q| q.continuation.clone()).collect();
        let batch = Batch::new(&continuations, self.target.device())?;
        // A finished row continues with the others until it leaves.
        let capacity = batch.tokens() + questions.iter().map(|q| q.max_tokens).max().unwrap_or(0);
        let (cache, width) = (&pruned.cache, questions.len());

        let mut full = Branches::new(cache, None, width, capacity)?;
        let hidden_1wm = batch.read(self.target, &mut full)?;
        let full_wv = batch.reference(self.target, &hidden_1wm);
        let reference = batch.drift(self.target, &hidden_1wm, &full_wv)?;
        let full_tokens = reference[0].most_likely.clone();
        let mut said = self.say(questions, self.predictions(&batch, &reference, &full_tokens), full)?;

        let groups = Groups { model: self.target, batch: &batch, cached: cache.len(), capacity };
        said.extend(groups.run(cells, |group| {
            let mut branches = Branches::new(cache, Some(&pruned.keep_masks(group)?), width, capacity)?;
            let hidden_nwm = batch.read(self.target, &mut branches)?;
            let drift = batch.drift(self.target, &hidden_nwm, &full_wv)?;
            self.say(questions, self.predictions(&batch, &drift, &full_tokens), branches)
        })?);
        Ok(said)
    }

    /// Whole greedy answers of the full cache, in tokens; whether each ended by a stop token.
    fn answer_full(&self, prompts: &[(Vec<u32>, usize)], cache: &KvCache) -> Result<Vec<(Vec<u32>, bool)>> {
        let longest = prompts.iter().map(|(prompt, _)| prompt.len()).max().unwrap_or(0);
        let most = prompts.iter().map(|(_, max_tokens)| *max_tokens).max().unwrap_or(0);
        let mut branches = Branches::new(cache, None, prompts.len(), longest + most)?;
        let questions: Vec<&[u32]> = prompts.iter().map(|(prompt, _)| prompt.as_slice()).collect();
        let answers =
            self.target.generate_branches(&questions, &mut branches, most, self.tokenizer.stop_tokens())?;
        let one = |(mut answer, (_, max_tokens)): (Vec<u32>, &(Vec<u32>, usize))| {
            answer.truncate(*max_tokens);
            let ended = answer.len() < *max_tokens;
            (answer, ended)
        };
        Ok(answers.into_iter().zip(prompts).map(one).collect())
    }

    /// Predictions of every row, mask-major.
    fn predictions(&self, batch: &Batch, drift: &[Drift], full_tokens: &[i64]) -> Vec<Prediction> {
        let ranges = batch.ranges();
        let one = |drift: &Drift, range: std::ops::Range<usize>| {
            let tokens = &drift.most_likely[range.clone()];
            Prediction {
                kl: drift.kl[range.clone()].iter().sum(),
                flipped: tokens.iter().zip(&full_tokens[range]).filter(|(a, b)| a != b).count() as u32,
                tokens: tokens.iter().map(|&id| id as u32).collect(),
            }
        };
        drift.iter().flat_map(|drift| ranges.iter().map(move |range| one(drift, range.clone()))).collect()
    }

    /// Answers of every row of `branches`, which have read questions and wanted answers: one entry per
    /// question and mask.
    ///
    /// A row's tokens are known up to and including its first wrong one, so only the rest is decoded.
    fn say(
        &self,
        asked: &[Forced],
        predictions: Vec<Prediction>,
        mut branches: Branches,
    ) -> Result<Vec<Vec<Said>>> {
        let stop = self.tokenizer.stop_tokens();
        let mut texts: Vec<Option<String>> = vec![None; predictions.len()];
        let mut lengths = branches.lengths();
        let mut open: Vec<(usize, Vec<u32>, usize)> = Vec::new();
        for (row, p) in predictions.iter().enumerate() {
            let Forced { continuation: c, max_tokens } = &asked[row % asked.len()];
            let Some(known) = p.known(&c.wanted, stop) else { continue };
            match known.iter().position(|id| stop.contains(id)) {
                Some(end) => texts[row] = Some(self.tokenizer.decode(&known[..end])?),
                None => {
                    // The wrong token itself is not read yet.
                    lengths[row] = c.prompt.len() + known.len() - 1;
                    open.push((row, known, *max_tokens));
                }
            }
        }
        if !open.is_empty() {
            branches.truncate(&lengths)?;
            branches.retain(&open.iter().map(|(row, ..)| *row).collect::<Vec<_>>())?;
            let next: Vec<u32> = open.iter().filter_map(|(_, known, _)| known.last().copied()).collect();
            let limits: Vec<usize> =
                open.iter().map(|(_, known, most)| most.saturating_sub(known.len())).collect();
            let rest = self.target.continue_branches(&next, &mut branches, &limits, stop)?;
            for ((row, mut answer, most), rest) in open.into_iter().zip(rest) {
                answer.extend(rest);
                answer.truncate(most);
                texts[row] = Some(self.tokenizer.decode(&answer)?);
            }
        }
        let said = predictions.into_iter().zip(texts).map(|(p, text)| Said {
            text,
            kl: p.kl,
            flipped: p.flipped,
            tokens: p.tokens.len() as u32,
        });
        Ok(said.collect::<Vec<_>>().chunks(asked.len()).map(<[Said]>::to_vec).collect())
    }
}

/// Predictions of one row along the wanted tokens.
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
