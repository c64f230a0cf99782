//! Standard benchmarks asked of a pruned cache: RULER, LongBench, SCBench.
//!
//! A context is prefilled and scored once; every method, policy and retention ratio answers all its questions
//! from the same scores. Drift is measured along the full cache's own answer, which needs no right one to be
//! unique, and answers that do not leave it are not decoded again. What an answer is worth is `pkv-tasks`'.

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_lm::TextTokenizer;
use pkv_tasks::{Example, Squad, cut_middle};
use serde::{Deserialize, Serialize};

use crate::asking::{Asking, Question, Said};
use crate::bootstrap::Draws;
use crate::cell::{Cell, Cells};
use crate::clock;
use crate::columns::context_id;
use crate::context::PrunedContext;
use crate::forced::Continuation;
use crate::groups::forward_bytes;
use crate::results::{BenchmarkCell, BenchmarkResults, Interval, Made, Timing};
use crate::store::Outcome;

/// Makes example number `index` of a task; the same one whenever it is asked for.
pub type MakeExample<'a> = Box<dyn Fn(usize) -> Result<Example> + 'a>;

/// One task of a benchmark, its examples made when they are needed.
pub struct Benchmark<'a> {
    /// `ruler`, `longbench` or `scbench`.
    pub suite: &'static str,
    /// The task's name in its suite.
    pub task: String,
    pub examples: usize,
    pub example: MakeExample<'a>,
    /// Longest prompt in tokens; of longer ones the middle is cut out. `None` where examples have their length.
    pub prompt_tokens: Option<usize>,
    /// What the examples depend on beside their number: settings, files, versions. Outcomes are kept by it.
    pub identity: String,
}

/// What one context says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchOutcome {
    pub context_tokens: usize,
    /// Whether its middle was cut out.
    pub cut: bool,
    pub asked: Vec<BenchAsked>,
    /// The full cache's answers, one per turn.
    pub full: Vec<BenchAnswer>,
    /// Answers of each cell.
    pub cells: Cells<Vec<BenchAnswer>>,
    pub timings: Vec<Timing>,
    /// [`context_id`].
    pub context_id: String,
}

impl Outcome for BenchOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
        clock::add_all(&mut self.timings, &new.timings);
    }
}

/// A turn as it was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchAsked {
    pub question: String,
    pub wanted: Vec<String>,
    pub part: String,
}

/// One answer to one turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchAnswer {
    pub text: String,
    /// In [0, 1].
    pub score: f64,
    /// KL(full || pruned), summed over the tokens of the full cache's answer, nats.
    pub kl: f64,
    /// Of these tokens, those whose most likely token differs from the full cache's.
    pub flipped: u32,
    pub tokens: u32,
    /// Where a short answer is wanted; absent in outcomes of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squad: Option<Squad>,
}

/// An example in tokens, ready to be read.
pub struct Tokenized {
    pub context: Vec<u32>,
    pub cut: bool,
    /// Per turn: what is read behind the context.
    prompts: Vec<Vec<u32>>,
}

/// Tokenize an example; of a prompt above `prompt_tokens` the middle is cut out of the context.
///
/// # Errors
/// A text cannot be encoded, nothing of the context is left, or it is a conversation and the chat template takes none.
pub fn tokenize(e: &Example, prompt_tokens: Option<usize>, tokenizer: &TextTokenizer) -> Result<Tokenized> {
    let mut context = tokenizer.encode(&e.context)?;
    let mut prompts: Vec<Vec<u32>> = Vec::with_capacity(e.turns.len());
    for (i, turn) in e.turns.iter().enumerate() {
        let mut prompt = Vec::new();
        if e.conversation && i > 0 {
            prompt.extend(&prompts[i - 1]);
            prompt.extend(tokenizer.encode(&e.turns[i - 1].given)?);
            prompt.extend(tokenizer.turn().with_context(|| {
                hinted(
                    format!(
                        "example `{}` is a conversation, which the model's chat template does not take",
                        e.id
                    ),
                    "set `eval.benchmark.scbench_mode` to `multi-request`",
                )
            })?);
        }
        prompt.extend(tokenizer.encode(&turn.question)?);
        if e.chat {
            prompt.extend(tokenizer.switch());
        }
        prompt.extend(tokenizer.encode(&turn.answer_prefix)?);
        ensure!(!prompt.is_empty(), "turn {} of example `{}` asks nothing", i + 1, e.id);
        prompts.push(prompt);
    }
    let mut cut = false;
    if let Some(most) = prompt_tokens {
        let after = prompts.iter().map(Vec::len).max().unwrap_or(0);
        cut = cut_middle(&mut context, after, most);
    }
    ensure!(
        !context.is_empty(),
        hinted(
            format!("the questions of example `{}` leave no room for its context", e.id),
            "raise `eval.benchmark.prompt_tokens`"
        )
    );
    Ok(Tokenized { context, cut, prompts })
}

