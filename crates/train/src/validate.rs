//! Validation of a mapper on the validation split.
//!
//! Owns the choice of contexts, the data kept between validations, and the means. The metrics are `prune`'s.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use pkv_core::{Policy, RetentionRatio, Seed};
use pkv_gpu::MathMode;
use pkv_prune::metrics::{Agreement, Budgets, KeptAgreement, Reference, kendall_per_head, spearman_per_head};
use pkv_recipe::TrainSection;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::dataset::{ContextTensors, Dataset};
use crate::learner::Learner;

/// Retention ratios that every validation reports.
pub const VALIDATION_RATIOS: [f64; 8] = [0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01];

/// Contexts that are read and compared side by side: what they hold together stays small.
const THREADS: usize = 16;

/// Most positions of one forward on a GPU: enough work to fill it, 50 MB of activations per 100 numbers that
/// a position has.
const POSITIONS_PER_FORWARD: usize = 1 << 15;

/// Most bytes of decoded contexts that are kept between validations, and the share of the device's free
/// memory that they may take, whichever is less. 60 contexts of 1,024 to 4,096 tokens, 56 heads, 9 channels:
/// 0.5 GB. Contexts beyond it are read and ranked each time.
const KEPT_BYTES: u64 = 4 << 30;
const KEPT_SHARE: u64 = 4;

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

/// Device on which predictions are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranking {
    /// Threads of the host, a context each.
    Host,
    /// The mapper's device, in sorts and counts; one copy to the host in the end.
    Device,
}

impl Ranking {
    /// The faster one.
    pub fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Device } else { Self::Host }
    }
}

/// The validation contexts of a run, and what of them outlasts a validation.
pub struct Validator<'a> {
    dataset: &'a Dataset,
    rows: Vec<u64>,
    train: &'a TrainSection,
    seed: Seed,
    ratios: Vec<f64>,
    ranking: Ranking,
    /// By place in `rows`; filled up to `budget` bytes, which is settled by the first validation.
    kept: HashMap<usize, Rc<Ready>>,
    bytes: u64,
    budget: Option<u64>,
}

/// A context as validations use it, on the mapper's device.
struct Ready {
    heads_pct: Tensor,
    globals_ct: Tensor,
    /// Training targets.
    y_ot: Tensor,
    scores_ot: Tensor,
    /// The scores ranked, where the device ranks.
    reference: Option<Reference>,
}

impl Ready {
    fn new(context: ContextTensors, validator: &Validator, device: Device) -> Result<Self> {
        let to = |x: &Tensor| x.to_device(device);
        let scores_ot = to(&context.scores_ot);
        let reference = match validator.ranking {
            Ranking::Host => None,
            Ranking::Device => {
                Some(Reference::new(&scores_ot, &scores_ot, &retention_ratios(&validator.ratios)?)?)
            }
        };
        Ok(Self {
            y_ot: to(&context.targets(&validator.train.target_pool)),
            heads_pct: to(&context.heads_pct),
            globals_ct: to(&context.globals_ct),
            scores_ot,
            reference,
        })
    }

    fn bytes(&self) -> u64 {
        let numbers = [&self.heads_pct, &self.globals_ct, &self.y_ot, &self.scores_ot].map(Tensor::numel);
        let ranked =
            self.reference.as_ref().map_or(0, |_| Reference::BYTES_PER_PAIR * self.scores_ot.numel());
        (4 * numbers.iter().sum::<usize>() + ranked) as u64
    }
}

impl<'a> Validator<'a> {
    /// The shares kept that the score is the mean of, in words.
    pub fn best_by(&self) -> String {
        let percent = |ratio: &f64| format!("{}", (ratio * 1e6).round() / 1e4);
        format!("{}%", self.train.best_by.iter().map(percent).collect::<Vec<_>>().join(", "))
    }

    /// Validate on `rows` of `dataset`, which all have positions.
    pub fn new(
        dataset: &'a Dataset,
        rows: Vec<u64>,
        train: &'a TrainSection,
        seed: Seed,
        ranking: Ranking,
    ) -> Self {
        let ratios = ratios(&train.best_by);
        let kept = HashMap::new();
        Self { dataset, rows, train, seed, ratios, ranking, kept, bytes: 0, budget: None }
    }

