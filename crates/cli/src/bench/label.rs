//! The target: a bare prefill, and what `label` does per context.

use anyhow::Result;
use pkv_lm::NoTap;
use pkv_recipe::plan::{Repeat, prefill, repeat};
use pkv_score::Scorer;

use super::Bench;
use super::clock::Row;
use super::models::{PREFIX_TOKENS, Subject, TEMPLATE};

/// Two rows per context: `prefill`, without logits, and `label`, which is prefill and scoring.
///
/// # Errors
/// The model is not available, or fails for a reason other than memory.
pub fn rows(bench: &Bench, target: &Subject) -> Result<Vec<Row>> {
    let (section, shape) = (&bench.recipe.label, &target.section.shape);
    let by = Repeat::new(section, TEMPLATE);
    let row = |what, t| {
        let bare = prefill(shape, PREFIX_TOKENS + t);
        Row::new(what, t, if what == "label" { bare + repeat(shape, t, &by) } else { bare })
    };
    let Some(model) = target.model()? else {
        let of = |&t: &usize| ["prefill", "label"].map(|what| row(what, t).out_of_memory());
        return Ok(bench.contexts.iter().flat_map(of).collect());
    };
    let prefix = target.prefix()?;
    let scorer = Scorer::with_requests(&model, target.requests(section)?, &prefix, section).maxima_only();
    let mut rows = Vec::new();
    for &t in bench.contexts {
        let context = target.context(t)?;
        let ids = [prefix.as_slice(), &context].concat();
        let bare = bench.clock.time(row("prefill", t), || {
            let mut cache = model.new_cache(ids.len());
            model.prefill(&ids, &mut cache, section.prefill_chunk_tokens, &mut NoTap)
        })?;
        let whole = bench.clock.time(row("label", t), || scorer.score(&context))?;
        rows.push(bare.clone());
        rows.push(whole.compared_with(&bare));
    }
    Ok(rows)
}
