//! The whole mapper: its stages in order, and its parameters by name.

use anyhow::{Context as _, Result, bail, ensure};
use pkv_core::{Seed, hinted};
use pkv_recipe::{MapperSection, Variant};
use tch::{Device, Kind, Tensor};

use crate::cross::Cross;
use crate::encoder::ContextEncoder;
use crate::layers::Linear;
use crate::params::{ParamStore, Pass, Weights, load_parameters};
use crate::standardize::{MapperDims, Standardization, flat};
use crate::temporal::Temporal;

/// From a proxy's features to one score per KV pair of the target.
///
/// Forward and backward of 16 contexts of 1000 positions, 12 proxy heads of 8 channels to 36 target
/// heads, default sizes, CPU time of one core: `hybrid-axial` 3.3 s, `conv` 2.1 s, `mlp` 0.3 s,
/// `linear` 0.02 s.
pub struct Mapper {
    section: MapperSection,
    dims: MapperDims,
    stats: Standardization,
    device: Device,
    /// From the standardized inputs straight to the outputs.
    skip: Option<Linear>,
    body: Body,
    parameters: Vec<(String, Tensor)>,
}

/// Layers of a variant in addition to the skip.
enum Body {
    Linear,
    Mlp { hidden: [Linear; 2], output: Linear },
    Conv { context: ContextEncoder, output: Linear },
    HybridAxial { temporal: Temporal, context: ContextEncoder, cross: Cross, output: Linear },
}

/// Options of a training forward pass. The default is what [`Mapper::forward`] computes.
///
/// Random numbers come from the device's libtorch generator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardOptions {
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

impl Default for ForwardOptions {
    fn default() -> Self {
        Self { kind: Kind::Float, noise: 0.0, drop_rows: 0.0, dropout: 0.0 }
    }
}

impl ForwardOptions {
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
    /// `stats` of another shape than `dims`, or a count of 0.
    pub fn new(
        section: &MapperSection,
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
        let stats = stats.to_device(device);
        Ok(Self {
            section: section.clone(),
            dims,
            stats,
            device,
            skip,
            body,
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
        self.forward_training(heads_bpct, globals_bct, &ForwardOptions::default())
    }

    /// [`Self::forward`] as predictions are made of contexts: on a GPU the stages of a large mapper in bf16,
    /// as it was trained; skip and sums in f32. Scores differ from [`Self::forward`]'s by the stages'
    /// rounding.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn predict(&self, heads_bpct: &Tensor, globals_bct: &Tensor) -> Tensor {
        let bf16 = self.device.is_cuda() && self.dims.is_large();
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        self.forward_training(heads_bpct, globals_bct, &ForwardOptions { kind, ..ForwardOptions::default() })
    }

    /// [`Self::forward`] as a step of training computes it.
    ///
    /// The skip sees the features as they are: what disturbs them is for the parts that memorize.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_training(
        &self,
        heads_bpct: &Tensor,
        globals_bct: &Tensor,
        options: &ForwardOptions,
    ) -> Tensor {
        if let Err(wrong) = self.dims.check_features(heads_bpct, globals_bct) {
            panic!("{wrong}");
        }
        let pass = Pass { weights: Weights::new(&self.parameters, options.kind), dropout: options.dropout };
        let (heads_bpct, globals_bct) = self.stats.features(heads_bpct, globals_bct);
        let flat_btf = flat(&heads_bpct, &globals_bct);
        let skip_bto = self.skip.as_ref().map(|skip| skip.forward(&pass, &flat_btf));
        let body_bto = if options.noise > 0.0 || options.drop_rows > 0.0 {
            let (heads_bpct, globals_bct) = options.disturb(heads_bpct, globals_bct);
            let flat_btf = flat(&heads_bpct, &globals_bct);
            self.body.forward(&pass, options.kind, &heads_bpct, &globals_bct, &flat_btf)
        } else {
            self.body.forward(&pass, options.kind, &heads_bpct, &globals_bct, &flat_btf)
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
            Variant::Conv => ContextEncoder::reach(&self.section),
            Variant::HybridAxial => Temporal::reach(&self.section) + ContextEncoder::reach(&self.section),
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

    /// All that is trained, by name, in a fixed order; tensors share memory with the mapper.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Trained numbers.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|(_, x)| x.numel()).sum()
    }

    /// Stored values that are not trained: the standardization.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.stats.buffers()
    }

    /// Overwrite all parameters by those of the same names; other tensors of `named` are left alone.
    ///
    /// # Errors
    /// A parameter is missing or has another shape; then none is changed.
    pub fn load_parameters(&self, named: &[(String, Tensor)]) -> Result<()> {
        load_parameters(&self.parameters, named)
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
                context: ContextEncoder::new(params, section, dims.flat()),
                output: output(params, section.width),
            },
            Variant::HybridAxial => {
                let tokens = dims.proxy_heads * section.head_width + dims.globals;
                Self::HybridAxial {
                    temporal: Temporal::new(params, section, dims),
                    context: ContextEncoder::new(params, section, tokens),
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
