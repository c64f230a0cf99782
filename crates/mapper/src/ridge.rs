//! The best linear mapper, in closed form.
//!
//! Where training starts, and a baseline by itself. Sums run in f64 over all positions added, so
//! memory does not grow with their number.

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use tch::{Device, Kind, Tensor};

use crate::standardize::{MapperDims, Standardization, flat};

/// Normal equations of the regression from standardized features to standardized log-odds.
pub struct RidgeAccumulator {
    dims: MapperDims,
    stats: Standardization,
    /// Positions added.
    n: f64,
    x_f: Tensor,
    y_o: Tensor,
    xx_ff: Tensor,
    xy_fo: Tensor,
}

impl RidgeAccumulator {
    /// Sums of zero, kept and computed on `device`.
    ///
    /// # Errors
    /// `stats` of another shape than `dims`.
    pub fn new(dims: MapperDims, stats: &Standardization, device: Device) -> Result<Self> {
        stats.check(&dims).context("the ridge regression's standardization")?;
        let (f, o) = (dims.flat() as i64, dims.outputs as i64);
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, device));
        Ok(Self {
            dims,
            stats: stats.to_device(device),
            n: 0.0,
            x_f: zeros(&[f]),
            y_o: zeros(&[o]),
            xx_ff: zeros(&[f, f]),
            xy_fo: zeros(&[f, o]),
        })
    }

    /// Add the positions of some contexts.
    ///
    /// # Shapes
    /// - `heads_bpct`, `globals_bct`: raw features, as [`crate::Mapper::forward`]
    /// - `y_bot`: `[b, outputs, t]`, log-odds, not standardized
    ///
    /// # Errors
    /// Other shapes.
    pub fn add(&mut self, heads_bpct: &Tensor, globals_bct: &Tensor, y_bot: &Tensor) -> Result<()> {
        self.dims.check_features(heads_bpct, globals_bct)?;
        self.dims.check_labels(heads_bpct, y_bot)?;
        let _guard = tch::no_grad_guard();
        // One context at a time bounds the f64 copies.
        for i in 0..heads_bpct.size()[0] {
            let one = |x: &Tensor| x.narrow(0, i, 1);
            let (heads, globals) = self.stats.features(&one(heads_bpct), &one(globals_bct));
            let x_tf = flat(&heads, &globals).squeeze_dim(0).to_kind(Kind::Double);
            let y_ot = self.stats.standardize_labels(&one(y_bot).to_device(self.x_f.device()));
            let y_to = y_ot.squeeze_dim(0).transpose(0, 1).to_kind(Kind::Double);
            let x_ft = x_tf.transpose(0, 1);
            self.n += x_tf.size()[0] as f64;
            self.x_f += x_tf.sum_dim_intlist(0, false, None);
            self.y_o += y_to.sum_dim_intlist(0, false, None);
            self.xx_ff += x_ft.matmul(&x_tf);
            self.xy_fo += x_ft.matmul(&y_to);
        }
        Ok(())
    }

    /// Weight `[outputs, flat inputs]` and bias `[outputs]`, f64 on the CPU, for
    /// [`crate::Mapper::set_linear`].
    ///
    /// The penalty is `ridge` times the mean diagonal of the centred normal matrix, so that it means
    /// the same for any number of positions; the bias is free of it.
    ///
    /// # Errors
    /// Nothing was added, or the matrix is not positive definite: a feature or label is not finite,
    /// or `ridge` is 0 and a channel constant.
    pub fn solve(&self, ridge: f64) -> Result<(Tensor, Tensor)> {
        ensure!(self.n > 0.0, "no position to solve a ridge regression on");
        let cpu = |x: &Tensor| x.to_device(Device::Cpu);
        let (x_f, y_o) = (cpu(&self.x_f) / self.n, cpu(&self.y_o) / self.n);
        let xx_ff = cpu(&self.xx_ff) - x_f.outer(&x_f) * self.n;
        let xy_fo = cpu(&self.xy_fo) - x_f.outer(&y_o) * self.n;
        let f = self.dims.flat() as i64;
        let penalty = xx_ff.diagonal(0, 0, 1).mean(Kind::Double) * ridge;
        let eye = Tensor::eye(f, (Kind::Double, Device::Cpu));
        let factor = (xx_ff + eye * penalty).f_linalg_cholesky(false).with_context(|| {
            hinted(
                "the ridge regression's normal matrix is not positive definite",
                "raise `mapper.ridge`; if that does not help, a feature or label is not finite: `--redo extract`",
            )
        })?;
        let weight_fo = xy_fo.cholesky_solve(&factor, false);
        let bias_o = y_o - x_f.unsqueeze(0).matmul(&weight_fo).squeeze_dim(0);
        let finite = weight_fo.isfinite().all().int64_value(&[]) == 1;
        ensure!(finite, "the ridge solution is not finite");
        Ok((weight_fo.transpose(0, 1).contiguous(), bias_o))
    }
}
