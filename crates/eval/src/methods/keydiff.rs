//! KeyDiff: keys that differ from the others are kept.
//!
//! The formula is `extract`'s, which has it as a channel.

use anyhow::Result;
use pkv_extract::key_diff;
use pkv_lm::KvCache;
use pkv_recipe::MethodName;
use tch::Tensor;

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::of("keydiff"),
    label: "KeyDiff",
    meaning: "how dissimilar a key is to the mean key of its head; uses no attention",
    needs: Needs::PREFILL,
    start: |_| {
        Ready::scores(|view| {
            let (cache, prefix) = view.prefilled()?;
            keydiff(cache, prefix)
        })
        .start()
    },
};

/// The score of every layer: [`key_diff`], which is also the channel of that name.
///
/// # Shapes
/// - `cache`: the chat template's prefix (`prefix` positions) and then the context, nothing else
/// - returns `[layers, KV heads, context positions]`, f32 in [-1, 1]
///
/// # Errors
/// The cache holds no context.
fn keydiff(cache: &KvCache, prefix: usize) -> Result<Tensor> {
    let layers = (0..cache.layers()).map(|layer| key_diff(&cache.keys(layer), prefix));
    Ok(Tensor::stack(&layers.collect::<Result<Vec<_>>>()?, 0))
}
