//! The best linear maps from features to scores.
//!
//! A linear map is a mapper that has nothing but its skip, so standardization and clamping are
//! the same for both.
//!
//! Dimension key: p proxy KV head, o target KV head, c channel, t position.

use anyhow::Result;
use pkv_core::Seed;
use pkv_mapper::{Mapper, MapperDims, RidgeAccumulator, Standardization};
use pkv_recipe::{MapperSection, Variant};
use tch::{Kind, Tensor};

use super::mapper::predict;
use super::method::{Fit, Ready};
use super::training::TrainingContext;
use super::view::ContextView;

/// A ridge regression in the making.
pub struct RidgeFit {
    seen: Seen,
    dims: MapperDims,
    stats: Standardization,
    ridge: f64,
    sums: RidgeAccumulator,
    note: Option<String>,
}

/// A fitted linear map.
struct RidgeMap {
    seen: Seen,
    mapper: Mapper,
}

/// Which features a linear map sees.
enum Seen {
    All,
    /// These channels of each proxy head, and no global channel.
    Channels(Vec<i64>),
}

impl RidgeFit {
    /// With the standardization and the penalty of `mapper`; from all features, or from some
    /// channels of each proxy head.
    ///
    /// # Errors
    /// The mapper's standardization does not fit its dimensions.
    pub fn new(mapper: &Mapper, channels: Option<&[usize]>) -> Result<Self> {
        let (mut dims, stats, device) = (*mapper.dims(), mapper.standardization(), mapper.device());
        let mut seen_stats = stats.to_device(device);
        let seen = match channels {
            None => Seen::All,
            Some(slots) => {
                let slots: Vec<i64> = slots.iter().map(|&s| s as i64).collect();
                (dims.channels, dims.globals) = (slots.len(), 0);
                let pick =
                    |x_pc: &Tensor| x_pc.index_select(1, &Tensor::from_slice(&slots).to_device(device));
                let none = || Tensor::zeros([0], (Kind::Float, device));
                seen_stats = Standardization {
                    heads_mean_pc: pick(&seen_stats.heads_mean_pc),
                    heads_std_pc: pick(&seen_stats.heads_std_pc),
                    globals_mean_c: none(),
                    globals_std_c: none(),
                    ..seen_stats
                };
                Seen::Channels(slots)
            }
        };
        let sums = RidgeAccumulator::new(dims, &seen_stats, device)?;
        Ok(Self { seen, dims, ridge: mapper.section().ridge, stats: seen_stats, sums, note: None })
    }

    /// A note for readers of the results.
    pub fn noted(self, note: String) -> Self {
        Self { note: Some(note), ..self }
    }

    /// Add a context: raw features and log-odds labels `[target heads, positions]`.
    ///
    /// # Errors
    /// Other shapes than the mapper's.
    fn add_labelled(&mut self, heads_pct: &Tensor, globals_ct: &Tensor, y_ot: &Tensor) -> Result<()> {
        let (heads, globals) = self.seen.of(heads_pct, globals_ct);
        self.sums.add(&heads.unsqueeze(0), &globals.unsqueeze(0), &y_ot.unsqueeze(0))
    }

    /// # Errors
    /// Nothing was added, or a feature is not finite.
    fn solve(self) -> Result<RidgeMap> {
        let (weight_of, bias_o) = self.sums.solve(self.ridge)?;
        let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
        let device = self.stats.heads_mean_pc.device();
        // No random number is drawn: a linear mapper starts at zero.
        let mut mapper = Mapper::new(&section, self.dims, self.stats, Seed(0), device)?;
        mapper.set_linear(&weight_of, &bias_o)?;
        Ok(RidgeMap { seen: self.seen, mapper })
    }
}

