//! Mean losses between two log lines, without waiting for the device.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::loss::LossTerms;

/// Sums of loss, terms and gradient norm since the last log line.
///
/// Part of the training state: a run that continues between two lines logs the same mean.
#[derive(Debug)]
pub struct Window {
    names: Vec<String>,
    /// Total, terms, gradient norm; f64 on the device; empty before the first step.
    sums: Option<Tensor>,
    steps: u64,
    /// The first step whose loss or gradient was not finite, on the device; minus one if there is none.
    broken: Option<Tensor>,
}

/// Means of a window.
#[derive(Clone, Debug, PartialEq)]
pub struct Means {
    pub loss: f64,
    pub terms: Vec<(String, f64)>,
    pub gradient_norm: f64,
}

impl Window {
    pub fn new() -> Self {
        Self { names: Vec::new(), sums: None, steps: 0, broken: None }
    }

    /// Add step `step`; scalars on the device.
    pub fn add(&mut self, step: u64, loss: &LossTerms, norm: &Tensor) {
        if self.names.is_empty() {
            self.names = loss.terms.iter().map(|(name, _)| (*name).to_owned()).collect();
        }
        let mut all = vec![loss.total.detach()];
        all.extend(loss.terms.iter().map(|(_, t)| t.detach()));
        all.push(norm.detach());
        let now = Tensor::stack(&all, 0).to_kind(Kind::Double);
        let before = self.broken.take().unwrap_or_else(|| Tensor::full_like(&now.get(0), -1.0));
        let is_first = now.isfinite().all().logical_not().logical_and(&before.lt(0.0));
        self.broken = Some(Tensor::full_like(&before, step as f64).where_self(&is_first, &before));
        self.sums = Some(match self.sums.take() {
            Some(sums) => sums + now,
            None => now,
        });
        self.steps += 1;
    }

    /// The first step added whose loss or gradient was not finite. Waits for the device.
    ///
    /// # Errors
    /// The device fails.
    pub fn broken(&self) -> Result<Option<u64>> {
        let Some(step) = &self.broken else { return Ok(None) };
        let step = f64::try_from(step.to_device(Device::Cpu)).context("cannot read the loss")?;
        Ok((step >= 0.0).then_some(step as u64))
    }

    /// The means, and a new window. Waits for the device.
    ///
    /// # Errors
    /// No step was added.
    pub fn take(&mut self) -> Result<Means> {
        let values = self.values()?;
        ensure!(self.steps > 0 && values.len() >= 2, "no step since the last log line");
        let n = self.steps as f64;
        let terms = self.names.iter().zip(&values[1..]).map(|(name, x)| (name.clone(), x / n)).collect();
        let means = Means { loss: values[0] / n, terms, gradient_norm: values[values.len() - 1] / n };
        *self = Self { names: std::mem::take(&mut self.names), ..Self::new() };
        Ok(means)
    }

    /// For a checkpoint: bit patterns, since decimal numbers are not read back bit for bit.
    ///
    /// # Errors
    /// The device fails.
    pub fn save(&self) -> Result<Value> {
        let bits: Vec<u64> = self.values()?.into_iter().map(f64::to_bits).collect();
        Ok(json!({"steps": self.steps, "names": self.names, "sums_bits": bits}))
    }

    /// # Errors
    /// `saved` is not what [`Window::save`] gives.
    pub fn restore(saved: &Value, device: Device) -> Result<Self> {
        let get = |key: &str| saved.get(key).cloned().with_context(|| format!("`{key}` is missing"));
        let bits: Vec<u64> = serde_json::from_value(get("sums_bits")?)?;
        let values: Vec<f64> = bits.into_iter().map(f64::from_bits).collect();
        let sums = (!values.is_empty()).then(|| Tensor::from_slice(&values).to_device(device));
        Ok(Self {
            names: serde_json::from_value(get("names")?)?,
            sums,
            steps: serde_json::from_value(get("steps")?)?,
            // No broken step is saved.
            broken: None,
        })
    }

    fn values(&self) -> Result<Vec<f64>> {
        let Some(sums) = &self.sums else { return Ok(Vec::new()) };
        Vec::try_from(sums.to_device(Device::Cpu)).context("cannot read the loss")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(x: f32) -> LossTerms {
        LossTerms { total: Tensor::from(x), terms: vec![("binary", Tensor::from(x / 3.0))] }
    }

    #[test]
    fn the_first_step_that_is_not_finite_is_known() {
        pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        for (loss, norm) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::INFINITY)] {
            let mut window = Window::new();
            let mut add = |step, loss, norm| {
                window.add(step, &terms(loss), &Tensor::from(norm));
                window.broken().unwrap()
            };
            assert_eq!((add(0, 1.0, 1.0), add(1, f32::MAX, f32::MAX)), (None, None));
            assert_eq!(
                (add(2, loss, norm), add(3, f32::NAN, 1.0), add(4, 1.0, 1.0)),
                (Some(2), Some(2), Some(2))
            );
        }
        assert_eq!(Window::new().broken().unwrap(), None);
    }

    #[test]
    fn a_window_saved_in_the_middle_has_the_same_mean() {
        pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let add = |w: &mut Window, x: f32| w.add(0, &terms(x), &Tensor::from(x * 0.7));
        let (mut whole, mut first) = (Window::new(), Window::new());
        for x in [0.1, 0.9, 2.3] {
            add(&mut whole, x);
        }
        add(&mut first, 0.1);
        let text = serde_json::to_string(&first.save().unwrap()).unwrap();
        let mut second = Window::restore(&serde_json::from_str(&text).unwrap(), Device::Cpu).unwrap();
        add(&mut second, 0.9);
        add(&mut second, 2.3);
        let means = whole.take().unwrap();
        assert_eq!(second.take().unwrap(), means);
        assert!((means.loss - 1.1).abs() < 1e-6 && (means.terms[0].1 - 1.1 / 3.0).abs() < 1e-6);
        assert!(whole.take().is_err(), "a new window begins");
        assert_eq!(Window::restore(&whole.save().unwrap(), Device::Cpu).unwrap().steps, 0);
    }
}
