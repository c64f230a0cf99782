//! Agreement with labels: the KV pairs that each method keeps, compared with those that KVzip keeps.
//!
//! Dimension key: l layer, h KV head, o layers x KV heads flattened, t position.

use std::borrow::Cow;

use anyhow::{Context, Result};
use pkv_core::{Policy, RetentionRatio};
use pkv_prune::metrics::{
    HeadRanks, LOG_FLOOR, OracleKept, kendall_tau_b, log_r2, log_r2_of, log_scores, recall, spearman,
};
use pkv_prune::{HeadBudgets, PolicyInputs, keep_mask, keep_mask_by};
use pkv_recipe::{EvalSection, MethodName};
use pkv_results::bootstrap::Draws;
use pkv_results::cell::{Cell, Cells, nearest};
use pkv_results::store::Outcome;
use pkv_results::timings;
use pkv_results::{HeadRecall, LabelCell, LabelResults, Made, MethodHeads, RankCell, Timing};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::methods::{self, Method, Scored};

/// Ratio of the heat maps, or the nearest one that is measured.
const HEAT_MAP_RATIO: f64 = 0.05;

/// Outcome of one test example.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelOutcome {
    /// [`pkv_results::columns::context_id`].
    pub context_id: String,
    positions: u64,
    pub cells: Cells<Agreement>,
    ranks: Vec<(MethodName, Ranks)>,
    /// At the policies and ratios of heat maps: KV pairs of each head that KVzip keeps, flat.
    oracle_heads: Vec<(Policy, RetentionRatio, Vec<u32>)>,
    heads: Cells<Heads>,
    pub timings: Vec<Timing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    pub recall: f64,
    pub mass: f64,
    realised: f64,
    /// Recall of what KVzip keeps under `pair`; absent in older outcomes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    of_pair: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Ranks {
    spearman: f64,
    kendall: f64,
    /// Absent where the scores have no variance, and in outcomes of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_r2: Option<f64>,
}

/// KV pairs of each head, flat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Heads {
    /// Those that the method keeps and KVzip too.
    both: Vec<u32>,
    /// All that the method keeps.
    kept: Vec<u32>,
}

impl Outcome for LabelOutcome {
    fn add(&mut self, new: Self) {
        self.cells.add(new.cells);
        self.heads.add(new.heads);
        for rank in new.ranks {
            if self.ranks.iter().all(|(method, _)| *method != rank.0) {
                self.ranks.push(rank);
            }
        }
        for heads in new.oracle_heads {
            if self.oracle_heads.iter().all(|(p, r, _)| (*p, *r) != (heads.0, heads.1)) {
                self.oracle_heads.push(heads);
            }
        }
        timings::add_all(&mut self.timings, &new.timings);
    }
}

/// The cells and the heat map that a section asks for.
pub struct LabelPlan {
    pub cells: Vec<Cell>,
    heat_map: (Policy, RetentionRatio),
}

impl LabelPlan {
    /// # Errors
    /// A ratio is out of range or there is none; a recipe that was checked has neither.
    pub fn new(section: &EvalSection) -> Result<Self> {
        let ratios =
            section.ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
        let policy =
            if section.policies.contains(&Policy::Pair) { Policy::Pair } else { section.policies[0] };
        let heat_map = (policy, nearest(&ratios, HEAT_MAP_RATIO));
        Ok(Self { cells: Cell::all(&section.methods, &section.policies, &ratios), heat_map })
    }

