//! Standardization of features and labels by statistics of the training examples.
//!
//! The statistics are buffers of the mapper: a checkpoint holds them, and callers pass
//! raw features.

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_recipe::Recipe;
use tch::{Device, Kind, Tensor};

/// Standardized features are clamped to this on either side: floors of empty windows lie far out.
pub const FEATURE_LIMIT: f64 = 6.0;

/// Smallest standard deviation that is divided by; a constant channel becomes 0, not infinite.
const SMALLEST_STD: f64 = 1e-3;

/// Sizes of a mapper's input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapperDims {
    /// KV heads of all layers of all sources of features; exports call them proxy heads since there was no
    /// other source.
    pub proxy_heads: usize,
    /// Features per KV head of a source and position.
    pub channels: usize,
    /// Features per position; may be 0.
    pub globals: usize,
    /// KV heads of all layers of the target.
    pub outputs: usize,
}

impl MapperDims {
    /// The sizes that a recipe gives the mapper.
    pub fn of(recipe: &Recipe) -> Self {
        let (layout, (target, proxy)) = (recipe.extract.layout(), recipe.shapes());
        Self {
            proxy_heads: layout.heads(target, proxy),
            channels: layout.channels().len(),
            globals: layout.globals(),
            outputs: target.total_kv_heads(),
        }
    }

    /// Proxy heads, channels, globals and outputs as sizes of tensors.
    pub fn sizes(&self) -> [i64; 4] {
        [self.proxy_heads, self.channels, self.globals, self.outputs].map(|n| n as i64)
    }
}

/// Proxy heads times target heads from which a mapper is bound by memory: the tiny pair has 432, an 8B target
/// with a 1B proxy 32,768.
const LARGE: usize = 4096;

impl MapperDims {
    /// Is a mapper of these dimensions bound by memory rather than by kernel launches, on a GPU?
    pub const fn is_large(&self) -> bool {
        self.proxy_heads * self.outputs >= LARGE
    }

    /// Numbers per position, all heads' channels and the globals.
    pub const fn flat(&self) -> usize {
        self.proxy_heads * self.channels + self.globals
    }

    /// # Errors
    /// Shapes other than `[b, proxy_heads, channels, t]` and `[b, globals, t]`, or an empty context.
    pub fn check_features(&self, heads_bpct: &Tensor, globals_bct: &Tensor) -> Result<()> {
        let (heads, globals) = (heads_bpct.size(), globals_bct.size());
        ensure!(
            heads.len() == 4 && heads[1..3] == [self.proxy_heads as i64, self.channels as i64],
            "head features have shape {heads:?}, expected [batch, {} proxy heads, {} channels, positions]",
            self.proxy_heads,
            self.channels
        );
        ensure!(heads[0] > 0 && heads[3] > 0, "head features of shape {heads:?} hold no position");
        ensure!(
            globals == [heads[0], self.globals as i64, heads[3]],
            "global features have shape {globals:?}, expected [{}, {}, {}]",
            heads[0],
            self.globals,
            heads[3]
        );
        Ok(())
    }

    /// # Errors
    /// A shape other than `[b, outputs, t]` with the features' b and t.
    pub fn check_labels(&self, heads_bpct: &Tensor, y_bot: &Tensor) -> Result<()> {
        let (heads, y) = (heads_bpct.size(), y_bot.size());
        ensure!(
            y == [heads[0], self.outputs as i64, heads[3]],
            "labels have shape {y:?}, expected [{}, {} target heads, {}]",
            heads[0],
            self.outputs,
            heads[3]
        );
        Ok(())
    }
}

/// Means and standard deviations, f32.
#[derive(Debug)]
pub struct Standardization {
    /// `[proxy heads, channels]`
    pub heads_mean_pc: Tensor,
    /// `[proxy heads, channels]`
    pub heads_std_pc: Tensor,
    /// `[globals]`
    pub globals_mean_c: Tensor,
    /// `[globals]`
    pub globals_std_c: Tensor,
    /// Of the labels' log-odds, all target heads together: the heads compete with each other.
    pub label_mean: f32,
    pub label_std: f32,
}

const NAMES: [&str; 6] =
    ["heads_mean", "heads_std", "globals_mean", "globals_std", "label_mean", "label_std"];

