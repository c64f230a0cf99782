//! Initialization: standardization, the ridge solution, the thresholds, or another mapper's parameters.

use anyhow::{Context as _, Result};
use pkv_core::{Progress, Stop, hinted};
use pkv_mapper::{RidgeAccumulator, StandardizationAccumulator};
use pkv_recipe::Variant;
use tch::{Device, Tensor};

use crate::dataset::{Dataset, Samples};
use crate::in_order::InOrder;
use crate::learner::Learner;
use crate::loader::{self, Source as _};
use crate::run::TrainInputs;

/// Most training contexts that statistics are taken of.
const SAMPLE_CONTEXTS: usize = 512;
/// Most positions of them: half a million settle means to three digits and the ridge solution to less than it
/// is off.
const SAMPLE_POSITIONS: usize = 1 << 19;
/// Contexts whose thresholds are averaged.
const THRESHOLD_CONTEXTS: usize = 64;

/// A mapper at its start: standardized by the training examples, its skip the best linear mapper,
/// the binary term's offsets at the labels' mean thresholds. `inputs.start_from` has the parameters of
/// another mapper: those replace the ridge solution and random numbers; standardization stays its own.
///
/// # Errors
/// A shard is damaged, a feature or label is not finite, `inputs.start_from` is of another network, or the
/// user stopped: there is nothing to save then.
pub fn start(
    dataset: &Dataset,
    samples: &Samples,
    inputs: &TrainInputs,
    device: Device,
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<Learner> {
    let _no_grad = tch::no_grad_guard();
    let TrainInputs { mapper: section, loss, train, start_from: from, .. } = *inputs;
    let seed = inputs.training_seed();
    let sample = sample(dataset, dataset.training_rows(train.contexts, seed));
    let (dims, linear) = (dataset.dims(), section.linear_skip || section.variant == Variant::Linear);
    let linear = linear && from.is_none();
    let passes = if linear { 2 } else { 1 };
    progress.start("training statistics", passes * sample.len() as u64, 0);
    let threads = loader::threads(train.loader_threads, usize::MAX);
    // All contexts of the sample in order: heads `[1, p, c, t]`, globals `[1, g, t]`, targets `[1, o, t]`.
    let each = |add: &mut dyn FnMut(&Tensor, &Tensor, Tensor) -> Result<()>| {
        (0..).zip(&sample).for_each(|(turn, &row)| samples.expect(row, turn));
        std::thread::scope(|scope| -> Result<()> {
            let sample = &sample;
            let mut contexts = InOrder::start(scope, threads, move |thread, to| {
                let mut rows = sample.iter().skip(thread).step_by(threads);
                while rows.next().is_some_and(|&row| to.put(samples.sample(row))) {}
            });
            for _ in sample {
                // Features that are made when they are read take as long as a model reads a context.
                stop.check()?;
                let (context, [p, c, g, o]) = (contexts.take()?, dims.sizes());
                let t = context.positions as i64;
                let tensor = |x: &[f32], shape: &[i64]| Tensor::from_slice(x).reshape(shape);
                add(
                    &tensor(&context.heads, &[1, p, c, t]),
                    &tensor(&context.globals, &[1, g, t]),
                    tensor(&context.targets, &[1, o, t]),
                )?;
                progress.advance(1);
            }
            Ok(())
        })
    };

    let mut statistics = StandardizationAccumulator::new(dims);
    let mut thresholds = Vec::new();
    each(&mut |heads_bpct, globals_bct, y_bot| {
        statistics.add(heads_bpct, globals_bct, &y_bot)?;
        if thresholds.len() < THRESHOLD_CONTEXTS {
            thresholds.push(y_bot);
        }
        Ok(())
    })?;
    let stats = statistics.finish()?;

    let ridge = linear.then(|| RidgeAccumulator::new(dims, &stats, device)).transpose()?;
    let mut learner = Learner::new(section, loss, dims, stats, seed, device)?;
    if let Some(mut ridge) = ridge {
        each(&mut |heads_bpct, globals_bct, y_bot| ridge.add(heads_bpct, globals_bct, &y_bot))?;
        let (weight_of, bias_o) = ridge.solve(section.ridge)?;
        learner.mapper.set_linear(&weight_of, &bias_o)?;
    }
    learner.loss.calibrate(&thresholds)?;
    if let Some(from) = from {
        adopt(&learner, from)?;
    }
    progress.finish();
    Ok(learner)
}

/// Give the mapper the parameters in `from`, which older exports hold the loss's numbers beside: those are
/// taken where they fit, since the loss may differ.
fn adopt(learner: &Learner, from: &[(String, Tensor)]) -> Result<()> {
    learner.mapper.load_parameters(from).with_context(|| {
        hinted(
            "the mapper that training would start from is of another network",
            "start from a mapper with the same sizes and `[mapper]` section, or leave `train.start_from` out",
        )
    })?;
    let (mut taken, mut own) = (0, Vec::new());
    for mine in learner.loss.parameters() {
        let fits = |(name, x): &&(String, Tensor)| *name == mine.0 && x.size() == mine.1.size();
        match from.iter().find(fits) {
            Some((_, theirs)) => {
                mine.1.shallow_clone().copy_(theirs);
                taken += 1;
            }
            None => own.push(mine.0.as_str()),
        }
    }
    let kept =
        if own.is_empty() { String::new() } else { format!("; from this run's start: {}", own.join(", ")) };
    tracing::info!(
        "starting from another mapper's {} parameters{kept}",
        learner.mapper.parameters().len() + taken
    );
    Ok(())
}

/// Some of the training rows evenly spread over them, within both limits.
fn sample(dataset: &Dataset, mut rows: Vec<u64>) -> Vec<u64> {
    rows.retain(|&r| dataset.positions(r) > 0);
    let total: usize = rows.iter().map(|&r| dataset.positions(r)).sum();
    let by_positions = rows.len() * SAMPLE_POSITIONS / total.max(SAMPLE_POSITIONS);
    let count = by_positions.clamp(1, SAMPLE_CONTEXTS).min(rows.len());
    (0..count).map(|i| rows[i * rows.len() / count]).collect()
}