    /// Compare the scores of one example with its labels in `cells`.
    ///
    /// # Shapes
    /// - `scored`: of the cells' methods and maybe others, `[layers, KV heads, positions]`
    /// - `label_lht`: KVzip's raw scores, f32 of the same shape
    ///
    /// # Errors
    /// A cell's method did not score, or its policy lacks `budgets`.
    pub fn compare(
        &self,
        context_id: String,
        cells: &[Cell],
        scored: &[Scored],
        label_lht: &Tensor,
        budgets: Option<&HeadBudgets>,
    ) -> Result<LabelOutcome> {
        let positions = label_lht.size()[2];
        let ranking = Ranking::of(label_lht)?;
        let inputs = PolicyInputs { budgets, ..Default::default() };
        let of = |method| {
            let found = scored.iter().find(|s| s.method == method);
            found.with_context(|| format!("`{method}` has not scored this example"))
        };
        let mass_lht = label_lht.to_kind(Kind::Double);
        let mut oracle: Vec<(Policy, RetentionRatio, OracleKept)> = Vec::new();
        // What KVzip keeps where all pairs compete.
        let mut best: Vec<(RetentionRatio, Tensor)> = Vec::new();
        let mut ranks: Vec<(MethodName, Ranks)> = Vec::new();
        let (mut agreement, mut heads, mut oracle_heads) = (Vec::new(), Vec::new(), Vec::new());
        for &cell in cells {
            let at = (cell.policy, cell.ratio);
            let place = match oracle.iter().position(|(p, r, ..)| (*p, *r) == at) {
                Some(place) => place,
                None => {
                    let keep = keep_mask_by(label_lht, cell.policy, cell.ratio, &inputs)?;
                    if at == self.heat_map {
                        oracle_heads.push((cell.policy, cell.ratio, per_head(&keep)?));
                    }
                    oracle.push((cell.policy, cell.ratio, OracleKept::new(keep, &mass_lht)));
                    oracle.len() - 1
                }
            };
            if best.iter().all(|(ratio, _)| *ratio != cell.ratio) {
                best.push((cell.ratio, keep_mask(label_lht, Policy::Pair, cell.ratio)));
            }
            let of_pair = best.iter().find(|(ratio, _)| *ratio == cell.ratio).map(|(_, keep)| keep);
            let oracle_kept = &oracle[place].2;
            let scores_lht = &of(cell.method)?.scores_lht;
            let keep = keep_mask_by(scores_lht, cell.policy, cell.ratio, &inputs)?;
            let with_oracle = oracle_kept.agreement(&keep);
            let found = Agreement {
                recall: with_oracle.recall,
                mass: with_oracle.mass_of_oracle,
                realised: with_oracle.realised_ratio,
                of_pair: of_pair.map(|best| recall(&keep, best)),
            };
            agreement.push((cell, found));
            if at == self.heat_map {
                let both = per_head(&keep.logical_and(oracle_kept.keep()))?;
                heads.push((cell, Heads { both, kept: per_head(&keep)? }));
            }
            if ranks.iter().all(|(method, _)| *method != cell.method) {
                let found = ranking.correlations(cell.method, scores_lht)?;
                ranks.push((cell.method, found));
            }
        }
        Ok(LabelOutcome {
            context_id,
            positions: positions as u64,
            cells: agreement.into_iter().collect(),
            ranks,
            oracle_heads,
            heads: heads.into_iter().collect(),
            timings: Vec::new(),
        })
    }
}

