//! How good a mapper is on the validation split.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use pkv_core::{Policy, RetentionRatio, Seed};
use pkv_mapper::{Mapper, hybrid_loss};
use pkv_prune::metrics::{KeptAgreement, kendall_per_head, spearman_per_head};
use pkv_recipe::{LossSection, TrainSection};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use crate::dataset::Dataset;

/// Retention ratios that every validation reports.
pub const VALIDATION_RATIOS: [f64; 8] = [0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01];

/// Contexts that are read and compared side by side: what they hold together stays small.
const THREADS: usize = 16;

/// Means over the validation contexts.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    pub contexts: usize,
    /// Hybrid loss, on the same targets as in training.
    pub loss: f64,
    /// Per policy and ratio: agreement with KVzip's raw scores.
    pub kept: Vec<(Policy, f64, KeptAgreement)>,
    /// Mean over contexts and KV heads.
    pub spearman: f64,
    pub kendall: f64,
    /// Mean recall at `train.best_by`, policy `pair`: decides which checkpoint is best.
    pub score: f64,
}

/// Validate `mapper` on `rows` of `dataset`.
///
/// # Errors
/// There are no rows, or a shard is damaged.
pub fn validate(
    mapper: &Mapper,
    dataset: &Dataset,
    rows: &[u64],
    loss: &LossSection,
    train: &TrainSection,
    seed: Seed,
) -> Result<Validation> {
    let _no_grad = tch::no_grad_guard();
    let ratios = ratios(&train.best_by);
    // Per policy and ratio: recall, mass, relative mass, realised ratio.
    let mut sums = vec![[0.0; 4]; Policy::ALL.len() * ratios.len()];
    let (mut loss_sum, mut spearman, mut kendall) = (0.0, 0.0, 0.0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS);
    for (group, rows) in rows.chunks(threads).enumerate() {
        let contexts = side_by_side(rows.to_vec(), |row| dataset.context(row))?;
        let mut pairs = Vec::with_capacity(contexts.len());
        for (i, context) in contexts.into_iter().enumerate() {
            let scores_bot =
                mapper.predict(&context.heads_pct.unsqueeze(0), &context.globals_ct.unsqueeze(0));
            let y_bot = context.targets(&train.target_pool).unsqueeze(0);
            let seed = seed.derive("validate.pairs", (group * threads + i) as u64);
            loss_sum += hybrid_loss(mapper, &scores_bot, &y_bot, loss, seed)?.total.double_value(&[]);
            pairs.push((scores_bot.squeeze_dim(0).to_device(Device::Cpu), context.scores_ot));
        }
        // In the contexts' order, so that sums are the same for any number of threads.
        for of in
            side_by_side(pairs, |(predicted_ot, oracle_ot)| compare(&predicted_ot, &oracle_ot, &ratios))?
        {
            for (sum, a) in sums.iter_mut().zip(&of.kept) {
                for (sum, x) in sum.iter_mut().zip([a.recall, a.mass, a.mass_of_oracle, a.realised_ratio]) {
                    *sum += x;
                }
            }
            spearman += of.spearman;
            kendall += of.kendall;
        }
    }
    let n = rows.len() as f64;
    let kept: Vec<_> = cells(&ratios)
        .zip(sums)
        .map(|((policy, ratio), s)| {
            let [recall, mass, mass_of_oracle, realised_ratio] = s.map(|x| x / n);
            (policy, ratio, KeptAgreement { recall, mass, mass_of_oracle, realised_ratio })
        })
        .collect();
    let best: Vec<f64> = kept
        .iter()
        .filter(|(policy, ratio, _)| *policy == Policy::Pair && train.best_by.contains(ratio))
        .map(|(_, _, a)| a.recall)
        .collect();
    Ok(Validation {
        contexts: rows.len(),
        loss: loss_sum / n,
        kept,
        spearman: spearman / n,
        kendall: kendall / n,
        score: mean(&best),
    })
}

