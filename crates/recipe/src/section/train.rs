//! `[train]`: the optimization loop.

use anyhow::{Result, ensure};
use pkv_core::Seed;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::steps::{AutoSteps, Steps};

/// AdamW over the training examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Optimizer steps: a number, or `auto`, until validation no longer gains. How many a new pair needs is
    /// not known: the tiny ones 1,500, the first real one more than twice as many.
    pub steps: Steps,
    /// `auto`: maximum number of steps, including the decay; absent: 20,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// `auto`: validations in a row without a gain, after which the learning rate decays and training ends;
    /// absent: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// `auto`: the least rise of the mean recall at `best_by` that counts as a gain; absent: 0.001.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_gain: Option<f64>,
    /// `auto`: steps of the decay, as a share of those before it; absent: 0.25, a fifth of the whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<f64>,
    /// Training contexts to learn from, drawn by the recipe's seed; absent: all. Smaller draws are part of
    /// larger ones, so a learning curve needs one set of labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contexts: Option<usize>,
    /// Seed of the start, the order of contexts and all else that training draws; absent: the recipe's. Other
    /// seeds on the same labels show the spread of a run's figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<Seed>,
    /// Export, run folder or name of a run beside this one whose mapper's weights training starts from,
    /// instead of the ridge solution and random numbers. Layers, KV heads, sources, channels and `[mapper]`
    /// must be the same; means and deviations are this run's own. Absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_from: Option<String>,
    /// Contexts of similar length per step.
    pub batch: usize,
    /// Maximum number of tokens of a context that a step reads; longer contexts give several windows per
    /// epoch, slices of one long labelled context. Absent: contexts are read whole, which is best for short
    /// ones.
    pub window_tokens: Option<usize>,
    /// Shortest crop of a batch's windows, as a share of them: each batch draws its own between this and
    /// 1, at random places. 1 is off. Features and labels belong to their position, so a crop is valid.
    pub crop: f64,
    /// Number format of the mapper's stages in a training step; parameters and loss are f32 in any.
    pub dtype: TrainDtype,
    /// Deviation of noise added to the standardized features that the stages see; 0 is off.
    pub feature_noise: f64,
    /// Share of a context's (proxy head, channel) feature rows that the stages do not see in a step; 0 is
    /// off.
    pub feature_dropout: f64,
    /// Dropout inside the context encoder; 0 is off.
    pub dropout: f64,
    /// Peak learning rate. A number of steps: cosine to 1% of it. `auto`: constant after the warm-up, then a
    /// `1 - sqrt` decay to 1%.
    pub lr: f64,
    /// Pairs of a step and a factor, in the order of the steps: from that step on, the learning rate is
    /// multiplied by the factor. After a divergence, training resumes from its last checkpoint with one.
    /// Checkpoints up to the step of a cut do not depend on it. Empty: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = Vec::<(u64, f64)>::new()))]
    pub lr_cuts: Vec<(u64, f64)>,
    /// Linear warm-up, steps.
    pub warmup_steps: u64,
    /// AdamW: decay of the mean gradient.
    pub beta1: f64,
    /// AdamW: decay of the mean squared gradient.
    pub beta2: f64,
    /// AdamW: added to the root of the mean squared gradient.
    pub eps: f64,
    /// AdamW: decay of the weights, on matrices only.
    pub weight_decay: f64,
    /// Largest gradient norm; longer gradients are scaled down to it.
    pub clip_norm: f64,
    /// Decay of the exponential moving average of the weights that is validated and exported; 0 is off.
    pub ema: f64,
    /// Steps between validations.
    pub validate_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Recent checkpoints kept, beside the best.
    pub keep_checkpoints: usize,
    /// Retention ratios whose mean validation recall decides which checkpoint is best.
    pub best_by: Vec<f64>,
    /// Steps between log lines.
    pub log_every: u64,
    /// Span pooling of the labels.
    pub target_pool: TargetPool,
    /// Decoded examples kept in memory, GB; those that fit are decoded once. Absent: a quarter of the free
    /// memory.
    pub cache_gb: Option<f64>,
    /// Threads that assemble batches. Absent: up to 8, fewer on fewer cores and for large batches.
    pub loader_threads: Option<usize>,
}