impl Asking<'_> {
    /// Ask every turn of the full cache and of the pruned one of each of `cells`; times are left to the caller.
    ///
    /// # Errors
    /// A forward pass fails.
    pub fn bench(
        &self,
        e: &Example,
        tokenized: &Tokenized,
        cells: &[Cell],
        pruned: &PrunedContext,
    ) -> Result<BenchOutcome> {
        let prompts: Vec<(Vec<u32>, usize)> =
            tokenized.prompts.iter().cloned().zip(e.turns.iter().map(|t| t.max_new_tokens)).collect();
        let full = self.answer_full(&prompts, &pruned.cache)?;
        let mut own_texts = Vec::with_capacity(full.len());
        let mut questions = Vec::with_capacity(full.len());
        for ((prompt, max_tokens), (answer, ended)) in prompts.into_iter().zip(full) {
            own_texts.push(self.tokenizer.decode(&answer)?);
            let stop = self.tokenizer.stop_tokens().first().filter(|_| ended);
            let wanted: Vec<u32> = answer.into_iter().chain(stop.copied()).collect();
            questions.push(Question { continuation: Continuation { prompt, wanted }, max_tokens });
        }
        let mut rows: Vec<Vec<Said>> = vec![Vec::new(); cells.len() + 1];
        for group in self.groups(&questions) {
            for (row, said) in rows.iter_mut().zip(self.ask(group, cells, pruned)?) {
                row.extend(said);
            }
        }
        let answer = |(i, said): (usize, Said)| {
            let text = said.text.unwrap_or_else(|| own_texts[i].clone());
            let score = e.turns[i].score(&text);
            let squad = e.turns[i].squad(&text);
            BenchAnswer { text, score, kl: said.kl, flipped: said.flipped, tokens: said.tokens, squad }
        };
        let mut rows = rows.into_iter().map(|row| row.into_iter().enumerate().map(answer).collect());
        let full = rows.next().unwrap_or_default();
        let asked = e.turns.iter().map(|t| BenchAsked {
            question: t.question.clone(),
            wanted: t.wanted.clone(),
            part: t.part.clone(),
        });
        Ok(BenchOutcome {
            context_tokens: tokenized.context.len(),
            cut: tokenized.cut,
            asked: asked.collect(),
            full,
            cells: cells.iter().copied().zip(rows).collect(),
            timings: Vec::new(),
            context_id: context_id(&tokenized.context),
        })
    }

    /// Turns that are asked together: the log-probabilities of one mask stay within half of a forward's memory.
    fn groups<'q>(&self, questions: &'q [Question]) -> Vec<&'q [Question]> {
        let vocab = self.target.shape().vocab;
        let most = (forward_bytes(self.target.device()) / 2 / (8 * vocab)).max(1);
        let mut groups = Vec::new();
        let mut rest = questions;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = rest.iter().take_while(|q| {
                tokens += q.continuation.wanted.len();
                tokens <= most
            });
            let (group, after) = rest.split_at(fits.count().max(1));
            groups.push(group);
            rest = after;
        }
        groups
    }
}

