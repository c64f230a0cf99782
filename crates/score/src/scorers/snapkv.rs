//! SnapKV's score: the attention of the context's last tokens.
//!
//! They are read once more, after the part of the cache before them: nothing is repeated, and the cost is
//! that of 32 tokens. The baseline `snapkv` of `eval` takes the same queries during the prefill.
//!
//! Dimension key: l layer, h KV head, g query heads per KV head, q query head, w window query, d head_dim,
//! k key attended to (prefix and context), r row, t context position.

use anyhow::{Result, ensure};
use pkv_lm::{RepeatTap, RepeatView};
use pkv_recipe::plan::ScorerWork;
use tch::{Kind, Tensor};

use super::{CachedContext, Compute, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "snapkv",
    meaning: "attention of the context's last tokens; nothing is repeated",
    compute: Compute::Cached(|context| {
        let window = context.tokens.len().min(WINDOW as usize);
        let last = &context.tokens[context.tokens.len() - window..];
        let earlier = context.cache.first(context.cache.len() - window);
        let mut tap = WindowTap { context, layers_ht: Vec::new() };
        context.model.forward_repeats(&[last], &earlier, &mut tap)?;
        Ok(context.cache.placement().stack(&tap.layers_ht))
    }),
    work: ScorerWork { repeats: false, value_norms: false, read_again: WINDOW as usize },
    #[cfg(test)]
    held_by: ("score/src/scorers/snapkv.rs", "fn naive("),
};

/// Queries of the observation window.
pub const WINDOW: i64 = 32;
/// Width of the average pool over positions.
const POOL: i64 = 5;

/// Scores each layer by the queries of the window.
struct WindowTap<'a> {
    context: &'a CachedContext<'a>,
    layers_ht: Vec<Tensor>,
}

impl RepeatTap for WindowTap<'_> {
    fn layer(&mut self, view: &RepeatView) -> Result<()> {
        let (q_qwd, k_hkd) = (view.q_rqd.transpose(0, 1), self.context.cache.keys(view.layer));
        self.layers_ht.push(window_scores(&q_qwd, &k_hkd, view.scale, self.context.prefix)?);
        Ok(())
    }
}

