//! The numbers of a comparison: each run's own, and paired differences from the first.

use std::collections::HashMap;

use pkv_core::{Policy, Seed};
use pkv_recipe::MethodName;

use super::answers::{Answers, ContextScores};
use super::{Budgets, Difference, Metric, Reference, Run, TaskScores, draws};
use crate::bootstrap::{Bootstrap, Draws, interval};
use crate::results::{Interval, KVZIP_ANSWERS};
use crate::table::trimmed;

/// One side of a context: its score, and what it is divided by.
struct Scores {
    above: Vec<f64>,
    below: Vec<f64>,
}

/// Contexts of one task, in the order of a bootstrap's draws.
struct Group {
    bootstrap: Bootstrap,
    scores: Scores,
}

/// Mean over groups of their ratios, with its value in every resample.
fn mean_of(groups: &[Group]) -> Option<(f64, Vec<f64>)> {
    let n = groups.len() as f64;
    let mut mean = 0.0;
    let mut resampled: Vec<f64> = Vec::new();
    for g in groups {
        let below: f64 = g.scores.below.iter().sum();
        if below == 0.0 {
            return None;
        }
        mean += g.scores.above.iter().sum::<f64>() / below / n;
        let own = g.bootstrap.resampled(&g.scores.above, &g.scores.below);
        match resampled.is_empty() {
            true => resampled = own.iter().map(|v| v / n).collect(),
            false => resampled.iter_mut().zip(own).for_each(|(sum, v)| *sum += v / n),
        }
    }
    (!groups.is_empty()).then_some((mean, resampled))
}

fn summed(groups: &[Group]) -> Option<Interval> {
    let (mean, resampled) = mean_of(groups)?;
    Some(interval(mean, resampled.into_iter().filter(|v| v.is_finite()).collect()))
}

/// Draws of task number `task`: those of an evaluation for the first, others for the rest, which are
/// independent.
fn bootstrap(run: &Run, task: usize, contexts: usize) -> Bootstrap {
    let (seed, resamples) = draws(run);
    Bootstrap::new(contexts, resamples, Seed(seed.0.wrapping_add(task as u64)))
}

/// A column of those of `contexts` that have it; `None` if none has.
fn column(contexts: &[ContextScores], of: impl Fn(&ContextScores) -> Option<f64>) -> Option<Scores> {
    let (above, below): (Vec<f64>, Vec<f64>) =
        contexts.iter().filter_map(|c| Some((of(c)?, c.weight))).unzip();
    (!above.is_empty()).then_some(Scores { above, below })
}

/// Contexts that two runs share, by their identities; one that occurs twice pairs twice.
fn pairs<'a>(
    a: &'a [ContextScores],
    b: &'a [ContextScores],
) -> Option<Vec<(&'a ContextScores, &'a ContextScores)>> {
    if a.iter().chain(b).any(|c| c.id.is_none()) {
        return None;
    }
    let mut places: HashMap<&str, Vec<&ContextScores>> = HashMap::new();
    for c in b.iter().rev() {
        places.entry(c.id.as_deref().unwrap_or_default()).or_default().push(c);
    }
    let pair = |c: &'a ContextScores| {
        Some((c, places.get_mut(c.id.as_deref().unwrap_or_default())?.pop()?))
            .filter(|(x, y)| x.weight == y.weight)
    };
    Some(a.iter().filter_map(pair).collect())
}

/// Outcomes of a run's contexts, by task.
type Tasks<'a> = Vec<&'a [ContextScores]>;

/// Ratios of the mapper that all runs have, from the most kept to the least.
fn common_ratios<'a>(runs: &[&'a [ContextScores]], policy: Policy) -> Vec<f64> {
    let of = |contexts: &'a [ContextScores]| -> Vec<f64> {
        let cells = contexts.iter().flat_map(|c| &c.cells);
        let mut ratios: Vec<f64> =
            cells.filter(|c| (c.0, c.1) == (MethodName::MAPPER, policy)).map(|c| c.2).collect();
        ratios.sort_by(|a, b| b.total_cmp(a));
        ratios.dedup();
        ratios
    };
    let Some((first, rest)) = runs.split_first() else { return Vec::new() };
    let mut ratios = of(first);
    ratios.retain(|r| rest.iter().all(|c| of(c).contains(r)));
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios
}