impl<'a> Fit<'a> for RidgeFit {
    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        self.add_labelled(&context.features.heads_pct, &context.features.globals_ct, &context.y_ot)
    }

    fn finish(mut self: Box<Self>) -> Result<Ready<'a>> {
        let note = self.note.take();
        let linear = self.solve()?;
        let score = move |view: &ContextView| {
            let features = view.features()?;
            linear.scores(&features.heads_pct, &features.globals_ct)
        };
        Ok(Ready::scores(score).noted(note))
    }
}

impl RidgeMap {
    /// Scores of a context, f32 `[target heads, positions]`, from its raw features.
    ///
    /// # Errors
    /// Other shapes than were fitted.
    fn scores(&self, heads_pct: &Tensor, globals_ct: &Tensor) -> Result<Tensor> {
        let (heads, globals) = self.seen.of(heads_pct, globals_ct);
        predict(&self.mapper, &heads, &globals)
    }
}

impl Seen {
    fn of(&self, heads_pct: &Tensor, globals_ct: &Tensor) -> (Tensor, Tensor) {
        match self {
            Self::All => (heads_pct.shallow_clone(), globals_ct.shallow_clone()),
            Self::Channels(slots) => {
                let slots = Tensor::from_slice(slots).to_device(heads_pct.device());
                (heads_pct.index_select(1, &slots), globals_ct.narrow(0, 0, 0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Rng;
    use rand::Rng as _;
    use tch::Device;

    fn random(shape: &[i64], rng: &mut Rng) -> Tensor {
        let x: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_slice(&x).view(shape)
    }

    fn mapper(channels: usize, globals: usize) -> Mapper {
        let dims = MapperDims { proxy_heads: 2, channels, globals, outputs: 3 };
        let section = MapperSection { variant: Variant::Linear, ridge: 1e-9, ..MapperSection::default() };
        let stats = Standardization::identity(&dims);
        Mapper::new(&section, dims, stats, Seed(1), Device::Cpu).unwrap()
    }

    #[test]
    fn a_linear_target_is_found_exactly_from_all_features_or_from_one_channel() {
        let mapper = mapper(3, 2);
        let mut rng = Seed(1).stream("linear", 0);
        let weight_op = random(&[3, 2], &mut rng);
        // Labels depend on channel 1 alone.
        let labels = |heads_pct: &Tensor| weight_op.matmul(&heads_pct.select(1, 1)) + 0.5;
        for channels in [None, Some(&[1usize][..]), Some(&[2, 1])] {
            let mut fit = RidgeFit::new(&mapper, channels).unwrap();
            for _ in 0..3 {
                let (heads, globals) = (random(&[2, 3, 40], &mut rng), random(&[2, 40], &mut rng));
                fit.add_labelled(&heads, &globals, &labels(&heads)).unwrap();
            }
            let linear = fit.solve().unwrap();
            let (heads, globals) = (random(&[2, 3, 17], &mut rng), random(&[2, 17], &mut rng));
            let got = linear.scores(&heads, &globals).unwrap();
            let worst = (got - labels(&heads)).abs().max().double_value(&[]);
            assert!(worst < 1e-4, "{channels:?}: {worst}");
        }
        // Channel 0 knows nothing of it: the mean is all that is left.
        let mut fit = RidgeFit::new(&mapper, Some(&[0])).unwrap();
        let (heads, globals) = (random(&[2, 3, 4000], &mut rng), random(&[2, 4000], &mut rng));
        fit.add_labelled(&heads, &globals, &labels(&heads)).unwrap();
        let got = fit.solve().unwrap().scores(&heads, &globals).unwrap();
        assert!((got - 0.5).abs().max().double_value(&[]) < 0.2);
        assert!(fit_is_refused(&mapper));
    }

    fn fit_is_refused(mapper: &Mapper) -> bool {
        let mut rng = Seed(2).stream("linear", 0);
        let mut fit = RidgeFit::new(mapper, None).unwrap();
        let wrong = random(&[2, 4, 9], &mut rng);
        fit.add_labelled(&wrong, &random(&[2, 9], &mut rng), &random(&[3, 9], &mut rng)).is_err()
    }
}