/// Number format of a training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainDtype {
    /// f32 on a CPU. On a GPU bf16 for mappers of hundreds of heads, which are bound by memory, and TF32
    /// for small ones, which are bound by kernel launches.
    #[default]
    Auto,
    /// f32 throughout.
    F32,
    /// f32 with 10-bit mantissas inside matrix products, on a GPU; plain f32 on a CPU.
    Tf32,
    /// bf16 in the stages.
    Bf16,
}

/// y' = (1 - blend) y + blend maxpool_width(y) along positions, on the log-odds scale.
///
/// Width 3, blend 0.5: 43.3% of answers at 1% kept against 32.5% of raw KVzip on the tiny target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TargetPool {
    /// Positions, odd; 1 is off.
    pub width: usize,
    /// In [0, 1]; 0 is off.
    pub blend: f64,
}

impl Default for TargetPool {
    fn default() -> Self {
        Self { width: 3, blend: 0.5 }
    }
}

impl TargetPool {
    pub const OFF: Self = Self { width: 1, blend: 0.0 };
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: Steps::Number(1500),
            max_steps: None,
            patience: None,
            min_gain: None,
            decay: None,
            contexts: None,
            seed: None,
            start_from: None,
            batch: 16,
            window_tokens: None,
            crop: 1.0,
            dtype: TrainDtype::Auto,
            feature_noise: 0.0,
            feature_dropout: 0.0,
            dropout: 0.0,
            lr: 2e-3,
            lr_cuts: Vec::new(),
            warmup_steps: 50,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.02,
            clip_norm: 1.0,
            ema: 0.0,
            validate_every: 100,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            best_by: vec![0.05, 0.02, 0.01],
            log_every: 10,
            target_pool: TargetPool::default(),
            cache_gb: None,
            loader_threads: None,
        }
    }
}

impl TrainSection {
    /// The choices that a trained mapper depends on: how batches are loaded is none of them. Nor is the place
    /// of the export that training starts from: its hash goes into the fingerprint beside them.
    #[must_use]
    pub fn choices(&self) -> Self {
        let all = Self { cache_gb: None, loader_threads: None, start_from: None, ..self.clone() };
        match self.steps {
            Steps::Number(_) => Self { max_steps: None, patience: None, min_gain: None, decay: None, ..all },
            // Spelt out, since a default may change.
            Steps::Auto => {
                let AutoSteps { max_steps, patience, min_gain, decay } = self.auto_or_defaults();
                let (max_steps, patience) = (Some(max_steps), Some(patience));
                Self { max_steps, patience, min_gain: Some(min_gain), decay: Some(decay), ..all }
            }
        }
    }

    /// What ends training, if the steps are `auto`.
    #[must_use]
    pub fn auto(&self) -> Option<AutoSteps> {
        (self.steps == Steps::Auto).then(|| self.auto_or_defaults())
    }

    fn auto_or_defaults(&self) -> AutoSteps {
        let default = AutoSteps::default();
        AutoSteps {
            max_steps: self.max_steps.unwrap_or(default.max_steps),
            patience: self.patience.unwrap_or(default.patience),
            min_gain: self.min_gain.unwrap_or(default.min_gain),
            decay: self.decay.unwrap_or(default.decay),
        }
    }

    /// Steps that training never exceeds.
    #[must_use]
    pub fn most_steps(&self) -> u64 {
        match self.steps {
            Steps::Number(steps) => steps,
            Steps::Auto => self.auto_or_defaults().max_steps,
        }
    }