/// Some tasks of all runs, at the ratios that they share.
struct Of<'a> {
    runs: &'a [Run],
    /// By run.
    tasks: Vec<Tasks<'a>>,
    policy: Policy,
    ratios: Vec<f64>,
}

impl Of<'_> {
    fn own(&self, run: usize, of: impl Fn(&ContextScores) -> Option<f64>) -> Option<Vec<Group>> {
        let group = |(t, contexts): (usize, &&[ContextScores])| {
            let scores = column(contexts, &of)?;
            Some(Group { bootstrap: bootstrap(&self.runs[run], t, scores.above.len()), scores })
        };
        self.tasks[run].iter().enumerate().map(group).collect()
    }

    fn reference(&self, name: &str, of: impl Fn(&ContextScores, f64) -> Option<f64>) -> Option<Reference> {
        let one = |&r: &f64| summed(&self.own(0, |c| of(c, r))?);
        let values = self.ratios.iter().map(one).collect::<Option<Vec<_>>>()?;
        Some(Reference { name: name.to_owned(), values })
    }

    /// A run minus the first one; `None` where contexts cannot be distinguished.
    fn difference(&self, run: usize) -> Option<Difference> {
        let shared: Vec<_> = self.tasks[0]
            .iter()
            .zip(&self.tasks[run])
            .map(|(a, b)| pairs(a, b))
            .collect::<Option<Vec<_>>>()?;
        let contexts = shared.iter().map(Vec::len).sum();
        let one = |&ratio: &f64| {
            let cell = |c: &ContextScores| c.cell(MethodName::MAPPER, self.policy, ratio);
            // Tasks of which nothing is shared say nothing about the difference.
            let groups =
                shared.iter().enumerate().filter(|(_, pairs)| !pairs.is_empty()).map(|(t, pairs)| {
                    let (above, below): (Vec<f64>, Vec<f64>) =
                        pairs.iter().filter_map(|(a, b)| Some((cell(b)? - cell(a)?, a.weight))).unzip();
                    let draws = bootstrap(&self.runs[0], t, above.len());
                    let scores = Scores { above, below };
                    (!scores.above.is_empty()).then_some(Group { bootstrap: draws, scores })
                });
            summed(&groups.collect::<Option<Vec<_>>>()?)
        };
        let values = match contexts {
            0 => Vec::new(),
            _ => self.ratios.iter().map(one).collect::<Option<Vec<_>>>()?,
        };
        Some(Difference { run, contexts, values })
    }

    fn metric(&self, references: Vec<Reference>) -> Option<Metric> {
        if self.ratios.is_empty() {
            return None;
        }
        let one = |run: usize| -> Option<Vec<Interval>> {
            let at = |&r: &f64| summed(&self.own(run, |c| c.cell(MethodName::MAPPER, self.policy, r))?);
            self.ratios.iter().map(at).collect()
        };
        Some(Metric {
            ratios: self.ratios.clone(),
            contexts: self.contexts(),
            runs: (0..self.runs.len()).map(one).collect::<Option<_>>()?,
            references,
            differences: (1..self.runs.len()).filter_map(|run| self.difference(run)).collect(),
        })
    }

    /// The mapper's mean over KVzip's, at the ratios where KVzip answers a fifth beyond doubt.
    fn recovered(&self, notes: &mut Vec<String>) -> Option<Metric> {
        let one = |run: usize, r: f64| {
            let both = |c: &ContextScores| {
                let of = |method| c.cell(method, self.policy, r);
                Some((of(MethodName::MAPPER)?, of(MethodName::KVZIP)?))
            };
            let (mine, above) = mean_of(&self.own(run, |c| Some(both(c)?.0))?)?;
            let (oracle, below) = mean_of(&self.own(run, |c| Some(both(c)?.1))?)?;
            let ratios = above.iter().zip(&below).map(|(a, b)| a / b).filter(|v| v.is_finite()).collect();
            (interval(oracle, below).low >= KVZIP_ANSWERS).then(|| interval(mine / oracle, ratios))
        };
        let every = |&r: &f64| (0..self.runs.len()).map(|run| one(run, r)).collect::<Option<Vec<_>>>();
        let columns: Vec<(f64, Vec<Interval>)> =
            self.ratios.iter().filter_map(|r| Some((*r, every(r)?))).collect();
        let absent = self.ratios.iter().filter(|r| !columns.iter().any(|c| c.0 == **r));
        let absent: Vec<String> = absent.map(|r| format!("{}%", trimmed(100.0 * r))).collect();
        if !absent.is_empty() {
            notes.push(format!(
                "No recovered accuracy at {} kept: in one of the runs KVzip answers too little there, or was not asked.",
                absent.join(", ")
            ));
        }
        (!columns.is_empty()).then(|| Metric {
            ratios: columns.iter().map(|c| c.0).collect(),
            contexts: self.contexts(),
            runs: (0..self.runs.len()).map(|run| columns.iter().map(|c| c.1[run]).collect()).collect(),
            references: Vec::new(),
            differences: Vec::new(),
        })
    }

    /// Contexts of each run, all tasks together.
    fn contexts(&self) -> Vec<usize> {
        self.tasks.iter().map(|t| t.iter().map(|c| c.len()).sum()).collect()
    }
}