impl Standardization {
    /// Nothing is changed but for the clamp: for features that are standardized already.
    pub fn identity(dims: &MapperDims) -> Self {
        let (p, c, g) = (dims.proxy_heads as i64, dims.channels as i64, dims.globals as i64);
        let cpu = (Kind::Float, Device::Cpu);
        Self {
            heads_mean_pc: Tensor::zeros([p, c], cpu),
            heads_std_pc: Tensor::ones([p, c], cpu),
            globals_mean_c: Tensor::zeros([g], cpu),
            globals_std_c: Tensor::ones([g], cpu),
            label_mean: 0.0,
            label_std: 1.0,
        }
    }

    /// The same numbers, f32 on `device`.
    pub fn to_device(&self, device: Device) -> Self {
        let on = |x: &Tensor| x.detach().to_kind(Kind::Float).to_device(device);
        Self {
            heads_mean_pc: on(&self.heads_mean_pc),
            heads_std_pc: on(&self.heads_std_pc),
            globals_mean_c: on(&self.globals_mean_c),
            globals_std_c: on(&self.globals_std_c),
            label_mean: self.label_mean,
            label_std: self.label_std,
        }
    }

    /// As named tensors, for a checkpoint or an export; scalars have no dimension.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        let scalar = |x: f32| Tensor::from(x);
        let values = [
            self.heads_mean_pc.shallow_clone(),
            self.heads_std_pc.shallow_clone(),
            self.globals_mean_c.shallow_clone(),
            self.globals_std_c.shallow_clone(),
            scalar(self.label_mean),
            scalar(self.label_std),
        ];
        NAMES.iter().map(|name| format!("standardize.{name}")).zip(values).collect()
    }

    /// Back from [`Self::buffers`]; tensors of other names are left alone.
    ///
    /// # Errors
    /// A name is missing.
    pub fn from_buffers(named: &[(String, Tensor)]) -> Result<Self> {
        let get = |name: &str| {
            let full = format!("standardize.{name}");
            let found = named.iter().find(|(n, _)| *n == full).map(|(_, x)| x.shallow_clone());
            found.with_context(|| format!("tensor `{full}` is missing"))
        };
        let scalar = |name: &str| -> Result<f32> {
            let x = get(name)?;
            ensure!(
                x.numel() == 1,
                "tensor `standardize.{name}` has shape {:?}, expected a scalar",
                x.size()
            );
            Ok(x.double_value(&[]) as f32)
        };
        Ok(Self {
            heads_mean_pc: get("heads_mean")?,
            heads_std_pc: get("heads_std")?,
            globals_mean_c: get("globals_mean")?,
            globals_std_c: get("globals_std")?,
            label_mean: scalar("label_mean")?,
            label_std: scalar("label_std")?,
        })
    }

    /// # Errors
    /// Shapes other than `dims` has, or a label deviation that is not positive.
    pub fn check(&self, dims: &MapperDims) -> Result<()> {
        let (pc, g) = ([dims.proxy_heads as i64, dims.channels as i64], [dims.globals as i64]);
        for (x, expected, what) in [
            (&self.heads_mean_pc, &pc[..], "head means"),
            (&self.heads_std_pc, &pc[..], "head deviations"),
            (&self.globals_mean_c, &g[..], "global means"),
            (&self.globals_std_c, &g[..], "global deviations"),
        ] {
            ensure!(x.size() == expected, "{what} have shape {:?}, expected {expected:?}", x.size());
        }
        ensure!(self.label_std > 0.0, "the labels' standard deviation is {}", self.label_std);
        Ok(())
    }

    /// Raw features to standardized ones, clamped, f32, on the device of the statistics.
    pub(crate) fn features(&self, heads_bpct: &Tensor, globals_bct: &Tensor) -> (Tensor, Tensor) {
        let clamped = |x: &Tensor, mean: Tensor, std: Tensor| {
            let mut x = x.detach().to_device(mean.device()).to_kind(Kind::Float) - mean;
            x /= std.clamp_min(SMALLEST_STD);
            x.clamp_(-FEATURE_LIMIT, FEATURE_LIMIT)
        };
        let last = |x: &Tensor| x.unsqueeze(-1);
        (
            clamped(heads_bpct, last(&self.heads_mean_pc), last(&self.heads_std_pc)),
            clamped(globals_bct, last(&self.globals_mean_c), last(&self.globals_std_c)),
        )
    }

    /// Log-odds labels to the scale of predictions, f32.
    pub fn standardize_labels(&self, y_bot: &Tensor) -> Tensor {
        (y_bot.to_kind(Kind::Float) - f64::from(self.label_mean)) / f64::from(self.label_std)
    }

    /// Predictions to log-odds.
    pub fn to_log_odds(&self, scores_bot: &Tensor) -> Tensor {
        scores_bot * f64::from(self.label_std) + f64::from(self.label_mean)
    }
}

