//! The training loop: steps, logs, validations, checkpoints, and resume.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pkv_checkpoint::{CheckpointStore, TrainingState};
use pkv_core::{Fingerprint, Progress, SHOWN_BY_BARS, Seed, Split, Stop, hinted};
use pkv_recipe::{LossSection, MapperSection, TrainSection};
use pkv_shard::{FeatureFolders, RunLayout};
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::batches::Batches;
use crate::curve::{Means, Window};
use crate::dataset::{Dataset, Samples};
use crate::diverged::{self, Diverged};
use crate::journal::{Journal, METRICS_FILE};
use crate::learner::Learner;
use crate::loader::{Loaded, Loader};
use crate::loss::LossTerms;
use crate::optimizer::Optimizer;
use crate::schedule::Schedule;
use crate::start::start;
use crate::step::{Stepper, Tf32, number_format};
use crate::step_clock::{StepClock, clock_text};
use crate::tensorboard::EventFile;
use crate::validate::{Ranking, Validation, Validator};

/// Inputs and output folder of training.
#[derive(Clone, Debug)]
pub struct TrainInputs<'a> {
    /// The run folder: `checkpoints/`, `train/metrics.jsonl` and `tb/` are made in it.
    pub run: &'a Path,
    /// Folders of the complete stages.
    pub examples: &'a Path,
    pub labels: &'a Path,
    /// Of all sources.
    pub features: FeatureFolders,
    pub mapper: &'a MapperSection,
    pub loss: &'a LossSection,
    pub train: &'a TrainSection,
    pub seed: Seed,
    /// Parameters by name that training starts from, in place of the ridge solution and random numbers.
    pub start_from: Option<&'a [(String, Tensor)]>,
    /// Every choice that the weights depend on, those of the stages before included.
    pub fingerprint: &'a Fingerprint,
}

impl TrainInputs<'_> {
    /// Of all that training draws, but for which contexts it learns from.
    pub(crate) fn training_seed(&self) -> Seed {
        self.train.seed.unwrap_or(self.seed)
    }
}

/// Summary of a training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainSummary {
    /// Steps taken, of all runs together.
    pub step: u64,
    /// The recipe's steps are done; false if it was asked to stop.
    pub finished: bool,
    /// The recipe's steps: a number, or `auto` with its maximum.
    pub steps: String,
    /// Steps done when the learning rate began to decay, if the steps are `auto` and it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_from: Option<u64>,
    /// Trained numbers.
    pub parameters: usize,
    /// Step and score of the best validation.
    pub best_step: Option<u64>,
    pub best_score: Option<f64>,
    /// Mean milliseconds per step of this run, validations left out.
    pub ms_per_step: f64,
    /// Seconds of this run.
    pub secs: f64,
}

impl TrainInputs<'_> {
    fn checkpoints(&self) -> PathBuf {
        RunLayout::new(self.run).checkpoints()
    }

    fn store(&self) -> Result<CheckpointStore> {
        CheckpointStore::open(&self.checkpoints(), self.fingerprint, self.train.keep_checkpoints)
    }
}

/// The step of the last checkpoint, if training has done all of its steps.
///
/// # Errors
/// The checkpoints were made with other choices (the hint says what to do), or another process trains.
pub fn is_complete(inputs: &TrainInputs) -> Result<Option<u64>> {
    if !inputs.checkpoints().exists() {
        return Ok(None);
    }
    // Read whole: a damaged last checkpoint is to be made again.
    let Some(latest) = inputs.store()?.latest(Device::Cpu)? else { return Ok(None) };
    let done = Schedule::restore(inputs.train, &latest.extra)?.is_done(latest.step);
    let metrics = RunLayout::new(inputs.run).train().join(METRICS_FILE);
    if done && !metrics.is_file() {
        tracing::warn!(
            "`{}` is gone: the mapper is whole, and its curves are lost; `--redo train` makes both anew",
            metrics.display()
        );
    }
    Ok(done.then_some(latest.step))
}

