//! The mapper as a whole: stages put together, parameters by name.

use anyhow::{Context as _, Result, bail, ensure};
use pkv_core::{RetentionRatio, Seed, hinted};
use pkv_recipe::{LossSection, MapperSection, Variant};
use tch::{Device, Kind, Tensor};

use crate::context::Context;
use crate::cross::Cross;
use crate::layers::Linear;
use crate::params::{ParamStore, Pass, Weights};
use crate::standardize::{MapperDims, Standardization, flat};
use crate::temporal::Temporal;

/// Start of the binary term's learned scale, as a logarithm: trained scales settle near 4 to 5.
const BINARY_LOG_SCALE: f64 = 1.5;

/// From a proxy's features to one score per KV pair of the target.
///
/// Forward and backward of 16 contexts of 1000 positions, 12 proxy heads of 8 channels to 36 target
/// heads, default sizes, CPU time of one core: `hybrid-axial` 3.3 s, `conv` 2.1 s, `mlp` 0.3 s,
/// `linear` 0.02 s; the default loss adds 0.09 s.
pub struct Mapper {
    section: MapperSection,
    dims: MapperDims,
    stats: Standardization,
    device: Device,
    /// From the standardized inputs straight to the outputs.
    skip: Option<Linear>,
    body: Body,
    loss: LossParameters,
    parameters: Vec<(String, Tensor)>,
}

/// What a variant has beside the skip.
enum Body {
    Linear,
    Mlp { hidden: [Linear; 2], output: Linear },
    Conv { context: Context, output: Linear },
    HybridAxial { temporal: Temporal, context: Context, cross: Cross, output: Linear },
}

/// Learned numbers of the loss; those of a term that is off are absent.
pub(crate) struct LossParameters {
    pub binary: Option<Binary>,
    /// Logarithm of the global term's scale, no dimension.
    pub global_log_scale: Option<Tensor>,
}

/// What the binary term knows of its retention ratios; tensors `[ratios]` on the mapper's device.
pub(crate) struct Binary {
    pub ratios: Vec<RetentionRatio>,
    /// The ratios, f64.
    ratio_r: Tensor,
    /// 1 / entropy of the ratio, f32.
    pub inverse_entropy_r: Tensor,
    /// Learned.
    pub log_scale_r: Tensor,
    /// Learned.
    pub offset_r: Tensor,
}

impl Binary {
    fn new(params: &mut ParamStore, ratios: &[f64]) -> Result<Self> {
        let ratios: Vec<RetentionRatio> =
            ratios.iter().map(|&r| RetentionRatio::new(r)).collect::<Result<_, _>>()?;
        let log_scale = params.constant("loss.binary_log_scale".into(), &[ratios.len()], BINARY_LOG_SCALE);
        let offset = params.constant("loss.binary_offset".into(), &[ratios.len()], 0.0);
        let (log_scale_r, offset_r) = (params.get(log_scale), params.get(offset));
        let plain: Vec<f64> = ratios.iter().map(|r| r.get()).collect();
        let entropy = |r: &f64| -(r * r.ln() + (1.0 - r) * (1.0 - r).ln());
        let inverse: Vec<f32> = plain.iter().map(|r| entropy(r).recip() as f32).collect();
        let on_device = |x: Tensor| x.to_device(offset_r.device());
        Ok(Self {
            ratio_r: on_device(Tensor::from_slice(&plain)),
            inverse_entropy_r: on_device(Tensor::from_slice(&inverse)),
            ratios,
            log_scale_r,
            offset_r,
        })
    }

    /// [`RetentionRatio::count`] of `n` for every ratio, f64 `[ratios, 1]`, without asking the host.
    pub fn counts(&self, n: i64) -> Tensor {
        (&self.ratio_r * n as f64 + 0.5).floor().clamp(1.0, n as f64).unsqueeze(-1)
    }
}

/// How a forward computes when it is a step of training. The default is what [`Mapper::forward`] does.
///
/// What is random is drawn from libtorch's generator of the device, by whatever seed it has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Kind of all stages, f32 or bf16. Parameters, standardization, skip and sums over attention
    /// heads are f32 in either.
    pub kind: Kind,
    /// Deviation of noise added to the stages' standardized features.
    pub noise: f64,
    /// Share of the (proxy head, channel) rows of a context that the stages do not see, in [0, 1).
    pub drop_rows: f64,
    /// Dropout inside the context encoder, in [0, 1).
    pub dropout: f64,
}

impl Default for Training {
    fn default() -> Self {
        Self { kind: Kind::Float, noise: 0.0, drop_rows: 0.0, dropout: 0.0 }
    }
}

