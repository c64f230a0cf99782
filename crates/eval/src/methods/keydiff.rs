//! KeyDiff: keys that differ from the others are kept.
//!
//! Dimension key: h KV head, k cached position (prefix and context), d head_dim, t context position.

use anyhow::{Result, ensure};
use pkv_lm::KvCache;
use pkv_recipe::MethodName;
use tch::{Kind, Tensor};

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::of("keydiff"),
    label: "KeyDiff",
    meaning: "how little a key resembles the mean key of its head; no attention is looked at",
    needs: Needs::PREFILL,
    start: |_| {
        Ready::scores(|view| {
            let (cache, prefix) = view.prefilled()?;
            keydiff(cache, prefix)
        })
        .start()
    },
};

/// Shorter keys count as this long.
const SHORTEST: f64 = 1e-12;

/// Minus the cosine between each key and the mean of its head's normalized keys.
///
/// # Shapes
/// - `cache`: the chat template's prefix (`prefix` positions) and then the context, nothing else
/// - returns `[layers, KV heads, context positions]`, f32 in [-1, 1]
///
/// # Errors
/// The cache holds no context.
///
/// # Source
/// KeyDiff (arXiv 2504.15364); `presses/keydiff_press.py` in NVIDIA/kvpress 0.5.5, which scores the whole prompt at once, as
/// here. Differs: cosines in f32 whatever the cache's kind; the paper evicts block by block while it reads.
fn keydiff(cache: &KvCache, prefix: usize) -> Result<Tensor> {
    let context = cache.len() as i64 - prefix as i64;
    ensure!(context > 0, "a cache of {} positions holds no context after a prefix of {prefix}", cache.len());
    let layer = |layer: usize| {
        let k_hkd = cache.keys(layer).to_kind(Kind::Float);
        let lengths = |x: &Tensor| x.norm_scalaropt_dim(2, [-1], true).clamp_min(SHORTEST);
        let unit_hkd = &k_hkd / lengths(&k_hkd);
        let mean_h1d = unit_hkd.mean_dim([1].as_slice(), true, Kind::Float);
        let mean_h1d = &mean_h1d / lengths(&mean_h1d);
        let cosine_hk = unit_hkd.matmul(&mean_h1d.transpose(1, 2)).squeeze_dim(-1);
        -cosine_hk.narrow(1, prefix as i64, context)
    };
    Ok(Tensor::stack(&(0..cache.layers()).map(layer).collect::<Vec<_>>(), 0))
}
