//! KeyDiff's score: how dissimilar a key is to the mean key of its head. Also the baseline `keydiff` of
//! `eval` and a part of the policy `pair-keydiff`.
//!
//! Dimension key: h KV head, k cached position (prefix and context), d head_dim, t context position.

use anyhow::{Result, ensure};
use pkv_core::Channel;
use pkv_gpu::mean_cosines;
use pkv_lm::KvCache;
use tch::Tensor;

use super::{Compute, Entry};

pub(super) const ENTRIES: &[Entry] = &[Entry { channel: Channel::KeyDiff, compute: Compute::Keys(key_diff) }];

/// Minus the cosine between each key and the mean of its head's normalized keys, in one layer.
///
/// # Shapes
/// - `k_hkd`: `[KV heads, positions, head_dim]`: the chat template's prefix (`prefix` positions) and then the
///   context
/// - returns `[KV heads, context positions]`, f32 in [-1, 1]
///
/// # Errors
/// There is no context, or the driver refuses.
///
/// # Source
/// KeyDiff (arXiv 2504.15364); `presses/keydiff_press.py` in NVIDIA/kvpress 0.5.5, which scores the whole
/// prompt at once, as here. Differs: cosines in f32 whatever the cache's kind; the paper evicts block by
/// block while it reads.
pub fn key_diff(k_hkd: &Tensor, prefix: usize) -> Result<Tensor> {
    let positions = k_hkd.size3()?.1;
    let context = positions - prefix as i64;
    ensure!(context > 0, "a cache of {positions} positions holds no context after a prefix of {prefix}");
    let _no_grad = tch::no_grad_guard();
    Ok(-mean_cosines(k_hkd)?.narrow(1, prefix as i64, context))
}

/// [`key_diff`] of all layers of a cache.
///
/// # Shapes
/// - `cache`: the chat template's prefix (`prefix` positions) and then the context, nothing else
/// - returns `[layers, KV heads, context positions]`, f32 in [-1, 1], on the cache's device, home of a split
///   one
///
/// # Errors
/// The cache holds no context.
pub fn key_diff_of(cache: &KvCache, prefix: usize) -> Result<Tensor> {
    let layers = (0..cache.layers()).map(|layer| key_diff(&cache.keys(layer), prefix));
    Ok(cache.placement().stack(&layers.collect::<Result<Vec<_>>>()?))
}