/// All examples together, each cell over those that have it; `layers` and `kv_heads` give heat maps their
/// form.
pub fn summarize(
    made: Made,
    outcomes: &[(usize, LabelOutcome)],
    layers: usize,
    kv_heads: usize,
    draws: &Draws,
) -> LabelResults {
    let all = || outcomes.iter().map(|(_, o)| o);
    let cells = Cell::union(all().flat_map(|o| o.cells.cells()));
    let mut methods: Vec<MethodName> = cells.iter().map(|c| c.method).collect();
    methods.dedup();
    let cell = |cell: &Cell| {
        let mine: Vec<&Agreement> = all().filter_map(|o| o.cells.get(cell)).collect();
        let over = |f: fn(&Agreement) -> f64| mine.iter().map(|a| f(a)).collect::<Vec<f64>>();
        let draws = draws.of(mine.len());
        LabelCell {
            method: cell.method,
            policy: cell.policy,
            ratio: cell.ratio.get(),
            contexts: (mine.len() < outcomes.len()).then_some(mine.len()),
            recall: draws.mean(&over(|a| a.recall)),
            recall_of_pair: mine
                .iter()
                .map(|a| a.of_pair)
                .collect::<Option<Vec<f64>>>()
                .map(|all| draws.mean(&all)),
            mass: draws.mean(&over(|a| a.mass)),
            realised: mean(&over(|a| a.realised)),
        }
    };
    let rank = |&method: &MethodName| {
        let mine: Vec<Ranks> =
            all().flat_map(|o| &o.ranks).filter(|(m, _)| *m == method).map(|(_, r)| *r).collect();
        RankCell {
            method,
            spearman: mean(&mine.iter().map(|r| r.spearman).collect::<Vec<_>>()),
            kendall: mean(&mine.iter().map(|r| r.kendall).collect::<Vec<_>>()),
            log_r2: Some(mine.iter().filter_map(|r| r.log_r2).collect::<Vec<_>>())
                .filter(|all| !all.is_empty())
                .map(|all| mean(&all)),
        }
    };
    LabelResults {
        made,
        contexts: outcomes.len(),
        positions: all().map(|o| o.positions).sum(),
        cells: cells.iter().map(cell).collect(),
        ranks: methods.iter().map(rank).collect(),
        heads: head_recall(&all().collect::<Vec<_>>(), layers, kv_heads),
    }
}

/// The heat maps of the policy and ratio at which most methods have one; of those the ratio nearest to the
/// usual one.
fn head_recall(outcomes: &[&LabelOutcome], layers: usize, kv_heads: usize) -> Option<HeadRecall> {
    let cells = Cell::union(outcomes.iter().flat_map(|o| o.heads.cells()));
    let methods_at =
        |at: &Cell| cells.iter().filter(|c| (c.policy, c.ratio) == (at.policy, at.ratio)).count();
    let off = |at: &Cell| (at.ratio.get() / HEAT_MAP_RATIO).ln().abs();
    let chosen = cells.iter().min_by(|a, b| {
        let by_ratio = || off(a).total_cmp(&off(b)).then(a.policy.cmp(&b.policy));
        methods_at(b).cmp(&methods_at(a)).then_with(by_ratio)
    })?;
    let oracle = |o: &&LabelOutcome| -> Option<(u64, Vec<u32>)> {
        let found = o.oracle_heads.iter().find(|(p, r, _)| (*p, *r) == (chosen.policy, chosen.ratio))?;
        Some((o.positions, found.2.clone()))
    };
    let kvzip: Vec<(u64, Vec<u32>)> = outcomes.iter().filter_map(oracle).collect();
    let positions = |of: &[(u64, Vec<u32>)]| of.iter().map(|(n, _)| *n).sum::<u64>() as f64;
    let methods = cells.iter().filter(|c| (c.policy, c.ratio) == (chosen.policy, chosen.ratio));
    let methods = methods.map(|cell| {
        let mine: Vec<(&Heads, (u64, Vec<u32>))> =
            outcomes.iter().filter_map(|o| Some((o.heads.get(cell)?, oracle(o)?))).collect();
        let (mine, kvzip): (Vec<&Heads>, Vec<(u64, Vec<u32>)>) = mine.into_iter().unzip();
        let both = sum_heads(mine.iter().map(|h| &h.both));
        let kept = sum_heads(mine.iter().map(|h| &h.kept));
        let (oracle, positions) = (sum_heads(kvzip.iter().map(|k| &k.1)), positions(&kvzip));
        let recall = |o: usize| (oracle[o] > 0).then(|| both[o] as f64 / oracle[o] as f64);
        MethodHeads {
            method: cell.method,
            recall: grid(layers, kv_heads, recall),
            kept: grid(layers, kv_heads, |o| kept[o] as f64 / positions),
        }
    });
    let (oracle, positions) = (sum_heads(kvzip.iter().map(|k| &k.1)), positions(&kvzip));
    Some(HeadRecall {
        policy: chosen.policy,
        ratio: chosen.ratio.get(),
        kvzip_kept: grid(layers, kv_heads, |o| oracle[o] as f64 / positions),
        methods: methods.collect(),
    })
}

