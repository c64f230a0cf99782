//! Predictions against labels: what every method keeps beside what KVzip keeps.
//!
//! Dimension key: l layer, h KV head, o layers x KV heads flattened, t position.

use anyhow::Result;
use pkv_core::{Policy, RetentionRatio};
use pkv_prune::keep_mask;
use pkv_prune::metrics::{kendall_tau_b, mass, realised_ratio, recall, spearman};
use pkv_recipe::{EvalSection, MethodName};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::bootstrap::Bootstrap;
use crate::cell::{Cell, nearest};
use crate::methods::Scored;
use crate::results::{HeadRecall, LabelCell, LabelResults, MethodHeads, RankCell};

/// Ratio of the heat maps, or the nearest one that is measured.
const HEAT_MAP_RATIO: f64 = 0.05;

/// What one test example says; orders as in [`Plan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelOutcome {
    positions: u64,
    cells: Vec<Agreement>,
    ranks: Vec<Ranks>,
    /// KV pairs of each head that KVzip keeps, flat.
    oracle_heads: Vec<u32>,
    /// Per method, how many of them the method keeps too.
    method_heads: Vec<Vec<u32>>,
    /// Per method, how many the method keeps.
    method_kept: Vec<Vec<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Agreement {
    recall: f64,
    mass: f64,
    realised: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Ranks {
    spearman: f64,
    kendall: f64,
}

/// The cells and heat maps that a section asks for.
pub struct Plan {
    methods: Vec<MethodName>,
    policies: Vec<Policy>,
    ratios: Vec<RetentionRatio>,
    heat_map: (Policy, RetentionRatio),
}

impl LabelOutcome {
    /// Recall and mass of each cell.
    pub fn agreement(&self) -> impl Iterator<Item = (f64, f64)> {
        self.cells.iter().map(|c| (c.recall, c.mass))
    }
}

impl Plan {
    /// # Errors
    /// A ratio is out of range or there is none; a recipe that was checked has neither.
    pub fn new(section: &EvalSection) -> Result<Self> {
        let ratios =
            section.ratios.iter().map(|&r| Ok(RetentionRatio::new(r)?)).collect::<Result<Vec<_>>>()?;
        let policy =
            if section.policies.contains(&Policy::Pair) { Policy::Pair } else { section.policies[0] };
        let heat_map = (policy, nearest(&ratios, HEAT_MAP_RATIO));
        Ok(Self { methods: section.methods.clone(), policies: section.policies.clone(), ratios, heat_map })
    }

    /// Every cell, in the order of an outcome's.
    pub fn cells(&self) -> Vec<Cell> {
        Cell::all(&self.methods, &self.policies, &self.ratios)
    }

    /// Compare every method's scores of one example with its labels.
    ///
    /// # Shapes
    /// - `scored`: one per method of the section, in its order, `[layers, KV heads, positions]`
    /// - `label_lht`: KVzip's raw scores, f32 of the same shape
    pub fn compare(&self, scored: &[Scored], label_lht: &Tensor) -> Result<LabelOutcome> {
        let positions = label_lht.size()[2];
        let label = numbers(label_lht)?;
        let oracle: Vec<(Policy, RetentionRatio, Tensor, f64)> = self
            .policies
            .iter()
            .flat_map(|&p| self.ratios.iter().map(move |&r| (p, r)))
            .map(|(p, r)| {
                let keep = keep_mask(label_lht, p, r);
                let kept_mass = mass(label_lht, &keep);
                (p, r, keep, kept_mass)
            })
            .collect();
        let mut cells = Vec::new();
        let mut ranks = Vec::new();
        let mut method_heads = Vec::new();
        let mut method_kept = Vec::new();
        let mut oracle_heads = Vec::new();
        for s in scored {
            for (policy, ratio, oracle_keep, oracle_mass) in &oracle {
                let keep = keep_mask(&s.scores_lht, *policy, *ratio);
                let kept_mass = mass(label_lht, &keep);
                cells.push(Agreement {
                    recall: recall(&keep, oracle_keep),
                    mass: if *oracle_mass > 0.0 { kept_mass / oracle_mass } else { 1.0 },
                    realised: realised_ratio(&keep),
                });
                if (*policy, *ratio) == self.heat_map {
                    oracle_heads = per_head(oracle_keep)?;
                    method_heads.push(per_head(&keep.logical_and(oracle_keep))?);
                    method_kept.push(per_head(&keep)?);
                }
            }
            ranks.push(rank_correlation(&numbers(&s.scores_lht)?, &label, positions as usize));
        }
        Ok(LabelOutcome {
            positions: positions as u64,
            cells,
            ranks,
            oracle_heads,
            method_heads,
            method_kept,
        })
    }

    /// All examples together; `layers` and `kv_heads` give heat maps their form.
    pub fn summarize(
        &self,
        outcomes: &[LabelOutcome],
        layers: usize,
        kv_heads: usize,
        bootstrap: &Bootstrap,
    ) -> LabelResults {
        if outcomes.is_empty() {
            return LabelResults::default();
        }
        let over = |f: &dyn Fn(&LabelOutcome) -> f64| outcomes.iter().map(f).collect::<Vec<f64>>();
        let cells = self.cells().into_iter().enumerate().map(|(i, cell)| LabelCell {
            method: cell.method,
            policy: cell.policy,
            ratio: cell.ratio.get(),
            recall: bootstrap.mean(&over(&|o| o.cells[i].recall)),
            mass: bootstrap.mean(&over(&|o| o.cells[i].mass)),
            realised: mean(&over(&|o| o.cells[i].realised)),
        });
        let ranks = self.methods.iter().enumerate().map(|(i, &method)| RankCell {
            method,
            spearman: mean(&over(&|o| o.ranks[i].spearman)),
            kendall: mean(&over(&|o| o.ranks[i].kendall)),
        });
        let positions: u64 = outcomes.iter().map(|o| o.positions).sum();
        let oracle = sum_heads(outcomes.iter().map(|o| &o.oracle_heads));
        let heads = self.methods.iter().enumerate().map(|(i, &method)| {
            let both = sum_heads(outcomes.iter().map(|o| &o.method_heads[i]));
            let recall = |o: usize| (oracle[o] > 0).then(|| both[o] as f64 / oracle[o] as f64);
            let kept = sum_heads(outcomes.iter().map(|o| &o.method_kept[i]));
            let share = |o: usize| kept[o] as f64 / positions as f64;
            MethodHeads {
                method,
                recall: grid(layers, kv_heads, recall),
                kept: grid(layers, kv_heads, share),
            }
        });
        LabelResults {
            contexts: outcomes.len(),
            positions,
            cells: cells.collect(),
            ranks: ranks.collect(),
            heads: Some(HeadRecall {
                policy: self.heat_map.0,
                ratio: self.heat_map.1.get(),
                kvzip_kept: grid(layers, kv_heads, |o| oracle[o] as f64 / positions as f64),
                methods: heads.collect(),
            }),
        }
    }
}

/// Mean over heads of `positions` numbers each; heads are shared out to all cores, because Kendall's
/// tau of 256 heads of 32k positions takes seconds.
fn rank_correlation(scores: &[f32], label: &[f32], positions: usize) -> Ranks {
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
    Ranks { spearman: mean(&spearman), kendall: mean(&kendall) }
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

    fn section() -> EvalSection {
        EvalSection {
            methods: vec![MethodName::KVZIP, MethodName::RANDOM],
            policies: vec![Policy::Pair, Policy::Token],
            ratios: vec![0.5, 0.25],
            ..EvalSection::default()
        }
    }

    #[test]
    fn the_oracle_agrees_with_itself_and_a_reversed_ranking_does_not() {
        // 2 layers, 1 KV head, 4 positions; layer 0 is stronger throughout.
        let label = Tensor::from_slice(&[0.9f32, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1]).view([2, 1, 4]);
        let scored = [
            Scored { method: MethodName::KVZIP, scores_lht: label.shallow_clone() },
            Scored { method: MethodName::RANDOM, scores_lht: -&label },
        ];
        let plan = Plan::new(&section()).unwrap();
        let outcome = plan.compare(&scored, &label).unwrap();
        let results = plan.summarize(&[outcome.clone(), outcome], 2, 1, &Bootstrap::new(2, 50, Seed(1)));
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
}
