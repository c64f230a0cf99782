//! Random positions and heads: the value of a ranking without information.
//!
//! Dimension key: t position.

use pkv_core::Rng;
use pkv_recipe::MethodName;
use rand::Rng as _;
use tch::{Device, Tensor};

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::RANDOM,
    meaning: "positions and heads at random",
    needs: Needs::NOTHING,
    #[cfg(test)]
    held_by: ("src/methods/random.rs", "fn numbers_are_spread_evenly"),
    start: |_| {
        Ready::scores(|view| {
            let mut rng = view.random(MethodName::RANDOM);
            Ok(random(view.heads(), view.positions(), &mut rng, view.device))
        })
        .start()
    },
};

/// Independent numbers in [0, 1), f32 `[heads, positions]`.
pub fn random(heads: i64, positions: i64, rng: &mut Rng, device: Device) -> Tensor {
    let numbers: Vec<f32> = (0..heads * positions).map(|_| rng.random::<f32>()).collect();
    Tensor::from_slice(&numbers).view([heads, positions]).to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;

    #[test]
    fn numbers_are_spread_evenly_and_another_stream_draws_others() {
        let of = |index| random(4, 5000, &mut Seed(1).stream("test", index), Device::Cpu);
        let (one, two) = (of(0), of(1));
        assert_eq!(one.size(), [4, 5000]);
        assert!(one.min().double_value(&[]) >= 0.0 && one.max().double_value(&[]) < 1.0);
        assert!((one.mean(tch::Kind::Float).double_value(&[]) - 0.5).abs() < 0.01);
        assert!(one == of(0) && one != two);
    }
}
