//! StreamingLLM: the first and the most recent positions.
//!
//! Dimension key: t position.

use pkv_recipe::MethodName;
use tch::{Device, Kind, Tensor};

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::of("streaming-llm"),
    meaning: "the first and the most recent positions",
    needs: Needs::NOTHING,
    #[cfg(test)]
    held_by: ("src/methods/streaming_llm.rs", "fn sinks_and_the_most_recent_positions_are_kept"),
    start: |_| Ready::scores(|view| Ok(streaming_llm(view.heads(), view.positions(), view.device))).start(),
};

/// First positions that are kept.
const SINKS: i64 = 4;

/// First 4 positions, then the most recent ones; f32 `[heads, positions]`, the same in every head.
///
/// # Source
/// StreamingLLM, arXiv 2309.17453: four attention sinks and a window of recent tokens.
fn streaming_llm(heads: i64, positions: i64, device: Device) -> Tensor {
    let recency = Tensor::arange(positions, (Kind::Float, device));
    let sinks = SINKS.min(positions);
    let first = Tensor::arange(sinks, (Kind::Float, device)).neg() + 2.0 * positions as f64;
    let scores_t = Tensor::cat(&[first, recency.narrow(0, sinks, positions - sinks)], 0);
    scores_t.expand([heads, positions], false).contiguous()
}

#[cfg(test)]
mod tests {
    use super::super::tests::kept;
    use super::*;

    #[test]
    fn sinks_and_the_most_recent_positions_are_kept() {
        let scores = streaming_llm(2, 20, Device::Cpu);
        assert_eq!(kept(&scores, 0.3), [[0, 1, 2, 3, 18, 19], [0, 1, 2, 3, 18, 19]]);
        assert_eq!(kept(&streaming_llm(1, 3, Device::Cpu), 0.34), [[0]]);
    }
}
