//! Reference for ports to other programs: what the mapper keeps of a context, from tokens to masks.
//!
//! Nothing is measured here: the kept KV pairs follow from the features alone.
//!
//! Dimension key: n retention ratio, l layer, h KV head, p KV head of a source, c channel, t context
//! position.

use anyhow::{Context, Result};
use pkv_core::{Policy, RetentionRatio};
use pkv_extract::key_diff_of;
use pkv_lm::NoTap;
use pkv_prune::{PolicyInputs, keep_mask_by};
use tch::Tensor;

use crate::evaluate::EvalInputs;
use crate::methods::predict;

/// Tokens, features, scores and keep masks of the first `contexts` contexts of the `facts` task, by name.
///
/// The same functions on the same contexts as the evaluation's, at its `answer_ratios`.
///
/// # Shapes
/// - `ratios`: f64 `[n]`; `prefix`: i64, tokens of the chat template before each context
/// - `<index>.tokens`: i64 `[t]`, prefix left out
/// - `<index>.heads_pct`, `<index>.globals_ct`: raw features of the recipe's sources, f32
/// - `<index>.scores_lht`: the mapper's scores, f32; `<index>.key_diff_lht`: KeyDiff's
/// - `<index>.<policy>`: bool `[n, l, h, t]`, true = keep, for each policy
///
/// # Errors
/// A source or the mapper cannot read a context.
pub fn kept_sets(inputs: &EvalInputs, contexts: usize) -> Result<Vec<(String, Tensor)>> {
    let _no_grad = tch::no_grad_guard();
    let extractor = inputs.extractors()?;
    let ratios = &inputs.section.answer_ratios;
    let prefix = Tensor::from(inputs.tokenizer.prefix().len() as i64);
    let mut named = vec![("ratios".to_owned(), Tensor::from_slice(ratios)), ("prefix".to_owned(), prefix)];
    let ratios = ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
    let budgets = inputs.head_budgets()?;
    let shape = inputs.target.shape();
    for (index, context) in inputs.fact_contexts.iter().take(contexts).enumerate() {
        let features = extractor
            .features(&context.tokens)
            .with_context(|| format!("extracting the features of context {index}"))?;
        let scores_ot = predict(inputs.mapper, &features.heads_pct, &features.globals_ct)?;
        let scores_lht = scores_ot.reshape([shape.layers as i64, shape.kv_heads as i64, -1]);
        let mut put = |name: &str, tensor: Tensor| named.push((format!("{index}.{name}"), tensor));
        let tokens: Vec<i64> = context.tokens.iter().map(|&id| i64::from(id)).collect();
        put("tokens", Tensor::from_slice(&tokens));
        let cache = inputs.target_reader().prefill(&context.tokens, 0, &mut NoTap)?;
        let key_diff_lht = key_diff_of(&cache, inputs.tokenizer.prefix().len())?;
        let beside = PolicyInputs {
            budgets: Some(&budgets),
            key_diff_lht: Some(&key_diff_lht),
            newest: inputs.section.keep_recent,
        };
        for policy in Policy::ALL {
            let keep = ratios.iter().map(|&r| keep_mask_by(&scores_lht, policy, r, &beside));
            let keep = keep.collect::<Result<Vec<Tensor>>>()?;
            put(policy.name(), Tensor::stack(&keep, 0));
        }
        put("scores_lht", scores_lht);
        put("key_diff_lht", key_diff_lht);
        put("heads_pct", features.heads_pct);
        put("globals_ct", features.globals_ct);
    }
    Ok(named)
}
