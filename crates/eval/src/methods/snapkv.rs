//! SnapKV: what the last queries of the context attend to.
//!
//! SnapKV (arXiv 2404.14469) scores the cache by the attention of an observation window at the end
//! of the prompt. Here the question is not known when pruning, so the window is the context's own
//! end. A [`QueryTail`] takes the queries from the target's prefill.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head, w window query, d head_dim,
//! k key attended to (prefix and context), t context position.

use anyhow::{Result, ensure};
use pkv_lm::{KvCache, LayerView, Tap};
use pkv_recipe::MethodName;
use pkv_score::{WINDOW, window_scores};
use tch::Tensor;

use super::method::{Method, Needs, Ready, Watch};
use super::view::ContextView;

pub const METHOD: Method = Method {
    name: MethodName::SNAPKV,
    meaning: "attention of the last tokens of the context; the question is not known yet",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: ("../score/src/scorers/snapkv.rs", "fn naive("),
    start: |_| Ready::watches(QueryTail::default).start(),
};

/// Keeps the last queries of every layer while a context is prefilled.
#[derive(Default)]
struct QueryTail {
    layers_qwd: Vec<Tensor>,
    /// Scale of products of queries and keys.
    scale: f64,
}

impl Tap for QueryTail {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.scale = view.scale;
        let new_qsd = view.q_qsd;
        let tail_qwd = match self.layers_qwd.get(view.layer) {
            Some(old) if new_qsd.size()[1] < WINDOW => Tensor::cat(&[old, new_qsd], 1),
            _ => new_qsd.shallow_clone(),
        };
        let window = WINDOW.min(tail_qwd.size()[1]);
        // A copy, because a view would hold all queries of the chunk.
        let tail_qwd = tail_qwd.narrow(1, tail_qwd.size()[1] - window, window).copy();
        if view.layer < self.layers_qwd.len() {
            self.layers_qwd[view.layer] = tail_qwd;
        } else {
            ensure!(view.layer == self.layers_qwd.len(), "layer {} came out of order", view.layer);
            self.layers_qwd.push(tail_qwd);
        }
        Ok(())
    }
}

impl Watch for QueryTail {
    fn scores(self: Box<Self>, view: &ContextView) -> Result<Tensor> {
        let (cache, prefix) = view.prefilled()?;
        self.scores_of(cache, prefix)
    }
}

impl QueryTail {
    /// SnapKV's scores from the queries kept and the keys of the cache that they were computed with.
    ///
    /// # Shapes
    /// - `cache`: the chat template's prefix (`prefix` positions) and then the context, nothing else
    /// - returns `[layers, KV heads, context positions]`, f32
    ///
    /// # Errors
    /// Nothing was prefilled, or the cache holds no context.
    fn scores_of(&self, cache: &KvCache, prefix: usize) -> Result<Tensor> {
        ensure!(!self.layers_qwd.is_empty(), "SnapKV needs a prefill to look at");
        let layers = self.layers_qwd.iter().enumerate();
        let scores = layers
            .map(|(l, q)| window_scores(q, &cache.keys(l), self.scale, prefix))
            .collect::<Result<Vec<_>>>()?;
        Ok(cache.placement().stack(&scores))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;
    use rand::Rng;
    use tch::{Device, Kind};

    /// 1/sqrt(head_dim) of none of the cases.
    const SCALE: f64 = 0.3;

    fn random(shape: &[i64], index: u64) -> Tensor {
        let mut rng = Seed(1).stream("snapkv", index);
        let x: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_slice(&x).view(shape)
    }

    #[test]
    fn the_tail_is_the_same_in_one_chunk_and_in_many() {
        let q = random(&[2, 70, 4], 4);
        let k = random(&[1, 70, 4], 5);
        let tail = |chunks: &[i64]| {
            let mut tap = QueryTail::default();
            let mut start = 0;
            for &s in chunks {
                let q_qsd = q.narrow(1, start, s);
                let nothing = Tensor::zeros([s, 4], (Kind::Float, Device::Cpu));
                let view = LayerView {
                    layer: 0,
                    q_qsd: &q_qsd,
                    k_hkd: &k,
                    v_hkd: &k,
                    start: start as usize,
                    scale: SCALE,
                    hidden_sm: &nothing,
                    normed_sm: &nothing,
                    lse_qs: None,
                };
                tap.layer(&view).unwrap();
                start += s;
            }
            tap.layers_qwd[0].shallow_clone()
        };
        let whole = tail(&[70]);
        assert_eq!(whole, q.narrow(1, 38, 32));
        assert_eq!(tail(&[40, 20, 10]), whole);
        assert_eq!(tail(&[1; 70]), whole);
    }
}
