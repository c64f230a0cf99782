//! Knorm: keys with a small norm are kept.
//!
//! Dimension key: h KV head, k cached position (prefix and context), d head_dim, t context position.

use anyhow::{Result, ensure};
use pkv_recipe::MethodName;
use tch::{Kind, Tensor};

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::of("knorm"),
    meaning: "minus the L2 norm of a key: attention goes to small keys; uses no attention itself",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: ("tests/goldens/make_goldens.py", "\"knorm\""),
    start: |_| {
        Ready::scores(|view| {
            let (cache, prefix) = view.prefilled()?;
            let layers = (0..cache.layers()).map(|layer| scores(&cache.keys(layer), prefix));
            Ok(cache.placement().stack(&layers.collect::<Result<Vec<_>>>()?))
        })
        .start()
    },
};

/// Scores of one layer.
///
/// # Shapes
/// - `k_hkd`: `[KV heads, positions, head_dim]`: the chat template's prefix (`prefix` positions) and then the
///   context
/// - returns `[KV heads, context positions]`, f32, at most 0
///
/// # Errors
/// There is no context.
///
/// # Source
/// A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430);
/// `presses/knorm_press.py` in NVIDIA/kvpress 0.5.5, which prunes all layers, as here. Differs: the paper
/// leaves the first two layers whole.
fn scores(k_hkd: &Tensor, prefix: usize) -> Result<Tensor> {
    let (positions, prefix) = (k_hkd.size3()?.1, prefix as i64);
    ensure!(
        positions > prefix,
        "a cache of {positions} positions holds no context after a prefix of {prefix}"
    );
    let k_htd = k_hkd.narrow(1, prefix, positions - prefix).to_kind(Kind::Float);
    Ok(-k_htd.norm_scalaropt_dim(2.0, [-1i64], false))
}

#[cfg(test)]
mod tests {
    use pkv_core::Seed;
    use pkv_test_support::loops::difference;
    use pkv_test_support::tensors::flat;
    use rand::Rng;

    use super::*;

    #[test]
    fn scores_are_the_norms_of_loops_in_f64() {
        let (heads, positions, head_dim, prefix) = (2, 9, 6, 2);
        let mut rng = Seed(1).stream("knorm", 0);
        let k: Vec<f32> = (0..heads * positions * head_dim).map(|_| rng.random_range(-2.0..2.0)).collect();
        let k_hkd = Tensor::from_slice(&k).view([heads as i64, positions as i64, head_dim as i64]);
        let mut expected = Vec::new();
        for h in 0..heads {
            for t in prefix..positions {
                let key = &k[(h * positions + t) * head_dim..][..head_dim];
                expected.push(-key.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt());
            }
        }
        assert!(difference(&flat(&scores(&k_hkd, prefix).unwrap()), &expected) < 1e-5);
        assert!(scores(&k_hkd, positions).is_err(), "there is no context");
    }
}