impl Training {
    /// Whether a forward draws random numbers.
    pub fn is_random(&self) -> bool {
        self.noise > 0.0 || self.drop_rows > 0.0 || self.dropout > 0.0
    }

    /// Standardized features as the stages get them: a context's rows dropped, the others scaled so
    /// that their sum is expected to stay; then noise.
    fn disturb(&self, heads_bpct: Tensor, globals_bct: Tensor) -> (Tensor, Tensor) {
        let noisy = |x: Tensor| if self.noise > 0.0 { &x + x.randn_like() * self.noise } else { x };
        let heads_bpct = if self.drop_rows > 0.0 {
            let seen = 1.0 - self.drop_rows;
            let (b, p, c, _) = heads_bpct.size4().expect("features have four dimensions");
            let seen_bpc1 = heads_bpct.new_empty([b, p, c, 1], (Kind::Float, heads_bpct.device()));
            heads_bpct * (seen_bpc1.bernoulli_p(seen) / seen)
        } else {
            heads_bpct
        };
        (noisy(heads_bpct), noisy(globals_bct))
    }
}

impl Mapper {
    /// A mapper at its start: the skip and all outputs are zero, so that after [`Self::set_linear`]
    /// it is exactly the ridge solution, and everything else learns from the first steps on.
    ///
    /// # Errors
    /// `stats` of another shape than `dims`, a count of 0, a ratio outside (0, 1].
    pub fn new(
        section: &MapperSection,
        loss: &LossSection,
        dims: MapperDims,
        stats: Standardization,
        seed: Seed,
        device: Device,
    ) -> Result<Self> {
        ensure!(
            dims.proxy_heads > 0 && dims.channels > 0 && dims.outputs > 0,
            "a mapper needs proxy heads, channels and outputs, found {dims:?}"
        );
        stats.check(&dims).context("the mapper's standardization")?;
        let mut params = ParamStore::new(seed, device);
        let skip = (section.linear_skip || section.variant == Variant::Linear)
            .then(|| Linear::zero(&mut params, "skip", dims.flat(), dims.outputs));
        let body = Body::new(&mut params, section, &dims);
        let loss = LossParameters::new(&mut params, loss, &stats)?;
        let stats = stats.to_device(device);
        Ok(Self {
            section: section.clone(),
            dims,
            stats,
            device,
            skip,
            body,
            loss,
            parameters: params.into_entries(),
        })
    }

    /// Predicted scores, higher means keep.
    ///
    /// # Shapes
    /// - `heads_bpct`: `[b, proxy heads, channels, t]`, f16 or f32, raw features, any device
    /// - `globals_bct`: `[b, globals, t]`, as well
    /// - returns `[b, outputs, t]`, f32, on the mapper's device, contiguous, standardized log-odds;
    ///   gradients flow to the parameters, not to the features
    ///
    /// # Panics
    /// Other shapes; [`MapperDims::check_features`] tells beforehand.
    pub fn forward(&self, heads_bpct: &Tensor, globals_bct: &Tensor) -> Tensor {
        self.forward_training(heads_bpct, globals_bct, &Training::default())
    }

