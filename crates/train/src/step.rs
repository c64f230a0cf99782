//! One training step: queues work on the device and never waits for it.

use std::collections::VecDeque;

use anyhow::Result;
use pkv_core::Seed;
use pkv_gpu::{Event, MathMode};
use pkv_mapper::{ForwardOptions, MapperDims};
use pkv_recipe::{TrainDtype, TrainSection};
use tch::{Device, Kind, Tensor};

use crate::learner::Learner;
use crate::loader::Loaded;
use crate::loss::LossTerms;
use crate::optimizer::Optimizer;

/// Steps that the host may be ahead of the device: enough that the device never waits, few enough
/// that the batches it still needs stay few, and that a step's time is the device's.
const AHEAD: usize = 2;

/// Computes the steps of a run.
pub struct Stepper {
    seed: Seed,
    device: Device,
    options: ForwardOptions,
    queued: VecDeque<Event>,
}

impl Stepper {
    pub fn new(train: &TrainSection, dims: MapperDims, seed: Seed, device: Device) -> Self {
        let kind = match number_format(train.dtype, dims, device) {
            TrainDtype::Bf16 => Kind::BFloat16,
            _ => Kind::Float,
        };
        let options = ForwardOptions {
            kind,
            noise: train.feature_noise,
            drop_rows: train.feature_dropout,
            dropout: train.dropout,
        };
        Self { seed, device, options, queued: VecDeque::new() }
    }

    /// Queue step `step` (from 0) at learning rate `lr`. Returns the loss and the gradient's norm, scalars on
    /// the device.
    ///
    /// # Errors
    /// libtorch refuses, or a kernel queued before failed.
    pub fn step(
        &mut self,
        learner: &Learner,
        optimizer: &mut Optimizer,
        batch: &Loaded,
        step: u64,
        lr: f64,
    ) -> Result<(LossTerms, Tensor)> {
        if self.options.is_random() {
            // A step's randomness is its own, so that a run continues anywhere.
            tch::manual_seed(self.seed.derive("train.noise", step) as i64);
        }
        optimizer.drop_gradients()?;
        // A model may make features beside.
        let alone = MathMode::as_set(self.device);
        let scores_bot =
            learner.mapper.forward_training(&batch.heads_bpct, &batch.globals_bct, &self.options);
        let loss = learner.loss.of_pairs(&scores_bot, &batch.y_bot, batch.pairs_2bq.as_ref())?;
        loss.total.backward();
        drop(alone);
        let norm = optimizer.step(step, lr)?;
        if self.device.is_cuda() {
            self.queued.push_back(Event::now(self.device)?);
            if self.queued.len() > AHEAD {
                self.queued.pop_front().map_or(Ok(()), |event| event.synchronize())?;
            }
        }
        Ok((loss, norm))
    }
}

/// The number format that `auto` resolves to.
pub fn number_format(asked: TrainDtype, dims: MapperDims, device: Device) -> TrainDtype {
    match asked {
        TrainDtype::Auto if !device.is_cuda() => TrainDtype::F32,
        TrainDtype::Auto if dims.is_large() => TrainDtype::Bf16,
        TrainDtype::Auto => TrainDtype::Tf32,
        asked => asked,
    }
}

/// TF32 in matrix products for as long as it lives; without effect on a CPU. Process-wide: training
/// has the device for itself.
pub struct Tf32;

impl Tf32 {
    /// # Errors
    /// libtorch refuses.
    pub fn set(format: TrainDtype) -> Result<Self> {
        // Where the stages are bf16, the little that is left in f32 must not be what takes the time.
        pkv_gpu::set_tf32(matches!(format, TrainDtype::Tf32 | TrainDtype::Bf16))?;
        Ok(Self)
    }
}

impl Drop for Tf32 {
    fn drop(&mut self) {
        // It cannot fail: it sets two flags.
        let _ = pkv_gpu::set_tf32(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_mappers_are_bf16_on_a_gpu_alone() {
        let dims = |proxy_heads, outputs| MapperDims { proxy_heads, channels: 8, globals: 4, outputs };
        let auto = |dims, device| number_format(TrainDtype::Auto, dims, device);
        assert_eq!(auto(dims(128, 256), Device::Cpu), TrainDtype::F32);
        assert_eq!(auto(dims(128, 256), Device::Cuda(0)), TrainDtype::Bf16);
        assert_eq!(auto(dims(12, 36), Device::Cuda(0)), TrainDtype::Tf32);
        assert_eq!(number_format(TrainDtype::F32, dims(128, 256), Device::Cuda(0)), TrainDtype::F32);
    }
}