/// Recall of KVzip's kept set: by context where evaluations tell it, else the results' own numbers.
pub fn recall(runs: &[Run], policy: Policy, notes: &mut Vec<String>) -> Option<Metric> {
    let known: Option<Vec<&[ContextScores]>> = runs.iter().map(|r| r.recall.as_deref()).collect();
    if let Some(contexts) = known {
        let ratios = common_ratios(&contexts, policy);
        return Of { runs, tasks: contexts.into_iter().map(|c| vec![c]).collect(), policy, ratios }
            .metric(Vec::new());
    }
    let old: Vec<String> =
        runs.iter().filter(|r| r.recall.is_none()).map(|r| format!("`{}`", r.name)).collect();
    notes.push(format!(
        "No paired differences of recall: the evaluation of {} is of an earlier version and has no numbers by context. \
         `proxykv-train eval --redo eval` writes them.",
        old.join(", ")
    ));
    let of = |r: &Run| -> Vec<f64> {
        let cells = r.results.labels.cells.iter();
        cells.filter(|c| (c.method, c.policy) == (MethodName::MAPPER, policy)).map(|c| c.ratio).collect()
    };
    let mut ratios = of(&runs[0]);
    ratios.retain(|r| runs.iter().all(|run| of(run).contains(r)));
    ratios.sort_by(|a, b| b.total_cmp(a));
    let cell = |run: &Run, r: &f64| Some(run.results.labels.cell(MethodName::MAPPER, policy, *r)?.recall);
    (!ratios.is_empty()).then(|| {
        Some(Metric {
            contexts: runs.iter().map(|r| r.results.labels.contexts).collect(),
            runs: runs
                .iter()
                .map(|run| ratios.iter().map(|r| cell(run, r)).collect())
                .collect::<Option<_>>()?,
            references: Vec::new(),
            differences: Vec::new(),
            ratios,
        })
    })?
}

/// Every task that all runs answered, on its own.
pub fn tasks(runs: &[Run], policy: Policy, notes: &mut Vec<String>) -> Vec<TaskScores> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in runs.iter().flat_map(|r| &r.answers).flat_map(|a| &a.tasks) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut out = Vec::new();
    let mut left_out = Vec::new();
    let mut unpaired = false;
    for name in names {
        let Some(of) = answered(runs, &[name], policy) else {
            left_out.push(format!("`{name}`"));
            continue;
        };
        match of.metric(references(&of)) {
            Some(metric) => {
                unpaired |= metric.differences.len() + 1 < runs.len();
                out.push(TaskScores { task: name.to_owned(), metric });
            }
            None => left_out.push(format!("`{name}`")),
        }
    }
    if !left_out.is_empty() {
        notes.push(format!(
            "Left out, because not every run answered them at a common ratio: {}.",
            left_out.join(", ")
        ));
    }
    if unpaired {
        notes.push(
            "No paired differences of answers for runs whose evaluation is of an earlier version and does not tell contexts \
             apart. `proxykv-train eval --redo eval` writes what is missing."
                .to_owned(),
        );
    }
    out
}

