//! The mapper as a whole: stages put together, parameters by name.

use anyhow::{Context as _, Result, bail, ensure};
use pkv_core::{RetentionRatio, Seed, hinted};
use pkv_recipe::{LossSection, MapperSection, Variant};
use tch::{Device, Tensor};

use crate::context::Context;
use crate::cross::Cross;
use crate::layers::Linear;
use crate::params::ParamStore;
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
    /// Retention ratios of the binary term, with the logarithm of its scales and its offsets, `[ratios]`.
    pub binary: Option<(Vec<RetentionRatio>, Tensor, Tensor)>,
    /// Logarithm of the global term's scale, no dimension.
    pub global_log_scale: Option<Tensor>,
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
        if let Err(wrong) = self.dims.check_features(heads_bpct, globals_bct) {
            panic!("{wrong}");
        }
        let (heads_bpct, globals_bct) = self.stats.features(heads_bpct, globals_bct);
        let flat_btf = flat(&heads_bpct, &globals_bct);
        let skip_bto = self.skip.as_ref().map(|skip| skip.forward(&flat_btf));
        let body_bto = self.body.forward(&heads_bpct, &globals_bct, &flat_btf);
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
        let Some(skip) = &mut self.skip else {
            bail!(hinted("the mapper has no linear skip", "set `mapper.linear_skip = true`"));
        };
        ensure!(
            weight_of.size() == skip.weight.size() && bias_o.size() == skip.bias.size(),
            "a linear map of shape {:?} and {:?} for a skip of {:?} and {:?}",
            weight_of.size(),
            bias_o.size(),
            skip.weight.size(),
            skip.bias.size()
        );
        let _guard = tch::no_grad_guard();
        skip.weight.copy_(weight_of);
        skip.bias.copy_(bias_o);
        Ok(())
    }

    /// Start the binary term's offsets where a perfect prediction would have them: at the mean
    /// threshold of each ratio over `labels` (log-odds `[b, o, t]`, pooled as in training). Without
    /// this they start at 0 and need some hundred steps to travel there. No effect if the term is off.
    ///
    /// # Errors
    /// A shape that is not `[b, o, t]`, or no label at all.
    pub fn calibrate(&mut self, labels: &[Tensor]) -> Result<()> {
        let Some((ratios, log_scale, offset)) = &mut self.loss.binary else { return Ok(()) };
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
        let threshold_r = Tensor::from_slice(&mean).to_device(offset.device());
        offset.copy_(&(log_scale.exp() * threshold_r).neg());
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

    /// `[b, t, o]`, or nothing of a linear mapper.
    fn forward(&self, heads_bpct: &Tensor, globals_bct: &Tensor, flat_btf: &Tensor) -> Option<Tensor> {
        match self {
            Self::Linear => None,
            Self::Mlp { hidden, output } => {
                let h =
                    hidden.iter().fold(flat_btf.shallow_clone(), |h, layer| layer.forward(&h).gelu("none"));
                Some(output.forward(&h))
            }
            Self::Conv { context, output } => Some(output.forward(&context.forward(flat_btf))),
            Self::HybridAxial { temporal, context, cross, output } => {
                let heads_bptd = temporal.forward(heads_bpct);
                let tokens_btf = heads_bptd.transpose(1, 2).flatten(2, 3);
                let inputs = Tensor::cat(&[tokens_btf, globals_bct.transpose(1, 2)], 2);
                let context_btm = context.forward(&inputs);
                Some(output.forward(&context_btm) + cross.forward(&heads_bptd, &context_btm))
            }
        }
    }
}

impl LossParameters {
    fn new(params: &mut ParamStore, loss: &LossSection, stats: &Standardization) -> Result<Self> {
        let binary = if loss.binary > 0.0 {
            let ratios: Vec<RetentionRatio> =
                loss.binary_ratios.iter().map(|&r| RetentionRatio::new(r)).collect::<Result<_, _>>()?;
            let log_scale =
                params.constant("loss.binary_log_scale".into(), &[ratios.len()], BINARY_LOG_SCALE);
            let offset = params.constant("loss.binary_offset".into(), &[ratios.len()], 0.0);
            Some((ratios, log_scale, offset))
        } else {
            None
        };
        // A small score is about the exponential of its log-odds, so the labels' deviation is the
        // scale at which a softmax of perfect predictions is the share of the scores.
        let start = f64::from(stats.label_std).ln();
        let global_log_scale =
            (loss.global > 0.0).then(|| params.constant("loss.global_log_scale".into(), &[], start));
        Ok(Self { binary, global_log_scale })
    }
}