    /// Keep at most `bytes` of decoded and ranked contexts between validations.
    #[must_use]
    pub fn with_budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// Bytes kept between validations.
    pub fn kept_bytes(&self) -> u64 {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Measure the mapper, and the loss at it.
    ///
    /// # Errors
    /// A shard is damaged, or the device fails.
    pub fn validate(&mut self, learner: &Learner) -> Result<Validation> {
        let Learner { mapper, loss } = learner;
        let _no_grad = tch::no_grad_guard();
        let n = self.rows.len();
        let mut losses: Vec<Option<Tensor>> = (0..n).map(|_| None).collect();
        let mut agreements: Vec<Option<Agreement>> = (0..n).map(|_| None).collect();
        // Comparisons on the device, by context.
        let mut compared: Vec<(usize, Budgets, Tensor)> = Vec::new();
        let waves = self.waves();
        for i in waves.iter().flatten().flatten().filter(|i| !self.kept.contains_key(i)) {
            // Before all batches: training waits for it.
            self.dataset.expect(self.rows[*i], 0);
        }
        for wave in waves {
            let ready = self.ready(&wave, mapper.device())?;
            let mut pairs = Vec::new();
            for forward in wave {
                let of: Vec<&Rc<Ready>> = forward.iter().map(|i| &ready[i]).collect();
                let stack =
                    |x: fn(&Ready) -> &Tensor| Tensor::stack(&of.iter().map(|r| x(r)).collect::<Vec<_>>(), 0);
                let alone = MathMode::as_set(mapper.device());
                let scores_bot = mapper.predict(&stack(|r| &r.heads_pct), &stack(|r| &r.globals_ct));
                drop(alone);
                for (b, (&i, ready)) in forward.iter().zip(of).enumerate() {
                    let scores_bot = scores_bot.narrow(0, b as i64, 1);
                    let seed = self.seed.derive("validate.pairs", i as u64);
                    let y_bot = ready.y_ot.unsqueeze(0);
                    losses[i] = Some(loss.of(&scores_bot, &y_bot, seed)?.total);
                    let scores_ot = scores_bot.squeeze_dim(0);
                    match &ready.reference {
                        Some(r) => compared.push((i, r.budgets().clone(), r.compare(&scores_ot)?)),
                        None => pairs.push((i, on_host(&scores_ot), on_host(&ready.scores_ot))),
                    }
                }
            }
            let ratios = &self.ratios;
            let host = side_by_side(pairs, |(i, predicted_ot, oracle_ot)| {
                Ok((i, compare(&predicted_ot, &oracle_ot, ratios)?))
            })?;
            host.into_iter().for_each(|(i, agreement)| agreements[i] = Some(agreement));
        }
        // All that the device was asked, in one copy.
        let mut all: Vec<Tensor> = losses.into_iter().flatten().map(|x| x.reshape([1])).collect();
        all.extend(compared.iter().map(|(_, _, numbers)| numbers.shallow_clone()));
        let all: Vec<Tensor> = all.iter().map(|x| x.to_kind(Kind::Double)).collect();
        let values: Vec<f64> = if all.is_empty() {
            Vec::new()
        } else {
            Vec::try_from(Tensor::cat(&all, 0).to_device(Device::Cpu)).context("cannot read a validation")?
        };
        let (losses, mut rest) = values.split_at(n);
        for (i, budgets, _) in &compared {
            let (mine, others) = rest.split_at(budgets.numbers());
            agreements[*i] = Some(budgets.read(mine)?);
            rest = others;
        }
        Ok(self.means(losses, &agreements.into_iter().flatten().collect::<Vec<_>>()))
    }

    /// Places in `rows`: contexts that are prepared together, in those that one forward takes.
    fn waves(&self) -> Vec<Vec<Vec<usize>>> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS);
        let all: Vec<usize> = (0..self.rows.len()).collect();
        if self.ranking == Ranking::Host {
            return all.chunks(threads).map(|wave| wave.iter().map(|&i| vec![i]).collect()).collect();
        }
        let length = |i: &usize| self.dataset.positions(self.rows[*i]);
        let mut by_length = all;
        by_length.sort_by_key(length);
        // Contexts of one length alone: padding would be seen by the convolutions.
        let forwards = by_length.chunk_by(|a, b| length(a) == length(b)).flat_map(|same| {
            let most = (POSITIONS_PER_FORWARD / length(&same[0]).max(1)).max(1);
            same.chunks(most).map(<[usize]>::to_vec).collect::<Vec<_>>()
        });
        let mut waves: Vec<Vec<Vec<usize>>> = Vec::new();
        for forward in forwards {
            match waves.last_mut().filter(|w| w.iter().map(Vec::len).sum::<usize>() < threads) {
                Some(wave) => wave.push(forward),
                None => waves.push(vec![forward]),
            }
        }
        waves
    }

    /// The contexts of a wave, those that are not kept read side by side.
    fn ready(&mut self, wave: &[Vec<usize>], device: Device) -> Result<HashMap<usize, Rc<Ready>>> {
        let budget = *self
            .budget
            .get_or_insert_with(|| free_bytes(device).map_or(0, |b| b / KEPT_SHARE).min(KEPT_BYTES));
        let all: Vec<usize> = wave.concat();
        let missing: Vec<usize> = all.iter().copied().filter(|i| !self.kept.contains_key(i)).collect();
        let (dataset, rows) = (self.dataset, &self.rows);
        let read = side_by_side(missing, |i| Ok((i, dataset.context(rows[i])?)))?;
        let mut ready = HashMap::new();
        for (i, context) in read {
            let made = Rc::new(Ready::new(context, self, device)?);
            if self.bytes + made.bytes() <= budget {
                self.bytes += made.bytes();
                self.kept.insert(i, made.clone());
            }
            ready.insert(i, made);
        }
        ready.extend(all.iter().filter_map(|i| Some((*i, self.kept.get(i)?.clone()))));
        Ok(ready)
    }

    /// In the contexts' order, so that sums are the same for any number of threads.
    fn means(&self, losses: &[f64], agreements: &[Agreement]) -> Validation {
        // Per policy and ratio: recall, mass, relative mass, realised ratio.
        let mut sums = vec![[0.0; 4]; Policy::OF_SCORES.len() * self.ratios.len()];
        let (mut spearman, mut kendall) = (0.0, 0.0);
        for of in agreements {
            for (sum, a) in sums.iter_mut().zip(&of.kept) {
                for (sum, x) in sum.iter_mut().zip([a.recall, a.mass, a.mass_of_oracle, a.realised_ratio]) {
                    *sum += x;
                }
            }
            spearman += mean(&of.spearman);
            kendall += mean(&of.kendall);
        }
        let n = self.rows.len() as f64;
        let kept: Vec<_> = cells(&self.ratios)
            .zip(sums)
            .map(|((policy, ratio), s)| {
                let [recall, mass, mass_of_oracle, realised_ratio] = s.map(|x| x / n);
                (policy, ratio, KeptAgreement { recall, mass, mass_of_oracle, realised_ratio })
            })
            .collect();
        let best: Vec<f64> = kept
            .iter()
            .filter(|(policy, ratio, _)| *policy == Policy::Pair && self.train.best_by.contains(ratio))
            .map(|(_, _, a)| a.recall)
            .collect();
        Validation {
            contexts: self.rows.len(),
            loss: losses.iter().sum::<f64>() / n,
            kept,
            spearman: spearman / n,
            kendall: kendall / n,
            score: mean(&best),
        }
    }
}