/// Train until the recipe's steps are done or `stop` is requested, from the last checkpoint if there is one.
///
/// Asked to stop, or unable to read the next batch, it saves a checkpoint after the step at hand.
///
/// # Errors
/// A stage is absent or damaged, the checkpoints were made with other choices, the loss is no
/// number any more, or the disk is full.
pub fn train(
    inputs: &TrainInputs,
    device: Device,
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<TrainSummary> {
    let begin = Instant::now();
    let store = inputs.store()?;
    let dataset = Dataset::open(inputs.examples, inputs.labels, &inputs.features)?;
    let samples = Samples::new(&dataset, inputs.train.target_pool, inputs.train.cache_gb);
    let mut run = Run::open(inputs, &store, &dataset, &samples, device, progress, stop)?;
    let (first, most) = (run.step, run.schedule.most());
    let _tf32 = Tf32::set(number_format(inputs.train.dtype, dataset.dims(), device))?;

    let rows = dataset.training_rows(inputs.train.contexts, inputs.seed);
    let lengths: Vec<usize> = rows.iter().map(|&r| dataset.positions(r)).collect();
    let batches = Batches::new(
        &rows,
        &lengths,
        inputs.train.batch,
        inputs.train.window_tokens,
        inputs.train.crop,
        inputs.training_seed(),
    );
    ensure!(
        batches.per_epoch() > 0,
        hinted("every training example is empty", "lower `data.min_tokens` and prepare again")
    );
    tracing::info!(
        "training {} parameters on {} windows of {} contexts, {} per step, {} step{} per epoch, from step {first} of {}",
        run.learner.parameter_count(),
        batches.windows(),
        rows.len(),
        inputs.train.batch.min(batches.windows()),
        batches.per_epoch(),
        if batches.per_epoch() == 1 { "" } else { "s" },
        inputs.train.steps_in_words()
    );
    let loader = Loader::new(&samples, &batches, inputs.loss, inputs.training_seed(), device);
    progress.start("train", most, first);
    std::thread::scope(|threads| -> Result<()> {
        let mut feed = loader.start(
            threads,
            loader.threads(inputs.train.loader_threads, batches.largest()),
            first,
            most,
        );
        let mut batch = if run.schedule.is_done(first) { None } else { Some(feed.take()?) };
        while let Some(now) = batch.take() {
            if stop.is_requested() {
                tracing::info!("stopping at step {} of {}", run.step, inputs.train.steps_in_words());
                return run.save_once().map_err(|e| diverged::explain(e, inputs, &batches, &dataset));
            }
            let queued = run.launch_step(&now)?;
            // On its way while the device is busy with this one.
            let next = if run.step + 1 < run.schedule.most() { feed.take().map(Some) } else { Ok(None) };
            let before = run.schedule.most();
            run.finish_step(queued, now.tokens())
                .map_err(|e| diverged::explain(e, inputs, &batches, &dataset))?;
            progress.advance(1);
            if run.schedule.most() != before {
                // The end is known now.
                progress.finish();
                progress.start("train", run.schedule.most(), run.step);
            }
            batch = match next {
                Ok(batch) => batch,
                Err(e) => {
                    // What was learned so far is kept.
                    run.save_once().map_err(|e| diverged::explain(e, inputs, &batches, &dataset))?;
                    return Err(e);
                }
            };
        }
        Ok(())
        // The feed is dropped here, and the loader's threads end with it.
    })?;
    progress.finish();
    let steps_done = run.step - first;
    Ok(TrainSummary {
        step: run.step,
        finished: run.schedule.is_done(run.step),
        steps: inputs.train.steps_in_words(),
        decay_from: run.schedule.decay_from(),
        parameters: run.learner.parameter_count(),
        best_step: run.best.map(|b| b.0),
        best_score: run.best.map(|b| b.1),
        ms_per_step: run.clock.total().as_secs_f64() * 1e3 / steps_done.max(1) as f64,
        secs: begin.elapsed().as_secs_f64(),
    })
}

/// Training between two steps.
struct Run<'a> {
    inputs: &'a TrainInputs<'a>,
    store: &'a CheckpointStore,
    progress: &'a dyn Progress,
    validator: Validator<'a>,
    learner: Learner,
    optimizer: Optimizer,
    stepper: Stepper,
    /// Steps taken.
    step: u64,
    schedule: Schedule,
    /// Step and score of the best validation.
    best: Option<(u64, f64)>,
    /// Score of this step's validation, if it had one.
    score: Option<f64>,
    /// The last step that a checkpoint holds.
    saved: Option<u64>,
    window: Window,
    journal: Journal,
    events: EventFile,
    clock: StepClock,
}

