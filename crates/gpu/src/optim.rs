//! AdamW over all parameters in one fused call, and gradient clipping without a host sync.
//!
//! tch's own AdamW is a loop over parameters with no way to save its moments; here the moments
//! are plain tensors that a checkpoint can hold.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::shim::{self, Raw};

/// Numbers of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decoupled; multiplied by `lr`.
    pub weight_decay: f64,
}

/// Parameters that share their options, with their moments.
pub struct AdamW {
    params: Vec<Tensor>,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
    /// Steps taken, one f32 per parameter on the parameters' device, as the fused kernel wants them.
    steps: Tensor,
    /// Views of `steps`, scalars.
    step_views: Vec<Tensor>,
}

impl AdamW {
    /// Moments of zero for `params` (f32, any shapes, one device; views, not copies, are kept).
    ///
    /// # Errors
    /// A parameter is not f32.
    pub fn new(params: Vec<Tensor>) -> Result<Self> {
        for p in &params {
            ensure!(p.kind() == Kind::Float, "AdamW keeps f32 parameters, found {:?}", p.kind());
        }
        let zeros = |p: &Tensor| p.detach().zeros_like();
        let m = params.iter().map(zeros).collect();
        let v = params.iter().map(zeros).collect();
        let device = params.first().map_or(Device::Cpu, Tensor::device);
        // One tensor, so that counting on is one kernel and not one per parameter.
        let steps = Tensor::zeros([params.len() as i64], (Kind::Float, device));
        let step_views = steps.unbind(0);
        Ok(Self { params, m, v, steps, step_views })
    }

    /// First and second moments, in the order of the parameters.
    pub fn moments(&self) -> (&[Tensor], &[Tensor]) {
        (&self.m, &self.v)
    }

    /// Continue from saved moments after `steps` steps.
    ///
    /// # Errors
    /// Counts or shapes differ from the parameters'.
    pub fn restore(&mut self, m: &[Tensor], v: &[Tensor], steps: u64) -> Result<()> {
        ensure!(
            m.len() == self.m.len() && v.len() == self.v.len(),
            "{} moments for {} parameters",
            m.len(),
            self.m.len()
        );
        for (mine, saved) in self.m.iter_mut().chain(&mut self.v).zip(m.iter().chain(v)) {
            ensure!(
                mine.size() == saved.size(),
                "a moment has shape {:?}, its parameter {:?}",
                saved.size(),
                mine.size()
            );
            mine.copy_(saved);
        }
        let _ = self.steps.fill_(steps as f64);
        Ok(())
    }

    /// One step along the parameters' gradients, in place; parameters without a gradient are an error.
    ///
    /// # Errors
    /// A gradient is missing, or libtorch refuses.
    pub fn step(&mut self, o: AdamWOptions) -> Result<()> {
        if self.params.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let grads = gradients(&self.params)?;
        let _ = self.steps.g_add_scalar_(1);
        let (mut p, mut g) = (pointers(&self.params), pointers(&grads));
        let (mut m, mut v, mut s) = (pointers(&self.m), pointers(&self.v), pointers(&self.step_views));
        // SAFETY: five arrays of `params.len()` tensors that live beyond the call.
        shim::check(unsafe {
            shim::pkv_fused_adamw(
                p.len(),
                p.as_mut_ptr(),
                g.as_mut_ptr(),
                m.as_mut_ptr(),
                v.as_mut_ptr(),
                s.as_mut_ptr(),
                o.lr,
                o.beta1,
                o.beta2,
                o.weight_decay,
                o.eps,
            )
        })
        .context("AdamW step")
    }
}

/// Scale the gradients of `params` down to a joint 2-norm of at most `max`; no host sync.
///
/// Returns the norm before scaling, an f32 scalar on the parameters' device.
///
/// # Errors
/// A gradient is missing.
pub fn clip_global_norm(params: &[Tensor], max: f64) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let grads = gradients(params)?;
    let mut g = pointers(&grads);
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: an array of `grads.len()` tensors; `out` receives a tensor that we own.
    shim::check(unsafe { shim::pkv_global_norm(g.len(), g.as_mut_ptr(), &mut out) })
        .context("gradient norm")?;
    // SAFETY: the shim returned 0, so `out` is a tensor on the heap that only this code frees.
    let norm = unsafe { Tensor::from_ptr(out) };
    let by = (max / (&norm + 1e-6)).clamp_max(1.0);
    // SAFETY: as above; `by` is a scalar tensor on the same device.
    shim::check(unsafe { shim::pkv_scale(g.len(), g.as_mut_ptr(), by.as_ptr().cast_mut()) })
        .context("gradient clipping")?;
    Ok(norm)
}

