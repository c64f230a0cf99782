//! The methods that score KV pairs: the mapper, KVzip's own scores, and the baselines.
//!
//! All of them give one score per (target layer, KV head, position), higher means keep; turning
//! scores into masks is `prune`'s. Baselines that learn are fitted on training shards ([`fit`]).
//!
//! Dimension key: l target layer, h target KV head, o both flattened, p proxy KV head, c channel,
//! t position.

mod align;
mod fit;
mod kvzap;
mod linear;
mod positional;
mod snapkv;

use anyhow::{Context, Result, ensure};
use pkv_core::Seed;
use pkv_mapper::Mapper;
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::{Method, TargetPool};
use tch::Tensor;

pub use fit::{Baselines, FitData, feature_tensors, label_tensor, read_pair};
pub use kvzap::{KvzapScores, KvzapTap, Several};
pub use linear::predict;
pub use snapkv::QueryTail;

use crate::clock::Clock;

/// What the methods see of one context.
pub struct Material {
    /// KVzip's raw scores, f32 `[layers, KV heads, positions]`.
    pub label_lht: Tensor,
    /// Raw proxy features, `[proxy heads, channels, positions]` and `[globals, positions]`.
    pub heads_pct: Tensor,
    pub globals_ct: Tensor,
    /// SnapKV's scores, if that method is asked for.
    pub snapkv_lht: Option<Tensor>,
    /// KVzap's scores, as far as they are asked for.
    pub kvzap: KvzapScores,
}

/// Which random numbers a context draws: a task's name and the context's index in it.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    pub task: &'a str,
    pub index: u64,
}

/// One method's scores of one context, `[layers, KV heads, positions]`.
pub struct Scored {
    pub method: Method,
    pub scores_lht: Tensor,
}

/// The chosen methods, ready to score.
pub struct Methods<'a> {
    methods: Vec<Method>,
    mapper: &'a Mapper,
    baselines: Baselines,
    pool: TargetPool,
    seed: Seed,
}

impl<'a> Methods<'a> {
    pub fn new(
        methods: &[Method],
        mapper: &'a Mapper,
        baselines: Baselines,
        pool: TargetPool,
        seed: Seed,
    ) -> Self {
        Self { methods: methods.to_vec(), mapper, baselines, pool, seed }
    }

    pub fn includes(&self, method: Method) -> bool {
        self.methods.contains(&method)
    }

    /// The fitted KVzap-style scorers, if one of them is asked for.
    pub fn kvzap(&self) -> Option<&kvzap::Kvzap> {
        self.baselines.kvzap()
    }

    /// Does any of them look at the target's prefill?
    pub fn look_at_target(&self) -> bool {
        self.methods.iter().any(|m| *m == Method::Snapkv || m.reads_hidden_states())
    }

    /// Scores of every chosen method, in the order chosen.
    ///
    /// # Errors
    /// A method lacks what it looks at.
    pub fn score(&self, material: &Material, draw: Draw, clock: &mut Clock) -> Result<Vec<Scored>> {
        let _no_grad = tch::no_grad_guard();
        let one = |&method: &Method| {
            let what = format!("scores: {}", method.name());
            let scores_lht = clock
                .time(&what, || self.score_by(method, material, draw))
                .with_context(|| format!("scoring by `{}`", method.name()))?;
            ensure!(
                scores_lht.size() == material.label_lht.size(),
                "`{}` scored {:?} KV pairs, expected {:?}",
                method.name(),
                scores_lht.size(),
                material.label_lht.size()
            );
            Ok(Scored { method, scores_lht })
        };
        self.methods.iter().map(one).collect()
    }

    fn score_by(&self, method: Method, m: &Material, draw: Draw) -> Result<Tensor> {
        let (layers, kv_heads, positions) = m.label_lht.size3()?;
        let (heads, device) = (layers * kv_heads, m.label_lht.device());
        let mut rng = self.seed.stream(&format!("eval {} {}", draw.task, method.name()), draw.index);
        let scores = match method {
            Method::Mapper => linear::predict(self.mapper, &m.heads_pct, &m.globals_ct)?,
            Method::Kvzip => m.label_lht.shallow_clone(),
            Method::KvzipPooled => pool_targets(&log_odds(&m.label_lht), &self.pool),
            Method::KvzapLinear | Method::KvzapMlp => m.kvzap.by(method)?,
            Method::Linear => self.baselines.linear()?.scores(&m.heads_pct, &m.globals_ct)?,
            Method::ProxyLinear => self.baselines.proxy_linear()?.scores(&m.heads_pct, &m.globals_ct)?,
            Method::Iam => self.baselines.iam(&m.heads_pct)?,
            Method::HeadPrior => positional::head_prior(self.baselines.mean_o()?, positions, &mut rng),
            Method::StreamingLlm => positional::streaming_llm(heads, positions, device),
            Method::Snapkv => {
                m.snapkv_lht.as_ref().context("the target's last queries were not kept")?.shallow_clone()
            }
            Method::Random => positional::random(heads, positions, &mut rng, device),
        };
        Ok(scores.to_device(device).reshape([layers, kv_heads, positions]))
    }
}