/// All contexts of a task together, each cell over those that have it; tasks that mix parts give one result for each.
pub fn summarize(
    made: &Made,
    (suite, task): (&str, &str),
    outcomes: &[(usize, BenchOutcome)],
    draws: &Draws,
) -> Vec<BenchmarkResults> {
    let all = || outcomes.iter().map(|(_, o)| o);
    let mut parts: Vec<&str> = Vec::new();
    for asked in all().flat_map(|o| &o.asked) {
        if !parts.contains(&asked.part.as_str()) {
            parts.push(&asked.part);
        }
    }
    let cells = Cell::union(all().flat_map(|o| o.cells.cells()));
    let share = |above: &[f64], below: &[f64]| {
        draws.of(above.len()).ratio(above, below).unwrap_or(Interval::exact(0.0))
    };
    let one = |part: &str| {
        // Sum over a context's turns of this part.
        let sum = |o: &BenchOutcome, row: &[BenchAnswer], of: &dyn Fn(&BenchAnswer) -> f64| -> f64 {
            o.asked.iter().zip(row).filter(|(asked, _)| asked.part == part).map(|(_, a)| of(a)).sum()
        };
        let score = |a: &BenchAnswer| a.score;
        // Every turn of the part has exact match and F1, or the part has neither.
        let squad = |rows: &[(&BenchOutcome, &Vec<BenchAnswer>)], of: fn(&Squad) -> f64| {
            let mine = |(o, row): &(&BenchOutcome, &Vec<BenchAnswer>)| {
                let turns = o.asked.iter().zip(row.iter()).filter(|(asked, _)| asked.part == part);
                turns.map(|(_, a)| a.squad.as_ref().map(of)).sum::<Option<f64>>()
            };
            let sums = rows.iter().map(mine).collect::<Option<Vec<f64>>>()?;
            let turns: Vec<f64> = rows.iter().map(|(o, row)| sum(o, row, &|_| 1.0)).collect();
            draws.of(sums.len()).ratio(&sums, &turns)
        };
        let cell = |cell: &Cell| {
            let mine: Vec<(&BenchOutcome, &Vec<BenchAnswer>)> =
                all().filter_map(|o| Some((o, o.cells.get(cell)?))).collect();
            let total = |of: &dyn Fn(&BenchAnswer) -> f64| -> Vec<f64> {
                mine.iter().map(|(o, row)| sum(o, row, of)).collect()
            };
            let full = |of: &dyn Fn(&BenchAnswer) -> f64| -> Vec<f64> {
                mine.iter().map(|(o, _)| sum(o, &o.full, of)).collect()
            };
            let (scores, tokens) = (total(&score), full(&|a| f64::from(a.tokens)));
            let (of_both, of_kvzip): (Vec<f64>, Vec<f64>) = mine
                .iter()
                .filter_map(|(o, row)| {
                    let kvzip = o.cells.get(&cell.of_kvzip())?;
                    Some((sum(o, row, &score), sum(o, kvzip, &score)))
                })
                .unzip();
            BenchmarkCell {
                method: cell.method,
                policy: cell.policy,
                ratio: cell.ratio.get(),
                contexts: (mine.len() < outcomes.len()).then_some(mine.len()),
                score: share(&scores, &full(&|_| 1.0)),
                exact_match: squad(&mine, |s| s.exact),
                f1: squad(&mine, |s| s.f1),
                kl: share(&total(&|a| a.kl), &tokens),
                flips: share(&total(&|a| f64::from(a.flipped)), &tokens),
                of_kvzip: draws.of(of_both.len()).ratio(&of_both, &of_kvzip),
                of_full: draws.of(mine.len()).ratio(&scores, &full(&score)),
            }
        };
        let full =
            |of: &dyn Fn(&BenchAnswer) -> f64| -> Vec<f64> { all().map(|o| sum(o, &o.full, of)).collect() };
        let n = full(&|_| 1.0);
        let of_full: Vec<_> = all().map(|o| (o, &o.full)).collect();
        BenchmarkResults {
            made: made.clone(),
            suite: suite.to_owned(),
            task: if part == task { part.to_owned() } else { format!("{task}/{part}") },
            contexts: outcomes.len(),
            questions: n.iter().sum::<f64>() as usize,
            mean_context_tokens: all().map(|o| o.context_tokens as f64).sum::<f64>()
                / outcomes.len().max(1) as f64,
            cut: all().filter(|o| o.cut).count(),
            full: share(&full(&score), &n),
            full_exact_match: squad(&of_full, |s| s.exact),
            full_f1: squad(&of_full, |s| s.f1),
            cells: cells.iter().map(cell).collect(),
        }
    };
    parts.into_iter().map(one).collect()
}