/// SnapKV's scores of one layer.
///
/// Mean over the window's queries and the query group of the softmax weight, averaged over 5
/// neighbouring positions. The window's own positions score above 1, later ones more, so they stay
/// first; as StreamingLLM's recent tokens do.
///
/// # Shapes
/// - `q_qwd`: `[query heads, window, head_dim]`, the queries of the last positions, rotary applied
/// - `k_hkd`: `[KV heads, prefix + context, head_dim]`
/// - returns `[KV heads, context]`, f32
///
/// # Errors
/// The prefix leaves no context.
///
/// # Source
/// `presses/snapkv_press.py` in NVIDIA/kvpress 0.5.5. Differs: the window is the paper's 32 queries, where
/// kvpress has 64 by default; softmax in f32; window positions are ordered by recency instead of all
/// scoring the maximum.
pub fn window_scores(q_qwd: &Tensor, k_hkd: &Tensor, scale: f64, prefix: usize) -> Result<Tensor> {
    let (query_heads, window, head_dim) = q_qwd.size3()?;
    let (kv_heads, keys, _) = k_hkd.size3()?;
    let context = keys - prefix as i64;
    ensure!(context > 0, "a cache of {keys} positions holds no context after a prefix of {prefix}");
    let window = window.min(context);
    let q_qwd = q_qwd.narrow(1, q_qwd.size()[1] - window, window);
    let q_hgwd = q_qwd.to_kind(Kind::Float).view([kv_heads, query_heads / kv_heads, window, head_dim]);
    let k_h1kd = k_hkd.to_kind(Kind::Float).unsqueeze(1);
    let logits_hgwk = q_hgwd.matmul(&k_h1kd.transpose(-1, -2)) / scale.recip();
    let later_wk = Tensor::ones([window, keys], (Kind::Bool, k_hkd.device())).triu(keys - window + 1);
    let weights_hgwk = logits_hgwk.masked_fill(&later_wk, f64::NEG_INFINITY).softmax(-1, Kind::Float);
    let before = keys - window;
    let received_hgk = weights_hgwk.mean_dim([2].as_slice(), false, Kind::Float).narrow(-1, 0, before);
    let pooled_hgk =
        if before > 0 { received_hgk.avg_pool1d([POOL], [1], [POOL / 2], false, true) } else { received_hgk };
    let earlier_ht =
        pooled_hgk.mean_dim([1].as_slice(), false, Kind::Float).narrow(-1, prefix as i64, context - window);
    let recency_w = Tensor::arange_start(1, window + 1, (Kind::Float, k_hkd.device())) / window as f64 + 1.0;
    Ok(Tensor::cat(&[earlier_ht, recency_w.expand([kv_heads, window], false)], -1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;
    use pkv_test_support::loops::attention_weights;
    use pkv_test_support::tensors::flat;
    use rand::Rng;

    /// 1/sqrt(head_dim) of none of the cases.
    const SCALE: f64 = 0.3;

    fn random(shape: &[i64], index: u64) -> Tensor {
        let mut rng = Seed(1).stream("snapkv", index);
        let x: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_slice(&x).view(shape)
    }

    /// The definition, one number at a time in f64.
    fn naive(q: &Tensor, k: &Tensor, prefix: usize) -> Vec<Vec<f64>> {
        let (qh, w, d) = q.size3().unwrap();
        let (kvh, n, _) = k.size3().unwrap();
        let group = qh / kvh;
        let (queries, keys) = (flat(q), flat(k));
        let vector = |of: &[f64], row: i64| of[(row * d) as usize..][..d as usize].to_vec();
        let mut received = vec![vec![0.0; (n - w) as usize]; qh as usize];
        for head in 0..qh {
            let seen: Vec<Vec<f64>> = (0..n).map(|key| vector(&keys, head / group * n + key)).collect();
            for row in 0..w {
                let visible = seen[..(n - w + row + 1) as usize].iter().map(Vec::as_slice);
                let weights = attention_weights(&vector(&queries, head * w + row), visible, SCALE);
                for (slot, weight) in received[head as usize].iter_mut().zip(weights) {
                    *slot += weight / w as f64;
                }
            }
        }
        (0..kvh)
            .map(|h| {
                let pooled = |key: usize| {
                    let rows = (h * group..(h + 1) * group).map(|head| {
                        let around = key.saturating_sub(2)..(key + 3).min((n - w) as usize);
                        around.map(|j| received[head as usize][j]).sum::<f64>() / 5.0
                    });
                    rows.sum::<f64>() / group as f64
                };
                (prefix..(n - w) as usize).map(pooled).collect()
            })
            .collect()
    }

    #[test]
    fn scores_equal_the_definition_and_the_window_comes_first() {
        let (q, k) = (random(&[4, 32, 8], 0), random(&[2, 61, 8], 1));
        let got = window_scores(&q, &k, SCALE, 3).unwrap();
        assert_eq!(got.size(), [2, 58]);
        for (h, row) in naive(&q, &k, 3).iter().enumerate() {
            for (t, expected) in row.iter().enumerate() {
                let x = got.double_value(&[h as i64, t as i64]);
                assert!((x - expected).abs() < 1e-6, "head {h}, position {t}: {x}, expected {expected}");
            }
        }
        assert_eq!(got.argsort(-1, true).int64_value(&[0, 0]), 57);
        assert!(got.narrow(-1, 26, 32).min().double_value(&[]) > 1.0);
    }

    #[test]
    fn a_context_shorter_than_the_window_is_all_window() {
        let (q, k) = (random(&[2, 9, 4], 2), random(&[1, 9, 4], 3));
        let got = window_scores(&q, &k, SCALE, 4).unwrap();
        assert_eq!(got.size(), [1, 5]);
        assert!(got.min().double_value(&[]) > 1.0);
        assert!(window_scores(&q, &k, SCALE, 9).is_err());
    }
}
