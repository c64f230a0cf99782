//! Baselines that look at positions and heads, not at attention: random, StreamingLLM, head prior.
//!
//! Dimension key: o target KV head, t position.

use pkv_core::Rng;
use rand::Rng as _;
use tch::{Device, Kind, Tensor};

/// First positions that StreamingLLM keeps.
const SINKS: i64 = 4;

/// Positions at random: independent numbers in [0, 1), f32 `[heads, positions]`.
pub fn random(heads: i64, positions: i64, rng: &mut Rng, device: Device) -> Tensor {
    let numbers: Vec<f32> = (0..heads * positions).map(|_| rng.random::<f32>()).collect();
    Tensor::from_slice(&numbers).view([heads, positions]).to_device(device)
}

/// First 4 positions, then the most recent ones; f32 `[heads, positions]`, the same in every head.
///
/// # Source
/// StreamingLLM, arXiv 2309.17453: four attention sinks and a window of recent tokens.
pub fn streaming_llm(heads: i64, positions: i64, device: Device) -> Tensor {
    let recency = Tensor::arange(positions, (Kind::Float, device));
    let sinks = SINKS.min(positions);
    let first = Tensor::arange(sinks, (Kind::Float, device)).neg() + 2.0 * positions as f64;
    let scores_t = Tensor::cat(&[first, recency.narrow(0, sinks, positions - sinks)], 0);
    scores_t.expand([heads, positions], false).contiguous()
}

/// Stronger heads before weaker ones, positions of a head at random; f32 `[heads, positions]`.
///
/// Heads are ordered by `mean_o`, f32 `[heads]`, their mean training label. The floor that a claim
/// must clear: it knows nothing of the context.
pub fn head_prior(mean_o: &Tensor, positions: i64, rng: &mut Rng) -> Tensor {
    let heads = mean_o.size()[0];
    let place_o = mean_o.argsort(0, false).argsort(0, false).to_kind(Kind::Float);
    // Half the distance between two heads, so that rounding cannot mix them up.
    place_o.unsqueeze(1) + random(heads, positions, rng, mean_o.device()) * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::{Policy, RetentionRatio, Seed};
    use pkv_prune::keep_mask;

    fn kept(scores: &Tensor, ratio: f64) -> Vec<Vec<i64>> {
        let mask = keep_mask(scores, Policy::Pair, RetentionRatio::new(ratio).unwrap());
        (0..scores.size()[0])
            .map(|o| Vec::<i64>::try_from(mask.get(o).nonzero().flatten(0, -1)).unwrap())
            .collect()
    }

    #[test]
    fn streaming_llm_keeps_sinks_and_the_most_recent() {
        let scores = streaming_llm(2, 20, Device::Cpu);
        assert_eq!(kept(&scores, 0.3), [[0, 1, 2, 3, 18, 19], [0, 1, 2, 3, 18, 19]]);
        assert_eq!(kept(&streaming_llm(1, 3, Device::Cpu), 0.34), [[0]]);
    }

    #[test]
    fn the_head_prior_fills_the_strongest_heads_first() {
        let mean = Tensor::from_slice(&[0.1f32, 3.0, -2.0]);
        let of = |index| head_prior(&mean, 10, &mut Seed(1).stream("test", index));
        // 15 of 30 pairs: all of head 1, five of head 0.
        let sets = kept(&of(0), 0.5);
        assert_eq!((sets[0].len(), sets[1].len(), sets[2].len()), (5, 10, 0));
        assert_ne!(kept(&of(1), 0.5)[0], sets[0], "another context draws other positions");
        assert_eq!(kept(&of(0), 0.5), sets);
    }
}