    /// [`Self::forward`] as predictions are made of contexts: on a GPU the stages of a large mapper in bf16, as it was
    /// trained; skip and sums in f32. Scores differ from [`Self::forward`]'s by the stages' rounding.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn predict(&self, heads_bpct: &Tensor, globals_bct: &Tensor) -> Tensor {
        let bf16 = self.device.is_cuda() && self.dims.is_large();
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        self.forward_training(heads_bpct, globals_bct, &Training { kind, ..Training::default() })
    }

    /// [`Self::forward`] as a step of training computes it.
    ///
    /// The skip sees the features as they are: what disturbs them is for the parts that memorize.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_training(&self, heads_bpct: &Tensor, globals_bct: &Tensor, how: &Training) -> Tensor {
        if let Err(wrong) = self.dims.check_features(heads_bpct, globals_bct) {
            panic!("{wrong}");
        }
        let pass = Pass { weights: Weights::new(&self.parameters, how.kind), dropout: how.dropout };
        let (heads_bpct, globals_bct) = self.stats.features(heads_bpct, globals_bct);
        let flat_btf = flat(&heads_bpct, &globals_bct);
        let skip_bto = self.skip.as_ref().map(|skip| skip.forward(&pass, &flat_btf));
        let body_bto = if how.noise > 0.0 || how.drop_rows > 0.0 {
            let (heads_bpct, globals_bct) = how.disturb(heads_bpct, globals_bct);
            let flat_btf = flat(&heads_bpct, &globals_bct);
            self.body.forward(&pass, how.kind, &heads_bpct, &globals_bct, &flat_btf)
        } else {
            self.body.forward(&pass, how.kind, &heads_bpct, &globals_bct, &flat_btf)
        };
        let scores_bto = match (skip_bto, body_bto) {
            (Some(skip), Some(body)) => skip + body,
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => unreachable!("a linear mapper has its skip"),
        };
        scores_bto.transpose(1, 2).contiguous()
    }

    /// Positions on either side that one output depends on.
    pub fn reach(&self) -> usize {
        match self.section.variant {
            Variant::Linear | Variant::Mlp => 0,
            Variant::Conv => Context::reach(&self.section),
            Variant::HybridAxial => Temporal::reach(&self.section) + Context::reach(&self.section),
        }
    }

    pub fn section(&self) -> &MapperSection {
        &self.section
    }

    pub fn dims(&self) -> &MapperDims {
        &self.dims
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn standardization(&self) -> &Standardization {
        &self.stats
    }

    pub(crate) fn loss_parameters(&self) -> &LossParameters {
        &self.loss
    }

    /// All that is trained, by name, in a fixed order; tensors share memory with the mapper.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Trained numbers, those of the loss included.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|(_, x)| x.numel()).sum()
    }

    /// Whether weight decay applies to a parameter: to everything but vectors and scalars.
    pub fn decayed(&self, name: &str) -> bool {
        self.parameters.iter().any(|(n, x)| n == name && x.dim() >= 2)
    }

    /// What is stored beside the parameters and not trained: the standardization.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.stats.buffers()
    }

    /// Overwrite all parameters by those of the same names; other tensors of `named` are left alone.
    ///
    /// # Errors
    /// A parameter is missing or has another shape; then none is changed.
    pub fn load_parameters(&self, named: &[(String, Tensor)]) -> Result<()> {
        let found: Vec<&Tensor> = self
            .parameters
            .iter()
            .map(|(name, mine)| {
                let (_, theirs) = named.iter().find(|(n, _)| n == name).with_context(|| {
                    hinted(
                        format!("parameter `{name}` is missing"),
                        "these weights are of another `[mapper]` or `[loss]` section; use the recipe they were trained with",
                    )
                })?;
                ensure!(
                    theirs.size() == mine.size(),
                    "parameter `{name}` has shape {:?}, expected {:?}",
                    theirs.size(),
                    mine.size()
                );
                Ok(theirs)
            })
            .collect::<Result<_>>()?;
        let _guard = tch::no_grad_guard();
        for ((_, mine), theirs) in self.parameters.iter().zip(found) {
            mine.shallow_clone().copy_(theirs);
        }
        Ok(())
    }

    /// Set the linear skip, usually to [`crate::RidgeAccumulator::solve`]'s answer.
    ///
    /// # Shapes
    /// - `weight_of`: `[outputs, flat inputs]`, any float kind; `bias_o`: `[outputs]`
    ///
    /// # Errors
    /// Other shapes, or a mapper without a skip.
    pub fn set_linear(&mut self, weight_of: &Tensor, bias_o: &Tensor) -> Result<()> {
        let named =
            |name: &str| self.parameters.iter().find(|(n, _)| n == name).map(|(_, x)| x.shallow_clone());
        let (Some(mut weight), Some(mut bias)) = (named("skip.weight"), named("skip.bias")) else {
            bail!(hinted("the mapper has no linear skip", "set `mapper.linear_skip = true`"));
        };
        ensure!(
            weight_of.size() == weight.size() && bias_o.size() == bias.size(),
            "a linear map of shape {:?} and {:?} for a skip of {:?} and {:?}",
            weight_of.size(),
            bias_o.size(),
            weight.size(),
            bias.size()
        );
        let _guard = tch::no_grad_guard();
        weight.copy_(weight_of);
        bias.copy_(bias_o);
        Ok(())
    }

    /// Start the binary term's offsets where a perfect prediction would have them: at the mean
    /// threshold of each ratio over `labels` (log-odds `[b, o, t]`, pooled as in training). Without
    /// this they start at 0 and need some hundred steps to travel there. No effect if the term is off.
    ///
    /// # Errors
    /// A shape that is not `[b, o, t]`, or no label at all.
    pub fn calibrate(&mut self, labels: &[Tensor]) -> Result<()> {
        let Some(Binary { ratios, log_scale_r, offset_r, .. }) = &mut self.loss.binary else { return Ok(()) };
        let _guard = tch::no_grad_guard();
        let (mut sums, mut contexts) = (vec![0.0; ratios.len()], 0i64);
        for y_bot in labels {
            let shape = y_bot.size();
            ensure!(
                shape.len() == 3 && shape[1] == self.dims.outputs as i64 && y_bot.numel() > 0,
                "labels have shape {shape:?}, expected [batch, {} target heads, positions]",
                self.dims.outputs
            );
            let y_bn = self.stats.standardize_labels(y_bot).flatten(1, 2);
            contexts += shape[0];
            for (sum, ratio) in sums.iter_mut().zip(ratios.iter()) {
                let top_bn = pkv_prune::top_mask(&y_bn, ratio.count(y_bn.size()[1] as usize));
                let lowest_b = y_bn.masked_fill(&top_bn.logical_not(), f64::INFINITY).amin([1], false);
                *sum += lowest_b.sum(tch::Kind::Double).double_value(&[]);
            }
        }
        ensure!(contexts > 0, "no labels to take thresholds of");
        let mean: Vec<f32> = sums.iter().map(|sum| (sum / contexts as f64) as f32).collect();
        let threshold_r = Tensor::from_slice(&mean).to_device(offset_r.device());
        offset_r.copy_(&(log_scale_r.exp() * threshold_r).neg());
        Ok(())
    }
}