/// Answers over all `tasks` together, and what they recover of KVzip's.
pub fn answers(
    runs: &[Run],
    tasks: &[TaskScores],
    policy: Policy,
    notes: &mut Vec<String>,
) -> (Option<Metric>, Option<Metric>) {
    let names: Vec<&str> = tasks.iter().map(|t| t.task.as_str()).collect();
    let Some(of) = answered(runs, &names, policy) else { return (None, None) };
    (of.metric(references(&of)), of.recovered(notes))
}

fn references(of: &Of) -> Vec<Reference> {
    let kvzip = of.reference(MethodName::KVZIP.name(), |c, r| c.cell(MethodName::KVZIP, of.policy, r));
    of.reference("full cache", |c, _| Some(c.full)).into_iter().chain(kvzip).collect()
}

/// The tasks `names` of every run; `None` if one lacks a task, or there is none.
fn answered<'a>(runs: &'a [Run], names: &[&str], policy: Policy) -> Option<Of<'a>> {
    let of = |run: &'a Run| -> Option<Tasks<'a>> {
        names.iter().map(|n| run.answers.as_ref()?.task(n).filter(|c| !c.is_empty())).collect()
    };
    let tasks: Vec<Tasks> = runs.iter().map(of).collect::<Option<_>>()?;
    let every: Vec<&[ContextScores]> = tasks.iter().flatten().copied().collect();
    (!every.is_empty()).then(|| Of { runs, ratios: common_ratios(&every, policy), tasks, policy })
}

/// Share of each layer's KV pairs that the mappers keep.
pub fn budgets(runs: &[Run]) -> Option<Budgets> {
    let first = runs[0].results.labels.heads.as_ref()?;
    let mean = |rows: &[Vec<f64>]| -> Vec<f64> {
        rows.iter().map(|row| row.iter().sum::<f64>() / row.len().max(1) as f64).collect()
    };
    let of = |run: &Run| {
        let heads = run.results.labels.heads.as_ref()?;
        let mapper = heads.methods.iter().find(|m| m.method == MethodName::MAPPER)?;
        let same = (heads.policy, heads.ratio) == (first.policy, first.ratio) && !mapper.kept.is_empty();
        same.then(|| mean(&mapper.kept))
    };
    Some(Budgets {
        policy: first.policy,
        ratio: first.ratio,
        kvzip: mean(&first.kvzip_kept),
        runs: runs.iter().map(of).collect(),
    })
}

/// How far the mapper leads each other method of one evaluation, paired over its contexts: method, ratio,
/// mapper minus method in shares of the score. The draws are those of the evaluation.
pub fn mapper_lead(
    answers: &Answers,
    task: &str,
    policy: Policy,
    seed: Seed,
    resamples: usize,
) -> Vec<(MethodName, f64, Interval)> {
    let contexts = answers.task(task).unwrap_or_default();
    let draws = Draws::new(resamples, seed);
    let mut rivals: Vec<(MethodName, f64)> = Vec::new();
    for (method, of_policy, ratio, _) in contexts.iter().flat_map(|c| &c.cells) {
        let rival = (*method, *ratio);
        if *method != MethodName::MAPPER && *of_policy == policy && !rivals.contains(&rival) {
            rivals.push(rival);
        }
    }
    let lead = |(method, ratio): (MethodName, f64)| {
        let scores = column(contexts, |c| {
            Some(c.cell(MethodName::MAPPER, policy, ratio)? - c.cell(method, policy, ratio)?)
        })?;
        Some((method, ratio, draws.of(scores.above.len()).ratio(&scores.above, &scores.below)?))
    };
    rivals.into_iter().filter_map(lead).collect()
}