    /// `1500`, or `auto, at most 20000`.
    #[must_use]
    pub fn steps_in_words(&self) -> String {
        match self.steps {
            Steps::Number(steps) => steps.to_string(),
            Steps::Auto => format!("auto, at most {}", self.most_steps()),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.steps != Steps::Number(0), "`train.steps` is 0");
        let AutoSteps { max_steps, patience, min_gain, decay } = self.auto_or_defaults();
        ensure!(max_steps > 0, "`train.max_steps` is 0");
        ensure!(patience > 0, "`train.patience` is 0; training would end at its first validation");
        ensure!(
            (0.0..1.0).contains(&min_gain),
            "`train.min_gain` is {min_gain}; recall is a share, 0 <= min_gain < 1"
        );
        ensure!(
            decay > 0.0 && decay <= 1.0,
            "`train.decay` is {decay}; it is a share of the steps before it, 0 < decay <= 1"
        );
        ensure!(
            self.contexts != Some(0),
            "`train.contexts` is 0; leave it out to learn from every training context"
        );
        ensure!(
            self.start_from.as_deref() != Some(""),
            "`train.start_from` is empty; leave it out to start from the ridge solution"
        );
        ensure!(self.batch > 0, "`train.batch` is 0");
        ensure!(
            self.window_tokens != Some(0),
            "`train.window_tokens` is 0; leave it out to read contexts whole"
        );
        ensure!(self.lr > 0.0, "`train.lr` is {}; it must be positive", self.lr);
        for &(step, factor) in &self.lr_cuts {
            ensure!(
                factor > 0.0 && factor < 1.0 && step < self.most_steps(),
                "`train.lr_cuts` has [{step}, {factor}]; expected a step below {} and 0 < factor < 1",
                self.most_steps()
            );
        }
        ensure!(
            self.lr_cuts.windows(2).all(|w| w[0].0 < w[1].0),
            "`train.lr_cuts` is not in the order of its steps, or has a step twice"
        );
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2), ("ema", self.ema)] {
            ensure!((0.0..1.0).contains(&beta), "`train.{name}` is {beta}; it must be in [0, 1)");
        }
        let crop = self.crop;
        ensure!(crop > 0.0 && crop <= 1.0, "`train.crop` is {crop}; it is a share, 0 < crop <= 1");
        let noise = self.feature_noise;
        ensure!(
            noise >= 0.0 && noise.is_finite(),
            "`train.feature_noise` is {noise}; a deviation is 0 or more"
        );
        for (name, share) in [("feature_dropout", self.feature_dropout), ("dropout", self.dropout)] {
            ensure!((0.0..1.0).contains(&share), "`train.{name}` is {share}; it must be in [0, 1)");
        }
        if let Some(gb) = self.cache_gb {
            ensure!(gb >= 0.0 && gb.is_finite(), "`train.cache_gb` is {gb}; it must be 0 (no cache) or more");
        }
        ensure!(
            self.loader_threads != Some(0),
            "`train.loader_threads` is 0; leave it out to have them chosen"
        );
        ensure!(self.clip_norm > 0.0, "`train.clip_norm` is {}; it must be positive", self.clip_norm);
        for (name, n) in [
            ("validate_every", self.validate_every),
            ("checkpoint_every", self.checkpoint_every),
            ("log_every", self.log_every),
        ] {
            ensure!(n > 0, "`train.{name}` is 0");
        }
        ensure!(self.keep_checkpoints > 0, "`train.keep_checkpoints` is 0; the last one is needed to resume");
        super::eval::check_ratios("train.best_by", &self.best_by)?;
        let TargetPool { width, blend } = self.target_pool;
        ensure!(width % 2 == 1, "`train.target_pool.width` is {width}; it must be odd to be centred");
        ensure!((0.0..=1.0).contains(&blend), "`train.target_pool.blend` is {blend}; it must be in [0, 1]");
        Ok(())
    }
}
