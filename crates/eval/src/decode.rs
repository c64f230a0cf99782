//! Greedy decoding of many answers at once, behind pruned caches.
//!
//! Rows of different lengths walk in step: a row reads its own tokens while it has some and what it
//! predicts afterwards, so no pad ever enters a row's cache.
//!
//! Dimension key: n keep mask, q row of a mask, l layer, h KV head, k cached position.

use anyhow::{Result, ensure};
use pkv_lm::{Branches, KvCache, LanguageModel};
use tch::Tensor;

/// A row to decode: tokens known so far, and how many of them belong to the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub known: Vec<u32>,
    pub answered: usize,
}

/// Continue every row greedily up to a token of `stop` or `max_answer` tokens of answer.
///
/// Returns each row's answer, stop token left out.
///
/// # Shapes
/// - `keep_nlhk`: bool `[masks, layers, KV heads, cached positions]`, or `None` for one full cache
/// - `rows`: the same number for every mask, mask by mask
///
/// # Errors
/// A row knows nothing, or rows do not divide into masks.
pub fn decode(
    model: &LanguageModel,
    cache: &KvCache,
    keep_nlhk: Option<&Tensor>,
    rows: &[Start],
    max_answer: usize,
    stop: &[u32],
) -> Result<Vec<Vec<u32>>> {
    let masks = keep_nlhk.map_or(1, |k| k.size()[0] as usize);
    ensure!(
        !rows.is_empty() && rows.len().is_multiple_of(masks),
        "{} rows do not divide into {masks} masks",
        rows.len()
    );
    ensure!(rows.iter().all(|r| r.known.len() > r.answered), "a row to decode has no prompt");
    let end = |r: &Start| r.known.len() - r.answered + max_answer;
    let longest = rows.iter().map(end).max().unwrap_or(0);
    let mut branches = Branches::new(cache, keep_nlhk, rows.len() / masks, longest)?;
    let mut tokens: Vec<Vec<u32>> = rows.iter().map(|r| r.known.clone()).collect();
    let mut done: Vec<bool> = rows.iter().map(|r| r.answered >= max_answer).collect();
    let mut read = 0;
    let mut ahead = tokens.iter().map(Vec::len).min().unwrap_or(0);
    while !done.iter().all(|&d| d) {
        let ids: Vec<i64> = tokens.iter().flat_map(|t| &t[read..ahead]).map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).view([rows.len() as i64, -1]).to_device(model.device());
        let hidden = model.forward_branches(&ids, &mut branches)?;
        let next: Vec<i64> = model.logits(&hidden.select(1, -1)).argmax(-1, false).try_into()?;
        read = ahead;
        ahead += 1;
        for (i, (row, &id)) in tokens.iter_mut().zip(&next).enumerate() {
            let id = id as u32;
            if row.len() > read {
                continue;
            }
            row.push(id);
            done[i] = done[i] || stop.contains(&id) || row.len() >= end(&rows[i]);
        }
    }
    let answer = |(row, start): (&Vec<u32>, &Start)| {
        let from = start.known.len() - start.answered;
        let answer = row[from..].iter().take(max_answer).copied();
        answer.take_while(|id| !stop.contains(id)).collect()
    };
    Ok(tokens.iter().zip(rows).map(answer).collect())
}