fn on_host(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu)
}

/// Memory that may still be taken where the mapper is.
fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(i) => pkv_gpu::cuda_memory(i).ok().and_then(|m| u64::try_from(m.free).ok()),
        _ => pkv_gpu::host_memory().map(|m| m.free),
    }
}

fn retention_ratios(ratios: &[f64]) -> Result<Vec<RetentionRatio>> {
    let ratio = |r: &f64| RetentionRatio::new(*r).ok().with_context(|| format!("{r} is no retention ratio"));
    ratios.iter().map(ratio).collect()
}

/// One context's agreement with KVzip, on the host.
fn compare(predicted_ot: &Tensor, oracle_ot: &Tensor, ratios: &[f64]) -> Result<Agreement> {
    let ratios = retention_ratios(ratios)?;
    let kept = Policy::OF_SCORES
        .into_iter()
        .map(|policy| KeptAgreement::at_ratios(predicted_ot, oracle_ot, oracle_ot, policy, &ratios));
    Ok(Agreement {
        kept: kept.collect::<Result<Vec<_>>>()?.concat(),
        spearman: spearman_per_head(predicted_ot, oracle_ot)?,
        kendall: kendall_per_head(predicted_ot, oracle_ot)?,
    })
}

/// `f` of every item on a thread of its own, libtorch's operations on that thread alone; results in the
/// items' order.
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

/// libtorch's own threads off for threads that start while it lives: otherwise each of them would start as
/// many as there are cores.
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
    Policy::OF_SCORES.into_iter().flat_map(|policy| ratios.iter().map(move |&ratio| (policy, ratio)))
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}
