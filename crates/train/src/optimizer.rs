//! AdamW over named parameters, with decay on matrices only, and their moving average.

use anyhow::{Result, ensure};
use pkv_gpu::{AdamW, AdamWOptions, clip_global_norm};
use pkv_recipe::TrainSection;
use tch::Tensor;

/// Two groups of parameters, one of them decayed, and the moving average of all.
pub struct Optimizer {
    /// All parameters, in the order that they were given in.
    parameters: Vec<Tensor>,
    /// Places in `parameters` of the decayed ones, and of the others.
    groups: [(Vec<usize>, AdamW); 2],
    /// In the order of the parameters; empty if `train.ema` is 0.
    ema: Vec<Tensor>,
    section: TrainSection,
}

impl Optimizer {
    /// Moments of zero, an average that starts at the parameters.
    ///
    /// # Errors
    /// A parameter is not f32.
    pub fn new(parameters: &[(String, Tensor)], section: &TrainSection) -> Result<Self> {
        let parameters: Vec<Tensor> = parameters.iter().map(|(_, p)| p.shallow_clone()).collect();
        // Vectors and scalars are not decayed.
        let places = |decayed: bool| -> Vec<usize> {
            (0..parameters.len()).filter(|&i| (parameters[i].dim() >= 2) == decayed).collect()
        };
        let group = |decayed: bool| -> Result<(Vec<usize>, AdamW)> {
            let places = places(decayed);
            let mine = places.iter().map(|&i| parameters[i].shallow_clone()).collect();
            Ok((places, AdamW::new(mine)?))
        };
        let groups = [group(true)?, group(false)?];
        let ema = if section.ema > 0.0 { copies(&parameters) } else { Vec::new() };
        Ok(Self { parameters, groups, ema, section: section.clone() })
    }

    /// Forget the gradients of the last step.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn drop_gradients(&self) -> Result<()> {
        pkv_gpu::drop_gradients(&self.parameters)
    }

    /// Clip, step and average. Returns the gradient's norm before clipping, a scalar on the device.
    ///
    /// `step` counts from 0.
    ///
    /// # Errors
    /// libtorch refuses; gradients are there after any backward.
    pub fn step(&mut self, step: u64, lr: f64) -> Result<Tensor> {
        let norm = clip_global_norm(&self.parameters, self.section.clip_norm)?;
        let s = &self.section;
        for ((_, adamw), weight_decay) in self.groups.iter_mut().zip([s.weight_decay, 0.0]) {
            adamw.step(AdamWOptions { lr, beta1: s.beta1, beta2: s.beta2, eps: s.eps, weight_decay })?;
        }
        if !self.ema.is_empty() {
            // A long memory would hold on to the start: it grows with what there is to remember.
            let decay = self.section.ema.min((step + 1) as f64 / (step + 10) as f64);
            pkv_gpu::lerp(&self.ema, &self.parameters, 1.0 - decay)?;
        }
        Ok(norm)
    }

    /// First and second moments in the order of the parameters.
    pub fn moments(&self) -> (Vec<Tensor>, Vec<Tensor>) {
        let gather = |which: fn(&AdamW) -> &[Tensor]| {
            let mut out: Vec<Option<Tensor>> = self.parameters.iter().map(|_| None).collect();
            for (places, adamw) in &self.groups {
                for (&i, t) in places.iter().zip(which(adamw)) {
                    out[i] = Some(t.shallow_clone());
                }
            }
            out.into_iter().flatten().collect()
        };
        (gather(|a| a.moments().0), gather(|a| a.moments().1))
    }

    /// The moving average, in the order of the parameters; empty if there is none.
    pub fn ema(&self) -> &[Tensor] {
        &self.ema
    }

    /// Continue from saved moments and average after `steps` steps.
    ///
    /// # Errors
    /// Counts or shapes differ from the parameters'.
    pub fn restore(&mut self, first: &[Tensor], second: &[Tensor], ema: &[Tensor], steps: u64) -> Result<()> {
        let n = self.parameters.len();
        ensure!(
            first.len() == n && second.len() == n && ema.len() == self.ema.len(),
            "{} and {} moments and {} averages for {n} parameters",
            first.len(),
            second.len(),
            ema.len()
        );
        let _no_grad = tch::no_grad_guard();
        for (places, adamw) in &mut self.groups {
            let pick = |all: &[Tensor]| places.iter().map(|&i| all[i].shallow_clone()).collect::<Vec<_>>();
            adamw.restore(&pick(first), &pick(second), steps)?;
        }
        for (mine, saved) in self.ema.iter_mut().zip(ema) {
            mine.copy_(saved);
        }
        Ok(())
    }
}

fn copies(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(|t| t.detach().copy()).collect()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Without gradients only the decay moves anything.
    #[test]
    fn matrices_are_decayed_and_vectors_and_scalars_are_not() {
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let named = |shape: &[i64]| {
            (format!("{shape:?}"), Tensor::ones(shape, (Kind::Float, device)).set_requires_grad(true))
        };
        let parameters = [named(&[3]), named(&[2, 3]), named(&[]), named(&[2, 2, 2])];
        let section = TrainSection { weight_decay: 0.5, ..TrainSection::default() };
        let mut optimizer = Optimizer::new(&parameters, &section).unwrap();
        for (_, x) in &parameters {
            (x.sum(Kind::Float) * 0.0).backward();
        }
        let _norm = optimizer.step(0, 0.1).unwrap();
        let most = |x: &Tensor| x.max().to_device(Device::Cpu).double_value(&[]);
        let found: Vec<f64> = parameters.iter().map(|(_, x)| most(x)).collect();
        for (found, expected) in found.iter().zip([1.0, 0.95, 1.0, 0.95]) {
            assert!((found - expected).abs() < 1e-6, "{found} for {expected}");
        }
    }
}