/// All heads' channels, then the globals, side by side per position: `[b, t, f]`, contiguous.
pub(crate) fn flat(heads_bpct: &Tensor, globals_bct: &Tensor) -> Tensor {
    Tensor::cat(&[&heads_bpct.flatten(1, 2), globals_bct], 1).transpose(1, 2).contiguous()
}

/// Means and deviations of a training set, collected context by context in f64.
pub struct StandardizationAccumulator {
    dims: MapperDims,
    heads_pc: Moments,
    globals_c: Moments,
    label: Moments,
}

/// Count, sum and sum of squares.
struct Moments {
    n: f64,
    sum: Tensor,
    squares: Tensor,
}

impl Moments {
    fn new(shape: &[i64]) -> Self {
        let zeros = || Tensor::zeros(shape, (Kind::Double, Device::Cpu));
        Self { n: 0.0, sum: zeros(), squares: zeros() }
    }

    /// `x` of any kind and device; `over` are the dimensions that samples lie along.
    fn add(&mut self, x: &Tensor, over: &[i64]) {
        let x = x.detach().to_kind(Kind::Double);
        let per_sum = x.numel() / self.sum.numel().max(1);
        self.n += per_sum as f64;
        self.sum += x.sum_dim_intlist(over, false, None).to_device(Device::Cpu);
        self.squares += x.square().sum_dim_intlist(over, false, None).to_device(Device::Cpu);
    }

    fn mean_std(&self) -> (Tensor, Tensor) {
        let n = self.n.max(1.0);
        let mean = &self.sum / n;
        let std = (&self.squares / n - mean.square()).clamp_min(0.0).sqrt().clamp_min(SMALLEST_STD);
        (mean.to_kind(Kind::Float), std.to_kind(Kind::Float))
    }
}

impl StandardizationAccumulator {
    pub fn new(dims: MapperDims) -> Self {
        Self {
            dims,
            heads_pc: Moments::new(&[dims.proxy_heads as i64, dims.channels as i64]),
            globals_c: Moments::new(&[dims.globals as i64]),
            label: Moments::new(&[]),
        }
    }

    /// # Shapes
    /// As [`crate::Mapper::forward`], and log-odds `y_bot` `[b, o, t]`.
    ///
    /// # Errors
    /// Other shapes.
    pub fn add(&mut self, heads_bpct: &Tensor, globals_bct: &Tensor, y_bot: &Tensor) -> Result<()> {
        self.dims.check_features(heads_bpct, globals_bct)?;
        self.dims.check_labels(heads_bpct, y_bot)?;
        let _guard = tch::no_grad_guard();
        self.heads_pc.add(heads_bpct, &[0, 3]);
        self.globals_c.add(globals_bct, &[0, 2]);
        self.label.add(y_bot, &[0, 1, 2]);
        Ok(())
    }

    /// # Errors
    /// Nothing was added, or a number is not finite.
    pub fn finish(&self) -> Result<Standardization> {
        ensure!(self.heads_pc.n > 0.0, "no context to take means and deviations of");
        let (heads_mean_pc, heads_std_pc) = self.heads_pc.mean_std();
        let (globals_mean_c, globals_std_c) = self.globals_c.mean_std();
        let (label_mean, label_std) = self.label.mean_std();
        let stats = Standardization {
            heads_mean_pc,
            heads_std_pc,
            globals_mean_c,
            globals_std_c,
            label_mean: label_mean.double_value(&[]) as f32,
            label_std: label_std.double_value(&[]) as f32,
        };
        for (name, x) in stats.buffers() {
            let finite = x.isfinite().all().int64_value(&[]) == 1;
            ensure!(
                finite,
                hinted(
                    format!("`{name}` of the training examples is not finite"),
                    "a feature or label overflowed; rerun the stage that made it with `--redo extract` or `--redo label`"
                )
            );
        }
        Ok(stats)
    }
}