/// One context's agreement with KVzip.
struct Comparison {
    /// Per policy and ratio.
    kept: Vec<KeptAgreement>,
    spearman: f64,
    kendall: f64,
}

fn compare(predicted_ot: &Tensor, oracle_ot: &Tensor, ratios: &[f64]) -> Result<Comparison> {
    let ratio = |r: &f64| RetentionRatio::new(*r).ok().with_context(|| format!("{r} is no retention ratio"));
    let ratios = ratios.iter().map(ratio).collect::<Result<Vec<_>>>()?;
    let kept = Policy::ALL
        .into_iter()
        .map(|policy| KeptAgreement::at_ratios(predicted_ot, oracle_ot, oracle_ot, policy, &ratios));
    Ok(Comparison {
        kept: kept.collect::<Result<Vec<_>>>()?.concat(),
        spearman: mean(&spearman_per_head(predicted_ot, oracle_ot)?),
        kendall: mean(&kendall_per_head(predicted_ot, oracle_ot)?),
    })
}

/// `f` of every item on a thread of its own, libtorch's operations on that thread alone; results in the items' order.
fn side_by_side<T: Send, U: Send>(items: Vec<T>, f: impl Fn(T) -> Result<U> + Sync) -> Result<Vec<U>> {
    let f = &f;
    let _single = SingleThreaded::set();
    std::thread::scope(|scope| {
        let running: Vec<_> = items.into_iter().map(|item| scope.spawn(move || f(item))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// libtorch's own threads off for threads that start while it lives: otherwise each of them would start as many as there
/// are cores.
struct SingleThreaded(i32);

impl SingleThreaded {
    fn set() -> Self {
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        Self(threads)
    }
}

impl Drop for SingleThreaded {
    fn drop(&mut self) {
        tch::set_num_threads(self.0);
    }
}

impl Validation {
    /// The line of `metrics.jsonl`.
    pub fn to_json(&self, step: u64, best: bool) -> Value {
        json!({
            "step": step,
            "kind": "validation",
            "loss": self.loss,
            "score": self.score,
            "best": best,
            "recall": self.by_policy(|a| a.recall),
            "mass": self.by_policy(|a| a.mass),
            "mass_of_oracle": self.by_policy(|a| a.mass_of_oracle),
            "realised_ratio": self.by_policy(|a| a.realised_ratio),
            "spearman": self.spearman,
            "kendall": self.kendall,
            "contexts": self.contexts,
        })
    }

    /// Scalars for TensorBoard: of the metrics per policy only recall, by ratio.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let mut out = vec![
            ("validation/loss".to_owned(), self.loss),
            ("validation/score".to_owned(), self.score),
            ("validation/spearman".to_owned(), self.spearman),
            ("validation/kendall".to_owned(), self.kendall),
        ];
        let tag = |policy: Policy, ratio: f64| format!("recall {}/{ratio}", policy.name());
        out.extend(self.kept.iter().map(|(policy, ratio, a)| (tag(*policy, *ratio), a.recall)));
        out
    }

    fn by_policy(&self, of: impl Fn(&KeptAgreement) -> f64) -> Value {
        let mut policies: BTreeMap<Policy, Map<String, Value>> = BTreeMap::new();
        for (policy, ratio, agreement) in &self.kept {
            policies.entry(*policy).or_default().insert(ratio.to_string(), of(agreement).into());
        }
        policies
            .into_iter()
            .map(|(policy, m)| (policy.name().to_owned(), Value::Object(m)))
            .collect::<Map<_, _>>()
            .into()
    }
}

/// The reported ratios and those of `best_by`, largest first.
fn ratios(best_by: &[f64]) -> Vec<f64> {
    let mut all: Vec<f64> = VALIDATION_RATIOS.iter().chain(best_by).copied().collect();
    all.sort_by(|a, b| b.total_cmp(a));
    all.dedup();
    all
}

fn cells(ratios: &[f64]) -> impl Iterator<Item = (Policy, f64)> + '_ {
    Policy::ALL.into_iter().flat_map(|policy| ratios.iter().map(move |&ratio| (policy, ratio)))
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}
