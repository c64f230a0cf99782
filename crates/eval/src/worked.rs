//! One context, position by position: how many of each position's KV pairs a method keeps.

use anyhow::Result;
use pkv_core::{Policy, RetentionRatio};
use pkv_recipe::EvalSection;
use pkv_results::cell::{Cell, Cells, nearest};
use pkv_results::store::Outcome;
use pkv_results::{FactSpan, KeptCounts, WorkedExample};
use pkv_text::TextTokenizer;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::context::PrunedContext;

/// Ratios to show, or the nearest ones that are measured.
const RATIOS: [f64; 6] = [0.2, 0.1, 0.07, 0.05, 0.03, 0.01];
/// Positions shown of a longer context: a page can hold no more of them.
const MAX_POSITIONS: usize = 4096;

/// Outcome of one context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExampleOutcome {
    id: String,
    tokens: Vec<String>,
    facts: Vec<FactSpan>,
    pairs_per_position: u32,
    /// Kept KV pairs of each position.
    pub cells: Cells<Vec<u32>>,
}

impl Outcome for ExampleOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
    }
}

/// Every method at a few ratios, under the section's first policy.
///
/// # Errors
/// A ratio is out of range; a recipe that was checked has none such.
pub fn cells(section: &EvalSection) -> Result<Vec<Cell>> {
    let measured =
        section.answer_ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    let policy = section.answer_policies.first().or(section.policies.first()).copied();
    Ok(Cell::all(&section.methods, &[policy.unwrap_or(Policy::Pair)], &shown(&measured)))
}

/// The ratios nearest to those wanted, each once.
fn shown(measured: &[RetentionRatio]) -> Vec<RetentionRatio> {
    let mut ratios: Vec<RetentionRatio> = Vec::new();
    for ratio in RATIOS.map(|wanted| nearest(measured, wanted)) {
        if !ratios.contains(&ratio) {
            ratios.push(ratio);
        }
    }
    ratios
}

/// Count what is kept in each of `cells`.
///
/// # Errors
/// A token cannot be decoded, or a cell's method did not score.
pub fn work_example(
    id: String,
    tokens: &[u32],
    facts: Vec<FactSpan>,
    cells: &[Cell],
    pruned: &PrunedContext,
    tokenizer: &TextTokenizer,
) -> Result<ExampleOutcome> {
    let shown = tokens.len().min(MAX_POSITIONS);
    let mut counted = Vec::new();
    let mut pairs_per_position = 0;
    for &cell in cells {
        let keep_lht = pruned.keep(cell.method, cell.policy, cell.ratio)?;
        pairs_per_position = (keep_lht.size()[0] * keep_lht.size()[1]) as u32;
        let counts_t = keep_lht.flatten(0, 1).sum_dim_intlist(0, false, Kind::Int64);
        let counts = Vec::<i64>::try_from(counts_t)?.into_iter().take(shown).map(|n| n as u32).collect();
        counted.push((cell, counts));
    }
    Ok(ExampleOutcome {
        id,
        tokens: tokens[..shown].iter().map(|&t| tokenizer.decode(&[t])).collect::<Result<_>>()?,
        facts: facts.into_iter().filter(|f| f.start + f.len <= shown).collect(),
        pairs_per_position,
        cells: counted.into_iter().collect(),
    })
}

/// The policy with most counts, at the ratios nearest to those wanted.
pub fn summarize(outcome: ExampleOutcome) -> Option<WorkedExample> {
    let cells = Cell::union(outcome.cells.cells());
    let count = |policy: Policy| cells.iter().filter(|c| c.policy == policy).count();
    // The first of equals, which is the one measured first.
    let policy = cells.iter().map(|c| c.policy).reduce(|a, b| if count(b) > count(a) { b } else { a })?;
    let of_policy = || cells.iter().filter(|c| c.policy == policy);
    let ratios = shown(&of_policy().map(|c| c.ratio).collect::<Vec<_>>());
    let kept = of_policy().filter(|c| ratios.contains(&c.ratio)).filter_map(|c| {
        let counts = outcome.cells.get(c)?.clone();
        Some(KeptCounts { method: c.method, ratio: c.ratio.get(), counts })
    });
    Some(WorkedExample {
        policy,
        pairs_per_position: outcome.pairs_per_position,
        kept: kept.collect(),
        id: outcome.id,
        tokens: outcome.tokens,
        facts: outcome.facts,
    })
}