/// Forget the gradients of `params`: the next backward hands its own over instead of adding to zeros.
///
/// # Errors
/// libtorch refuses.
pub fn drop_gradients(params: &[Tensor]) -> Result<()> {
    let mut p = pointers(params);
    // SAFETY: an array of `params.len()` tensors.
    shim::check(unsafe { shim::pkv_drop_grads(p.len(), p.as_mut_ptr()) }).context("dropping gradients")
}

/// `means[i] += weight (values[i] - means[i])`, in place, all tensors in a few kernels; no gradient.
///
/// # Errors
/// Counts or shapes differ.
pub fn lerp(means: &[Tensor], values: &[Tensor], weight: f64) -> Result<()> {
    ensure!(means.len() == values.len(), "{} means of {} values", means.len(), values.len());
    if means.is_empty() {
        return Ok(());
    }
    let _guard = tch::no_grad_guard();
    let (mut m, mut x) = (pointers(means), pointers(values));
    // SAFETY: two arrays of `means.len()` tensors.
    shim::check(unsafe { shim::pkv_lerp(m.len(), m.as_mut_ptr(), x.as_mut_ptr(), weight) })
        .context("moving average")
}

fn gradients(params: &[Tensor]) -> Result<Vec<Tensor>> {
    params
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let g = p.grad();
            ensure!(g.defined(), "parameter {i} of shape {:?} has no gradient", p.size());
            Ok(g)
        })
        .collect()
}

fn pointers(tensors: &[Tensor]) -> Vec<Raw> {
    tensors.iter().map(|t| t.as_ptr().cast_mut()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AdamW in f64, from the paper's algorithm 2.
    #[test]
    fn five_steps_equal_the_paper_in_f64() {
        let o = AdamWOptions { lr: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.02 };
        let start: Vec<f64> = (0..7).map(|i| f64::from(i) * 0.3 - 1.0).collect();
        let w = Tensor::from_slice(&start).to_kind(Kind::Float).set_requires_grad(true);
        let mut opt = AdamW::new(vec![w.shallow_clone()]).unwrap();
        let (mut x, mut m, mut v) = (start, [0.0; 7], [0.0; 7]);
        for t in 1..=5 {
            let mut w = w.shallow_clone();
            w.zero_grad();
            w.pow_tensor_scalar(3).sum(Kind::Float).backward();
            opt.step(o).unwrap();
            for i in 0..7 {
                let g = 3.0 * x[i] * x[i];
                m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * g;
                v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * g * g;
                let (mh, vh) = (m[i] / (1.0 - o.beta1.powi(t)), v[i] / (1.0 - o.beta2.powi(t)));
                x[i] -= o.lr * (mh / (vh.sqrt() + o.eps) + o.weight_decay * x[i]);
            }
        }
        for (i, x) in x.iter().enumerate() {
            let got = w.double_value(&[i as i64]);
            assert!((got - x).abs() < 1e-5, "parameter {i}: {got}, expected {x}");
        }
    }

    #[test]
    fn averages_move_and_dropped_gradients_are_gone() {
        let of = |x: f32| vec![Tensor::from_slice(&[x, -x]), Tensor::from_slice(&[2.0 * x])];
        let means = of(1.0);
        lerp(&means, &of(5.0), 0.25).unwrap();
        assert_eq!(Vec::<f32>::try_from(&means[0]).unwrap(), [2.0, -2.0]);
        assert_eq!(Vec::<f32>::try_from(&means[1]).unwrap(), [4.0]);
        assert!(lerp(&means, &[], 0.5).is_err());

        let w = Tensor::from_slice(&[3.0f32, 4.0]).set_requires_grad(true);
        for _ in 0..2 {
            drop_gradients(&[w.shallow_clone()]).unwrap();
            assert!(!w.grad().defined());
            w.square().sum(Kind::Float).backward();
            assert_eq!(Vec::<f32>::try_from(w.grad()).unwrap(), [6.0, 8.0]);
        }
    }

    #[test]
    fn clipping_scales_to_the_norm_and_leaves_short_gradients() {
        let w = Tensor::from_slice(&[3.0f32, 4.0]).set_requires_grad(true);
        (&w * Tensor::from_slice(&[3.0f32, 4.0])).sum(Kind::Float).backward();
        let norm = clip_global_norm(&[w.shallow_clone()], 1.0).unwrap();
        assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
        assert!((w.grad().norm().double_value(&[]) - 1.0).abs() < 1e-5);
        let before = clip_global_norm(&[w.shallow_clone()], 10.0).unwrap();
        assert!((before.double_value(&[]) - 1.0).abs() < 1e-5);
        assert!((w.grad().norm().double_value(&[]) - 1.0).abs() < 1e-5);
        let lonely = Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!(clip_global_norm(&[lonely], 1.0).is_err());
    }
}
