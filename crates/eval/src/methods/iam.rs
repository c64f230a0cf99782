//! IAM-style rigid alignment: each target head takes over one proxy head.
//!
//! IAM (arXiv 2507.11953) replaces a large model's attention by a small one's, by matching their heads. Here
//! the match is fitted on training examples: every target head takes the proxy head whose channel ranks
//! positions most like the target's labels, and its values are carried to the label's scale by quantile
//! matching, so that heads can compete for one budget.
//!
//! Dimension key: p proxy KV head, o target KV head, n sampled position, u quantile, t position.

use anyhow::{Result, ensure};
use pkv_core::Channel;
use pkv_prune::metrics::average_ranks;
use pkv_recipe::MethodName;
use tch::{Device, Kind, Tensor};

use super::method::{Fit, Method, Needs, Ready, Start};
use super::proxy_linear::{channel_name, opinion};
use super::training::TrainingContext;

pub const METHOD: Method = Method {
    name: MethodName::of("iam"),
    meaning: "each KV head of the target takes the scores of the source's KV head that it matches best",
    needs: Needs::FEATURES,
    #[cfg(test)]
    held_by: ("src/methods/iam.rs", "fn heads_that_are_a_monotone_function"),
    start: |setup| {
        let (slot, channel) = opinion(setup.channels)?;
        let per_context = ALIGNED_POSITIONS / setup.training.contexts().max(1) as i64 + 1;
        Start::fit(AlignedPositions { slot: slot as i64, channel, per_context, x: Vec::new(), y: Vec::new() })
    },
};

/// Positions that heads are aligned on.
const ALIGNED_POSITIONS: i64 = 65_536;

/// Quantiles that the two distributions are matched at.
const QUANTILES: i64 = 1025;

/// Evenly spaced positions of every training context: one channel of the features, and the labels.
struct AlignedPositions {
    slot: i64,
    channel: Channel,
    per_context: i64,
    x: Vec<Tensor>,
    y: Vec<Tensor>,
}

impl<'a> Fit<'a> for AlignedPositions {
    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        let x_pt = context.features.heads_pct.select(1, self.slot);
        let positions = x_pt.size()[1];
        let step = (positions / self.per_context).max(1);
        let pick = |values: &Tensor| values.slice(1, 0, positions, step).to_device(Device::Cpu);
        self.x.push(pick(&x_pt));
        self.y.push(pick(&context.y_ot));
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Ready<'a>> {
        let fitted = Alignment::fit(&Tensor::cat(&self.x, 1), &Tensor::cat(&self.y, 1))?;
        let (slot, note) = (self.slot, format!("heads matched by {}", channel_name(self.channel)));
        let score =
            move |heads_pct: &Tensor| fitted.to_device(heads_pct.device()).scores(&heads_pct.select(1, slot));
        Ok(Ready::scores(move |view| Ok(score(&view.features()?.heads_pct))).noted(Some(note)))
    }
}

/// Which proxy head each target head takes, and how its values become scores.
#[derive(Debug)]
struct Alignment {
    /// i64 [o].
    head_o: Tensor,
    /// f32 [o, u], ascending: quantiles of the chosen proxy head's channel.
    from_ou: Tensor,
    /// f32 [o, u], ascending: quantiles of the target head's labels.
    to_ou: Tensor,
}

impl Alignment {
    /// Match heads on a sample of positions.
    ///
    /// # Shapes
    /// - `x_pn`: `[proxy heads, samples]`, one channel
    /// - `y_on`: `[target heads, samples]`, labels of the same positions
    ///
    /// # Errors
    /// The samples differ in number, or there are fewer than two.
    fn fit(x_pn: &Tensor, y_on: &Tensor) -> Result<Self> {
        let (n, n_labels) = (x_pn.size()[1], y_on.size()[1]);
        ensure!(n == n_labels && n > 1, "cannot align heads on {n} features and {n_labels} labels");
        let correlation_op = standard_ranks(y_on)?.matmul(&standard_ranks(x_pn)?.transpose(0, 1));
        let head_o = correlation_op.argmax(1, false).to_device(x_pn.device());
        let at_u = (Tensor::linspace(0, 1, QUANTILES, (Kind::Double, x_pn.device())) * (n - 1) as f64)
            .to_kind(Kind::Int64);
        let quantiles = |values: &Tensor| values.to_kind(Kind::Float).sort(1, false).0.index_select(1, &at_u);
        Ok(Self {
            from_ou: quantiles(x_pn).index_select(0, &head_o).contiguous(),
            to_ou: quantiles(y_on).contiguous(),
            head_o,
        })
    }