impl<'a> Run<'a> {
    /// From the last checkpoint, or from the start.
    fn open(
        inputs: &'a TrainInputs,
        store: &'a CheckpointStore,
        dataset: &'a Dataset,
        samples: &Samples,
        device: Device,
        progress: &'a dyn Progress,
        stop: &Stop,
    ) -> Result<Self> {
        let saved = store.latest(device)?;
        let learner = match &saved {
            Some(state) => Learner::resume(inputs.mapper, inputs.loss, dataset.dims(), state, device)?,
            None => start(dataset, samples, inputs, device, progress, stop)?,
        };
        let mut optimizer = Optimizer::new(&learner.parameters(), inputs.train)?;
        let (mut step, mut window, mut schedule) = (0, Window::new(), Schedule::new(inputs.train));
        if let Some(s) = &saved {
            step = s.step;
            optimizer.restore(&s.first_moments, &s.second_moments, &s.ema, step)?;
            let context = || format!("cannot continue from the checkpoint of step {step}");
            window = Window::restore(&s.extra["window"], device).with_context(context)?;
            schedule = Schedule::restore(inputs.train, &s.extra).with_context(context)?;
        }
        // Later checkpoints were damaged; their steps come again.
        store.discard_after(step)?;
        let validation_rows: Vec<u64> = {
            let rows = dataset.rows(Split::Validation).into_iter();
            rows.filter(|&r| dataset.positions(r) > 0).collect()
        };
        if validation_rows.is_empty() {
            ensure!(
                inputs.train.auto().is_none(),
                hinted(
                    "`train.steps` is `auto`, and there is no validation example that would end the training",
                    "raise `data.validation` and prepare again, or set `train.steps` to a number"
                )
            );
            tracing::warn!("there are no validation examples: the last checkpoint will count as the best");
        }
        Ok(Self {
            inputs,
            store,
            progress,
            validator: Validator::new(
                dataset,
                validation_rows,
                inputs.train,
                inputs.seed,
                Ranking::of(device),
            ),
            stepper: Stepper::new(inputs.train, dataset.dims(), inputs.training_seed(), device),
            learner,
            optimizer,
            step,
            schedule,
            best: store.best_validation()?,
            score: saved.as_ref().and_then(|s| s.validation),
            saved: saved.map(|s| s.step),
            window,
            journal: Journal::open(&RunLayout::new(inputs.run).train(), step)?,
            events: EventFile::create(&RunLayout::new(inputs.run).events(), step)?,
            clock: StepClock::new(),
        })
    }

    /// Queue the next step on the device.
    fn launch_step(&mut self, batch: &Loaded) -> Result<(LossTerms, Tensor)> {
        let lr = self.schedule.rate(self.step);
        self.stepper.step(&self.learner, &mut self.optimizer, batch, self.step, lr)
    }

    /// Count a step of `tokens` positions; log, validate and save if due.
    fn finish_step(&mut self, (loss, norm): (LossTerms, Tensor), tokens: u64) -> Result<()> {
        let train = self.inputs.train;
        self.window.add(self.step, &loss, &norm);
        let lr = self.schedule.rate(self.step);
        self.step += 1;
        self.schedule.stepped(self.step);

        let due = |every: u64| self.step.is_multiple_of(every) || self.schedule.is_done(self.step);
        let (log, check, save) =
            (due(train.log_every), due(train.validate_every), due(train.checkpoint_every));
        // Before anything is written of these steps, and before a validation ranks numbers that are none.
        if log || check || save {
            self.check_loss()?;
        }
        if check || save {
            self.state()?.check_finite().map_err(|e| self.diverged(e))?;
        }
        // Reading the means waits for the device: its work is part of the step.
        let means = if log { Some(self.window.take()?) } else { None };
        self.clock.step(tokens);
        if let Some(means) = means {
            self.log(means, lr)?;
        }
        let validation = if check { self.validate()? } else { None };
        self.score = validation.as_ref().map(|v| v.score);
        let better = self.score.is_some_and(|score| self.best.is_none_or(|(_, best)| score > best));
        if let Some(v) = &validation {
            if !v.loss.is_finite() {
                return Err(self.diverged(anyhow::anyhow!("the validation loss is {}", v.loss)));
            }
            self.report(v, better)?;
            if self.schedule.validated(self.step, v.score) {
                let (step, end) = (self.step, self.schedule.most());
                tracing::info!(
                    "validation no longer gains at step {step}: the learning rate decays until step {end}"
                );
            }
        }
        if save || better {
            self.save_once()?;
        }
        self.clock.pause();
        Ok(())
    }