/// The labels of one example, ready to be compared with the scores of any number of methods. A GPU ranks them
/// once and counts there; the host's cores are the faster ones where the scores are theirs.
enum Ranking {
    Host { label: Vec<f32>, positions: usize },
    Device { ranks: HeadRanks, logs_lht: Tensor },
}

impl Ranking {
    fn of(label_lht: &Tensor) -> Result<Self> {
        match label_lht.device() {
            Device::Cpu => Self::host(label_lht),
            _ => Ok(Self::device(label_lht)),
        }
    }

    fn host(label_lht: &Tensor) -> Result<Self> {
        Ok(Self::Host { label: numbers(label_lht)?, positions: label_lht.size()[2] as usize })
    }

    fn device(label_lht: &Tensor) -> Self {
        Self::Device { ranks: HeadRanks::new(&label_lht.flatten(0, 1)), logs_lht: log_scores(label_lht) }
    }

    /// # Errors
    /// The scores have another shape than the labels, or the device fails.
    fn correlations(&self, method: MethodName, scores_lht: &Tensor) -> Result<Ranks> {
        match self {
            Self::Host { label, positions } => {
                Ok(rank_correlation(method, &numbers(scores_lht)?, label, *positions))
            }
            Self::Device { ranks, logs_lht } => {
                let (spearman, kendall) = HeadRanks::new(&scores_lht.flatten(0, 1)).coefficients(ranks)?;
                let compared = match is_oracle(method) {
                    // Rounded as the host's logarithms are.
                    true => log_scores(&scores_lht.to_kind(Kind::Float)).to_kind(Kind::Float),
                    false => scores_lht.to_kind(Kind::Float),
                };
                let log_r2 = log_r2_of(&compared, logs_lht)?;
                Ok(Ranks { spearman: mean(&spearman), kendall: mean(&kendall), log_r2 })
            }
        }
    }
}

/// Mean over heads of `positions` numbers each; heads are shared out to all cores, because Kendall's
/// tau of 256 heads of 32k positions takes seconds.
fn rank_correlation(method: MethodName, scores: &[f32], label: &[f32], positions: usize) -> Ranks {
    let heads: Vec<(&[f32], &[f32])> = scores.chunks(positions).zip(label.chunks(positions)).collect();
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(heads.len().max(1));
    let of = |share: &[(&[f32], &[f32])]| -> Vec<(f64, f64)> {
        share.iter().map(|(a, b)| (spearman(a, b), kendall_tau_b(a, b))).collect()
    };
    let all: Vec<(f64, f64)> = std::thread::scope(|scope| {
        let shares = heads.chunks(heads.len().div_ceil(workers).max(1));
        let handles: Vec<_> = shares.map(|share| scope.spawn(move || of(share))).collect();
        handles.into_iter().flat_map(|h| h.join().expect("rank correlations do not panic")).collect()
    });
    let (spearman, kendall): (Vec<f64>, Vec<f64>) = all.into_iter().unzip();
    Ranks {
        spearman: mean(&spearman),
        kendall: mean(&kendall),
        log_r2: log_r2(&in_logs(method, scores), label),
    }
}

/// An oracle's scores are attention weights, as the labels are: their logarithms are compared. Other methods'
/// scores have scales of their own.
fn in_logs(method: MethodName, scores: &[f32]) -> Cow<'_, [f32]> {
    match is_oracle(method) {
        true => scores.iter().map(|s| s.ln().max(LOG_FLOOR as f32)).collect(),
        false => scores.into(),
    }
}