    /// The same alignment on another device.
    fn to_device(&self, device: Device) -> Self {
        Self {
            head_o: self.head_o.to_device(device),
            from_ou: self.from_ou.to_device(device),
            to_ou: self.to_ou.to_device(device),
        }
    }

    /// Scores of a context on the label's scale.
    ///
    /// # Shapes
    /// - `x_pt`: `[proxy heads, positions]`, the channel that was fitted, on the alignment's device
    /// - returns `[target heads, positions]`, f32
    fn scores(&self, x_pt: &Tensor) -> Tensor {
        let x_ot = x_pt.to_kind(Kind::Float).index_select(0, &self.head_o).contiguous();
        let above_ot =
            x_ot.searchsorted::<Tensor>(&self.from_ou, false, false, "left", None).clamp(1, QUANTILES - 1);
        let below_ot = &above_ot - 1;
        let at = |values_ou: &Tensor, at_ot: &Tensor| values_ou.gather(1, at_ot, false);
        let (low, high) = (at(&self.from_ou, &below_ot), at(&self.from_ou, &above_ot));
        let share = ((&x_ot - &low) / (high - low).clamp_min(1e-6)).clamp(0.0, 1.0);
        let (low, high) = (at(&self.to_ou, &below_ot), at(&self.to_ou, &above_ot));
        &low + share * (high - &low)
    }
}

/// Average ranks of each row, mean 0, norm 1; a row of one value becomes 0. f32 on the CPU.
fn standard_ranks(values: &Tensor) -> Result<Tensor> {
    let (rows, n) = values.size2()?;
    let mut ranks = Vec::with_capacity((rows * n) as usize);
    for row in 0..rows {
        let row = values.get(row).to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
        ranks.extend(average_ranks(&Vec::<f32>::try_from(row)?));
    }
    let centred = Tensor::from_slice(&ranks).view([rows, n]) - (n + 1) as f64 / 2.0;
    let norm = centred.norm_scalaropt_dim(2, [1], true).clamp_min(1e-12);
    Ok((centred / norm).to_kind(Kind::Float))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;
    use rand::Rng;

    fn random(rows: i64, n: i64, index: u64) -> Tensor {
        let mut rng = Seed(1).stream("align", index);
        let x: Vec<f32> = (0..rows * n).map(|_| rng.random_range(-3.0..3.0)).collect();
        Tensor::from_slice(&x).view([rows, n])
    }

    fn heads(a: &Alignment) -> Vec<i64> {
        Vec::try_from(&a.head_o).unwrap()
    }

    #[test]
    fn heads_that_are_a_monotone_function_of_a_proxy_head_are_found_and_carried_over() {
        let x = random(4, 3000, 0);
        // Target head 0 is proxy head 2 cubed, head 1 is proxy head 0 stretched, plus noise in neither.
        let y = Tensor::stack(&[x.get(2).pow_tensor_scalar(3), x.get(0) * 5.0 - 1.0], 0);
        let a = Alignment::fit(&x, &y).unwrap();
        assert_eq!(heads(&a), [2, 0]);
        let new = random(4, 200, 1);
        let expected = Tensor::stack(&[new.get(2).pow_tensor_scalar(3), new.get(0) * 5.0 - 1.0], 0);
        let worst = (a.scores(&new) - expected).abs().max().double_value(&[]);
        assert!(worst < 0.5, "{worst}");
    }

    #[test]
    fn values_outside_the_sample_stay_at_the_ends_and_constant_heads_are_no_match() {
        let x = Tensor::cat(&[Tensor::zeros([1, 100], (Kind::Float, Device::Cpu)), random(1, 100, 2)], 0);
        let y = x.narrow(0, 1, 1) * 2.0;
        let a = Alignment::fit(&x, &y).unwrap();
        assert_eq!(heads(&a), [1]);
        let ends = a.scores(&Tensor::from_slice2(&[[0.0f32, 0.0], [-100.0, 100.0]]));
        assert_eq!(ends.double_value(&[0, 0]), y.min().double_value(&[]));
        assert_eq!(ends.double_value(&[0, 1]), y.max().double_value(&[]));
        assert!(Alignment::fit(&x, &y.narrow(1, 0, 50)).is_err());
    }
}
