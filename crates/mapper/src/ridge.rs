//! The best linear mapper, in closed form.
//!
//! Where training starts, and a baseline by itself. Sums run in f64 over all positions added, so
//! memory does not grow with their number.

use anyhow::{Context as _, Result, ensure};
use pkv_core::hinted;
use tch::{Device, Kind, Tensor};

use crate::standardize::{MapperDims, Standardization, flat};

/// Variance of a standardized feature below which it is constant; rounding leaves up to some 1e-13.
const LEAST_VARIANCE: f64 = 1e-6;

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
    /// the same for any number of positions; the bias is free of it. Constant channels get weights of 0, all
    /// of them as well: a diagonal below `LEAST_VARIANCE` counts as that much.
    ///
    /// # Errors
    /// Nothing was added; a feature or label is not finite; or `ridge` is so small that channels that are
    /// sums of others leave no solution.
    pub fn solve(&self, ridge: f64) -> Result<(Tensor, Tensor)> {
        ensure!(self.n > 0.0, "no position to solve a ridge regression on");
        let cpu = |x: &Tensor| x.to_device(Device::Cpu);
        let (x_f, y_o) = (cpu(&self.x_f) / self.n, cpu(&self.y_o) / self.n);
        let xx_ff = cpu(&self.xx_ff) - x_f.outer(&x_f) * self.n;
        let xy_fo = cpu(&self.xy_fo) - x_f.outer(&y_o) * self.n;
        for (x, what, stage) in [(&xx_ff, "feature", "extract"), (&xy_fo, "label", "label")] {
            ensure!(
                x.isfinite().all().int64_value(&[]) == 1,
                hinted(
                    format!("the ridge regression has no solution: a {what} is not finite"),
                    format!("make them again: `--redo {stage}`")
                )
            );
        }
        let diagonal_f = xx_ff.diagonal(0, 0, 1);
        let least = LEAST_VARIANCE * self.n;
        let penalty = diagonal_f.mean(Kind::Double).double_value(&[]).max(least) * ridge;
        let eye = Tensor::eye(self.dims.flat() as i64, (Kind::Double, Device::Cpu));
        let factor = (&xx_ff + eye * penalty).f_linalg_cholesky(false).map_err(|_| {
            let constant = diagonal_f.lt(least).sum(Kind::Int64).int64_value(&[]);
            hinted(
                format!(
                    "the ridge regression has no solution: of {} features, {constant} are constant and others depend on each other",
                    self.dims.flat()
                ),
                format!("raise `mapper.ridge` from {ridge}, or leave channels out of `extract.channels`"),
            )
        })?;
        let weight_fo = xy_fo.cholesky_solve(&factor, false);
        let bias_o = y_o - x_f.unsqueeze(0).matmul(&weight_fo).squeeze_dim(0);
        let finite = weight_fo.isfinite().all().int64_value(&[]) == 1;
        ensure!(finite, "the ridge solution is not finite");
        Ok((weight_fo.transpose(0, 1).contiguous(), bias_o))
    }
}