fn is_oracle(method: MethodName) -> bool {
    methods::find(method).is_some_and(Method::is_oracle)
}

/// All numbers in order, on the CPU.
fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_kind(Kind::Float).to_device(Device::Cpu).contiguous().view(-1).try_into()?)
}

/// True entries of each head of a mask `[layers, KV heads, positions]`, flat.
fn per_head(mask_lht: &Tensor) -> Result<Vec<u32>> {
    let counts = mask_lht.sum_dim_intlist(-1, false, Kind::Int64).flatten(0, -1);
    Ok(Vec::<i64>::try_from(counts)?.into_iter().map(|n| n as u32).collect())
}

fn sum_heads<'a>(counts: impl Iterator<Item = &'a Vec<u32>>) -> Vec<u64> {
    let mut total: Vec<u64> = Vec::new();
    for heads in counts {
        total.resize(heads.len(), 0);
        total.iter_mut().zip(heads).for_each(|(sum, &n)| *sum += u64::from(n));
    }
    total
}

fn grid<T>(layers: usize, kv_heads: usize, value: impl Fn(usize) -> T) -> Vec<Vec<T>> {
    (0..layers).map(|l| (0..kv_heads).map(|h| value(l * kv_heads + h)).collect()).collect()
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::Seed;
    use pkv_prune::metrics::KeptAgreement;

    fn section() -> EvalSection {
        EvalSection {
            methods: vec![MethodName::KVZIP, MethodName::RANDOM],
            policies: vec![Policy::Pair, Policy::Token],
            ratios: vec![0.5, 0.25],
            ..EvalSection::default()
        }
    }

    #[test]
    fn a_device_ranks_as_the_host_does() {
        use rand::Rng;
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Auto).unwrap();
        let mut rng = Seed(2).stream("ranking", 0);
        // Labels have many ties: those of pairs that no query looks at.
        let mut draw = |n: i32| -> Tensor {
            let all: Vec<f32> = (0..6 * 300).map(|_| rng.random_range(0..n) as f32 / n as f32).collect();
            Tensor::from_slice(&all).view([3, 2, 300])
        };
        let label = draw(40);
        let host = Ranking::host(&label).unwrap();
        let there = Ranking::device(&label.to_device(device));
        let all_alike = label.zeros_like();
        for (method, scores) in [
            (MethodName::KVZIP, &label),
            (MethodName::RANDOM, &draw(1 << 20)),
            (MethodName::SNAPKV, &all_alike),
        ] {
            let expected = host.correlations(method, scores).unwrap();
            let found = there.correlations(method, &scores.to_device(device)).unwrap();
            assert_eq!((found.spearman, found.kendall), (expected.spearman, expected.kendall), "{method}");
            assert_eq!(found.log_r2.is_some(), expected.log_r2.is_some(), "{method}");
            let off = found.log_r2.unwrap_or(0.0) - expected.log_r2.unwrap_or(0.0);
            assert!(off.abs() < 1e-9, "{method}: {found:?}, expected {expected:?}");
        }
        assert!(there.correlations(MethodName::RANDOM, &label.to_device(device).narrow(2, 0, 9)).is_err());
    }

    #[test]
    fn the_oracle_agrees_with_itself_and_a_reversed_ranking_does_not() {
        // 2 layers, 1 KV head, 4 positions; layer 0 is stronger throughout.
        let label = Tensor::from_slice(&[0.9f32, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1]).view([2, 1, 4]);
        let scored = [
            Scored { method: MethodName::KVZIP, scores_lht: label.shallow_clone() },
            Scored { method: MethodName::RANDOM, scores_lht: -&label },
        ];
        let plan = LabelPlan::new(&section()).unwrap();
        let outcome = plan.compare("a".to_owned(), &plan.cells, &scored, &label, None).unwrap();
        // Measured in two parts, it is the same.
        let mut parts = plan.compare("a".to_owned(), &plan.cells[..3], &scored, &label, None).unwrap();
        parts.add(plan.compare("a".to_owned(), &plan.cells[3..], &scored, &label, None).unwrap());
        assert_eq!(parts, outcome);
        let draws = Draws::new(50, Seed(1));
        let results = summarize(Made::default(), &[(0, outcome), (1, parts)], 2, 1, &draws);
        assert_eq!((results.contexts, results.positions), (2, 8));
        for policy in [Policy::Pair, Policy::Token] {
            for ratio in [0.5, 0.25] {
                let c = results.cell(MethodName::KVZIP, policy, ratio).unwrap();
                assert_eq!((c.recall.mean, c.mass.mean, c.realised), (1.0, 1.0, ratio));
                assert_eq!(results.cell(MethodName::RANDOM, policy, ratio).unwrap().recall.mean, 0.0);
            }
        }
        // Kept by the reversed ranking at half: layer 1, mass 1.0; by KVzip: layer 0, mass 3.0.
        let c = results.cell(MethodName::RANDOM, Policy::Pair, 0.5).unwrap();
        assert!((c.mass.mean - 1.0 / 3.0).abs() < 1e-6);
        assert_eq!((results.ranks[0].spearman, results.ranks[0].kendall), (1.0, 1.0));
        assert_eq!((results.ranks[1].spearman, results.ranks[1].kendall), (-1.0, -1.0));
        // The oracle's logarithms are the labels'; a line downwards is not the logarithm, but near it.
        let r2 = [0, 1].map(|i| results.ranks[i].log_r2.unwrap());
        assert!(r2[0] > 1.0 - 1e-12 && r2[1] > 0.8 && r2[1] < 0.99, "{r2:?}");
        // The heat map is at 0.25, the ratio nearest to 0.05: two pairs, both in layer 0.
        let heads = results.heads.unwrap();
        assert_eq!((heads.policy, heads.ratio), (Policy::Pair, 0.25));
        assert_eq!(heads.kvzip_kept, [[0.5], [0.0]]);
        assert_eq!(heads.methods[0].recall, [[Some(1.0)], [None]]);
        assert_eq!(heads.methods[1].recall, [[Some(0.0)], [None]]);
        assert_eq!(
            (&heads.methods[0].kept, &heads.methods[1].kept),
            (&vec![vec![0.5], vec![0.0]], &vec![vec![0.0], vec![0.5]])
        );
    }

    /// Where KVzip keeps no mass too.
    #[test]
    fn agreement_is_what_validations_measure() {
        let label = Tensor::from_slice(&[0.9f32, 0.0, 0.7, 0.6, 0.4, 0.3, 0.0, 0.1]).view([2, 1, 4]);
        let scores = Tensor::from_slice(&[1f32, 9.0, 3.0, 2.0, 7.0, 7.0, 8.0, 0.0]).view([2, 1, 4]);
        let plan = LabelPlan::new(&section()).unwrap();
        for label in [label.zeros_like(), label] {
            let scored = [
                Scored { method: MethodName::KVZIP, scores_lht: label.shallow_clone() },
                Scored { method: MethodName::RANDOM, scores_lht: scores.shallow_clone() },
            ];
            let outcome = plan.compare("a".to_owned(), &plan.cells, &scored, &label, None).unwrap();
            for cell in &plan.cells {
                let found = outcome.cells.get(cell).unwrap();
                let scores = &scored.iter().find(|s| s.method == cell.method).unwrap().scores_lht;
                let expected = KeptAgreement::new(scores, &label, &label, cell.policy, cell.ratio).unwrap();
                assert_eq!(
                    (found.recall, found.realised),
                    (expected.recall, expected.realised_ratio),
                    "{cell:?}"
                );
                let off = found.mass - expected.mass_of_oracle;
                assert!(off.abs() < 1e-12, "{cell:?}: {} and {expected:?}", found.mass);
            }
        }
    }
}
