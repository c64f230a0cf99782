//! One context, position by position: how many of each position's KV pairs a method keeps.

use anyhow::Result;
use pkv_core::RetentionRatio;
use pkv_lm::TextTokenizer;
use pkv_recipe::EvalSection;
use tch::Kind;

use crate::cell::nearest;
use crate::context::PrunedContext;
use crate::results::{FactSpan, KeptCounts, WorkedExample};

/// Ratios to show, or the nearest ones that are measured.
const RATIOS: [f64; 3] = [0.2, 0.05, 0.01];
/// Positions shown of a longer context: a page can hold no more of them.
const MAX_POSITIONS: usize = 4096;

/// Count what every method keeps at a few ratios, under the section's first policy.
///
/// # Errors
/// A token cannot be decoded.
pub fn work_example(
    id: String,
    tokens: &[u32],
    facts: Vec<FactSpan>,
    pruned: &PrunedContext,
    tokenizer: &TextTokenizer,
    section: &EvalSection,
) -> Result<WorkedExample> {
    let measured =
        section.answer_ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    let mut ratios: Vec<RetentionRatio> = Vec::new();
    for ratio in RATIOS.map(|wanted| nearest(&measured, wanted)) {
        if !ratios.contains(&ratio) {
            ratios.push(ratio);
        }
    }
    let policy = section.answer_policies.first().or(section.policies.first()).copied();
    let policy = policy.unwrap_or(pkv_core::Policy::Pair);
    let shown = tokens.len().min(MAX_POSITIONS);
    let mut kept = Vec::new();
    let mut pairs_per_position = 0;
    for scored in &pruned.scored {
        for &ratio in &ratios {
            let keep_lht = pruned.keep(scored.method, policy, ratio)?;
            pairs_per_position = (keep_lht.size()[0] * keep_lht.size()[1]) as u32;
            let counts_t = keep_lht.flatten(0, 1).sum_dim_intlist(0, false, Kind::Int64);
            let counts = Vec::<i64>::try_from(counts_t)?.into_iter().take(shown).map(|n| n as u32).collect();
            kept.push(KeptCounts { method: scored.method, ratio: ratio.get(), counts });
        }
    }
    let facts = facts.into_iter().filter(|f| f.start + f.len <= shown).collect();
    Ok(WorkedExample {
        id,
        tokens: tokens[..shown].iter().map(|&t| tokenizer.decode(&[t])).collect::<Result<_>>()?,
        facts,
        policy,
        pairs_per_position,
        kept,
    })
}