    /// Write the means since the last log line.
    fn log(&mut self, means: Means, lr: f64) -> Result<()> {
        let Means { loss, terms, gradient_norm } = means;
        let (most, known) = (self.schedule.most(), self.schedule.end().is_some());
        let (ms, tokens) = self.clock.take();
        let eta = Duration::from_secs_f64(most.saturating_sub(self.step) as f64 * ms / 1e3);
        tracing::info!(
            target: SHOWN_BY_BARS,
            "step {}/{most} loss {loss:.4} lr {lr:.2e} {ms:.0} ms/step {tokens:.0} tokens/s ETA {}{}",
            self.step,
            if known { "" } else { "at most " },
            clock_text(eta)
        );
        let best = self.best.map_or(String::new(), |(_, score)| format!(", best {:.1}%", 100.0 * score));
        let until = if known { "" } else { ", auto" };
        self.progress.note(&format!("loss {loss:.3}, {tokens:.0} tokens/s{best}{until}"));
        let named: serde_json::Map<String, Value> =
            terms.iter().map(|(name, x)| (name.clone(), json!(x))).collect();
        self.journal.write(&json!({
            "step": self.step,
            "kind": "train",
            "loss": loss,
            "terms": named,
            "lr": lr,
            "gradient_norm": gradient_norm,
            "ms_per_step": (ms * 10.0).round() / 10.0,
            "tokens_per_s": tokens.round(),
        }))?;
        let mut scalars = vec![
            ("train/loss".to_owned(), loss),
            ("train/lr".to_owned(), lr),
            ("train/gradient_norm".to_owned(), gradient_norm),
            ("train/ms_per_step".to_owned(), ms),
            ("train/tokens_per_s".to_owned(), tokens),
        ];
        scalars.extend(terms.into_iter().map(|(name, x)| (format!("train/{name}"), x)));
        self.events.scalars(self.step, &scalars)
    }

    /// Validate the weights that would be exported; nothing without validation examples.
    fn validate(&mut self) -> Result<Option<Validation>> {
        if self.validator.is_empty() {
            return Ok(None);
        }
        self.progress.note("validating");
        let ema = self.optimizer.ema();
        if ema.is_empty() {
            return self.validator.validate(&self.learner).map(Some);
        }
        let own: Vec<_> = self.learner.parameters().iter().map(|(_, p)| p.detach().copy()).collect();
        self.learner.load(ema)?;
        let result = self.validator.validate(&self.learner);
        self.learner.load(&own)?;
        result.map(Some)
    }

    fn report(&mut self, v: &Validation, better: bool) -> Result<()> {
        if better {
            self.best = Some((self.step, v.score));
        }
        tracing::info!(
            "step {} validation: recall {:.2}% at {} kept{}, loss {:.4}, Spearman {:.3}, {} context{}",
            self.step,
            100.0 * v.score,
            self.validator.best_by(),
            if better { " (best)" } else { "" },
            v.loss,
            v.spearman,
            v.contexts,
            if v.contexts == 1 { "" } else { "s" }
        );
        self.journal.write(&v.to_json(self.step, better))?;
        self.events.scalars(self.step, &v.scalars())
    }

    /// Save everything that later steps depend on, unless this step is saved already.
    fn save_once(&mut self) -> Result<()> {
        if self.saved == Some(self.step) {
            return Ok(());
        }
        self.check_loss()?;
        let state = self.state()?;
        state.check_finite().map_err(|e| self.diverged(e))?;
        // The metrics first: a checkpoint must not know of steps that they lack.
        self.journal.sync()?;
        let run = RunLayout::new(self.store.path().parent().unwrap_or(self.store.path()));
        pkv_files::push(&run.train())?;
        pkv_files::push(&run.events())?;
        self.store.save(&state)?;
        self.saved = Some(self.step);
        Ok(())
    }

    /// Everything that later steps depend on, now.
    fn state(&self) -> Result<TrainingState> {
        let (first_moments, second_moments) = self.optimizer.moments();
        let copy = |x: &[tch::Tensor]| x.iter().map(tch::Tensor::shallow_clone).collect::<Vec<_>>();
        let named = |parameters: &[(String, tch::Tensor)]| {
            parameters.iter().map(|(name, p)| (name.clone(), p.detach())).collect::<Vec<_>>()
        };
        let mut extra = json!({"window": self.window.save()?});
        if let Some(schedule) = self.schedule.save() {
            extra["schedule"] = schedule;
        }
        Ok(TrainingState {
            step: self.step,
            network: named(self.learner.mapper.parameters()),
            loss: named(self.learner.loss.parameters()),
            buffers: self.learner.mapper.buffers(),
            first_moments,
            second_moments,
            ema: copy(self.optimizer.ema()),
            validation: self.score,
            extra,
        })
    }

    /// Loss and gradient of every step so far were finite.
    fn check_loss(&self) -> Result<()> {
        let Some(step) = self.window.broken()? else { return Ok(()) };
        let cause = anyhow::anyhow!("the loss or its gradient is not a finite number");
        // The weights before this step give that loss.
        Err(cause.context(Diverged { step, bad_from: step, saved: self.checkpoints() }))
    }

    /// The last step went wrong.
    fn diverged(&self, cause: anyhow::Error) -> anyhow::Error {
        let saved = self.checkpoints();
        cause.context(Diverged { step: self.step.saturating_sub(1), bad_from: self.step, saved })
    }

    /// Steps of the checkpoints that are there.
    fn checkpoints(&self) -> Vec<u64> {
        self.store.list().unwrap_or_default().iter().map(|info| info.step).collect()
    }
}