impl Body {
    fn new(params: &mut ParamStore, section: &MapperSection, dims: &MapperDims) -> Self {
        let output = |params: &mut ParamStore, from| Linear::zero(params, "output", from, dims.outputs);
        match section.variant {
            Variant::Linear => Self::Linear,
            Variant::Mlp => {
                let hidden = section.width * section.feed_forward;
                Self::Mlp {
                    hidden: [
                        Linear::new(params, "mlp.hidden0", dims.flat(), hidden),
                        Linear::new(params, "mlp.hidden1", hidden, hidden),
                    ],
                    output: output(params, hidden),
                }
            }
            Variant::Conv => Self::Conv {
                context: Context::new(params, section, dims.flat()),
                output: output(params, section.width),
            },
            Variant::HybridAxial => {
                let tokens = dims.proxy_heads * section.head_width + dims.globals;
                Self::HybridAxial {
                    temporal: Temporal::new(params, section, dims),
                    context: Context::new(params, section, tokens),
                    cross: Cross::new(params, section, dims),
                    output: output(params, section.width),
                }
            }
        }
    }

    /// `[b, t, o]`, f32, or nothing of a linear mapper.
    fn forward(
        &self,
        pass: &Pass,
        kind: Kind,
        heads_bpct: &Tensor,
        globals_bct: &Tensor,
        flat_btf: &Tensor,
    ) -> Option<Tensor> {
        let scores_bto = match self {
            Self::Linear => return None,
            Self::Mlp { hidden, output } => {
                let step = |h: Tensor, layer: &Linear| layer.forward(pass, &h).gelu("none");
                output.forward(pass, &hidden.iter().fold(flat_btf.to_kind(kind), step))
            }
            Self::Conv { context, output } => {
                output.forward(pass, &context.forward(pass, &flat_btf.to_kind(kind)))
            }
            Self::HybridAxial { temporal, context, cross, output } => {
                let heads_bptd = temporal.forward(pass, &heads_bpct.to_kind(kind));
                let tokens_btf = heads_bptd.transpose(1, 2).flatten(2, 3);
                let inputs = Tensor::cat(&[tokens_btf, globals_bct.to_kind(kind).transpose(1, 2)], 2);
                let context_btm = context.forward(pass, &inputs);
                // f32 plus the stages' kind is f32.
                cross.forward(pass, &heads_bptd, &context_btm) + output.forward(pass, &context_btm)
            }
        };
        Some(scores_bto.to_kind(Kind::Float))
    }
}

impl LossParameters {
    fn new(params: &mut ParamStore, loss: &LossSection, stats: &Standardization) -> Result<Self> {
        let binary = (loss.binary > 0.0).then(|| Binary::new(params, &loss.binary_ratios)).transpose()?;
        // A small score is about the exponential of its log-odds, so the labels' deviation is the
        // scale at which a softmax of perfect predictions is the share of the scores.
        let start = f64::from(stats.label_std).ln();
        let global_log_scale = (loss.global > 0.0).then(|| {
            let at = params.constant("loss.global_log_scale".into(), &[], start);
            params.get(at)
        });
        Ok(Self { binary, global_log_scale })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the loss counts on the device is what keep masks count.
    #[test]
    fn counts_are_those_of_the_ratios() {
        pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let mut params = ParamStore::new(Seed(1), Device::Cpu);
        let ratios = [0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.5, 0.25];
        let binary = Binary::new(&mut params, &ratios).unwrap();
        for n in (1..3000).chain([36_000, 50_400, 1_048_575, 16_777_217]) {
            let expected: Vec<f64> = binary.ratios.iter().map(|r| r.count(n as usize) as f64).collect();
            assert_eq!(Vec::<f64>::try_from(binary.counts(n).flatten(0, -1)).unwrap(), expected, "{n}");
        }
    }
}
