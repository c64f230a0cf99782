//! Several evaluations side by side: the mappers of runs that share their target.
//!
//! Every run keeps the numbers of its own contexts. Differences from the first run are taken over the
//! contexts that both answered, drawn together (paired bootstrap): contexts differ more from each other
//! than mappers do, and that part cancels. A context is the same if its tokens are, and its questions.
//! How it looks is left to [`text`] and to the report.

mod answers;
mod numbers;
mod run;
#[cfg(test)]
mod tests;
mod text;

use anyhow::{Result, bail, ensure};
use pkv_core::{Policy, Seed, hinted};
use pkv_recipe::MethodName;
use serde::Serialize;
use serde_json::Value;

use crate::results::{Interval, Results};

pub use answers::{Answers, ContextScores};
pub use numbers::mapper_lead;
pub use run::Run;
pub use text::{one_ratio, text, value_text, verdict};

/// Ratio of the tables that show one, or the nearest that was measured.
const ONE_RATIO: f64 = 0.05;

/// Results of a comparison. Lists by run are in the order of `runs`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub target: String,
    pub policy: Policy,
    pub runs: Vec<RunName>,
    /// Caveats for the reader.
    pub notes: Vec<String>,
    /// Share of questions answered: the mean over `tasks`, each counting alike.
    pub answers: Option<Metric>,
    /// Answers over those of KVzip, of the same run and budget.
    pub recovered: Option<Metric>,
    /// Recall of KVzip's kept set over the test split.
    pub recall: Option<Metric>,
    /// Every task that all runs answered.
    pub tasks: Vec<TaskScores>,
    pub budgets: Option<Budgets>,
    /// Keys of the recipes that are not the same in all runs.
    pub recipe: Vec<RecipeKey>,
    /// Those that are, for a page that can hide them.
    #[serde(skip)]
    pub same: Vec<RecipeKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RunName {
    pub name: String,
    pub folder: String,
    /// Absent if its mapper reads none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Origin of its mapper, in words.
    pub mapper: String,
}

/// One number of every run at every ratio.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metric {
    /// From the most kept to the least.
    pub ratios: Vec<f64>,
    /// Contexts that each run's own numbers are of.
    pub contexts: Vec<usize>,
    /// By run, then by ratio.
    pub runs: Vec<Vec<Interval>>,
    /// References of the first run: the full cache and KVzip's own scores.
    pub references: Vec<Reference>,
    /// Later runs minus the first; one less than there are runs, none if they cannot be taken.
    pub differences: Vec<Difference>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reference {
    pub name: String,
    pub values: Vec<Interval>,
}

/// A run minus the first one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Place in `runs`.
    pub run: usize,
    /// Contexts that both answered: all that this is about.
    pub contexts: usize,
    /// By ratio, with the interval of a paired bootstrap.
    pub values: Vec<Interval>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskScores {
    pub task: String,
    pub metric: Metric,
}

/// Distribution of a budget over the target's layers, by mapper.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budgets {
    pub policy: Policy,
    pub ratio: f64,
    /// By layer: share of its KV pairs that KVzip keeps, by the labels of the first run.
    pub kvzip: Vec<f64>,
    /// The same of each run's mapper; absent in results of earlier versions.
    pub runs: Vec<Option<Vec<f64>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecipeKey {
    pub key: String,
    /// By run; null where the key is absent.
    pub values: Vec<Value>,
}

/// Put `runs` side by side.
///
/// # Errors
/// They are fewer than two, of different targets, or share neither ratios nor contexts.
pub fn compare(runs: &[Run]) -> Result<Comparison> {
    ensure!(
        runs.len() > 1,
        hinted("there is nothing to compare with a single run", "name two run folders or more")
    );
    let first = &runs[0];
    for run in &runs[1..] {
        check_target(first, run)?;
    }
    let policy = common_policy(runs)?;
    let mut notes = Vec::new();
    let (same, recipe): (Vec<_>, Vec<_>) = run::settings(runs).into_iter().partition(RecipeKey::is_same);
    let recall = numbers::recall(runs, policy, &mut notes);
    let tasks = numbers::tasks(runs, policy, &mut notes);
    let (answers, recovered) = numbers::answers(runs, &tasks, policy, &mut notes);
    let differences = || [&recall, &answers].into_iter().flatten().flat_map(|m| &m.differences);
    for (k, run) in runs.iter().enumerate().skip(1) {
        // Without identities nothing is known about the data; a note says so.
        let known = differences().any(|d| d.run == k);
        if known && differences().filter(|d| d.run == k).all(|d| d.contexts == 0) {
            bail!(hinted(
                format!(
                    "cannot compare `{}` with `{}`: they were evaluated on different data and share no context",
                    run.name, first.name
                ),
                "evaluate both on the same documents: the keys of `data`, `seed` and `eval` that decide about the contexts \
                 must be alike (`proxykv-train plan --resolved` prints them)"
            ));
        }
    }
    ensure!(
        recall.is_some() || answers.is_some(),
        hinted(
            "the runs were evaluated at different retention ratios or on different tasks",
            "evaluate them with the same `eval.ratios`, `eval.answer_ratios` and `eval.tasks`"
        )
    );
    for task in &tasks {
        for d in task.metric.differences.iter().filter(|d| d.contexts == 0) {
            let shares =
                |t: &TaskScores| t.metric.differences.iter().any(|o| o.run == d.run && o.contexts > 0);
            let what = if tasks.iter().any(shares) {
                "its difference is that of the other tasks"
            } else {
                "their answers are to different questions"
            };
            notes.push(format!(
                "`{}` shares no context of `{}` with `{}`: {what}.",
                runs[d.run].name, task.task, first.name
            ));
        }
    }
    warn_of_choices(&recipe, &mut notes);
    Ok(Comparison {
        target: first.results.target.name.clone(),
        policy,
        runs: runs.iter().map(Run::named).collect(),
        notes,
        answers,
        recovered,
        recall,
        tasks,
        budgets: numbers::budgets(runs),
        recipe,
        same,
    })
}

impl RecipeKey {
    fn is_same(&self) -> bool {
        self.values.iter().all(|v| *v == self.values[0])
    }
}

/// Numbers of different targets have nothing in common.
fn check_target(first: &Run, run: &Run) -> Result<()> {
    let (a, b) = (&first.results.target, &run.results.target);
    let words = |t: &crate::ModelName, revision: &Option<String>| {
        let at = revision.as_ref().map_or_else(String::new, |r| format!(" at revision `{r}`"));
        format!("`{}`{at} ({} layers x {} KV heads)", t.name, t.layers, t.kv_heads)
    };
    let same_revision = match (&first.revision, &run.revision) {
        // One folder under two paths has one hash; a hub name and its local copy may differ in the name
        // alone.
        (Some(x), Some(y)) => x == y,
        _ => a.name == b.name,
    };
    ensure!(
        same_revision && (a.layers, a.kv_heads) == (b.layers, b.kv_heads),
        hinted(
            format!(
                "cannot compare `{}` with `{}`: its target is {}, expected {}",
                run.name,
                first.name,
                words(b, &run.revision),
                words(a, &first.revision)
            ),
            "compare runs that prune the cache of one target"
        )
    );
    Ok(())
}

/// The first policy under which every mapper was measured, by answers if all have them.
fn common_policy(runs: &[Run]) -> Result<Policy> {
    for run in runs {
        ensure!(
            run.results.labels.cells.iter().any(|c| c.method == MethodName::MAPPER),
            hinted(
                format!("run `{}` (`{}`) was evaluated without its mapper", run.name, run.folder.display()),
                "name `mapper` in `eval.methods` and run `proxykv-train eval` again"
            )
        );
    }
    let answered = |r: &Results, p| {
        let facts = r.facts.iter().flat_map(|f| &f.cells).map(|c| (c.method, c.policy));
        let benchmarks = r.benchmarks.iter().flat_map(|b| &b.cells).map(|c| (c.method, c.policy));
        facts.chain(benchmarks).any(|cell| cell == (MethodName::MAPPER, p))
    };
    let labelled =
        |r: &Results, p| r.labels.cells.iter().any(|c| (c.method, c.policy) == (MethodName::MAPPER, p));
    let all = |has: &dyn Fn(&Results, Policy) -> bool| {
        // What `infer` uses by default comes first.
        let mut policies = std::iter::once(Policy::PairKeydiff).chain(Policy::ALL);
        policies.find(|&p| runs.iter().all(|r| has(&r.results, p)))
    };
    match all(&answered).or_else(|| all(&labelled)) {
        Some(policy) => Ok(policy),
        None => bail!(hinted(
            "the runs were evaluated under different policies",
            "evaluate them with the same `eval.policies` and `eval.answer_policies`"
        )),
    }
}

/// Choices that make numbers mean different things in different runs.
fn warn_of_choices(recipe: &[RecipeKey], notes: &mut Vec<String>) {
    let differs = |prefix: &str| recipe.iter().any(|k| k.key.starts_with(prefix));
    if differs("label.") {
        notes.push(
            "The runs' labels were made with different choices: each mapper's recall and recovered accuracy are relative \
             to its own KVzip scores."
                .to_owned(),
        );
    }
    for key in ["eval.answer_match", "eval.max_answer_tokens"] {
        if differs(key) {
            notes
                .push(format!("`{key}` differs: an answer that counts in one run may not count in another."));
        }
    }
}

/// The seed and number of resamples of a run's own intervals.
fn draws(run: &Run) -> (Seed, usize) {
    // Every later command writes its recipe into `run.json`; results of earlier versions say nothing of their
    // own.
    let of_recipe = || run.recipe.pointer("/eval/bootstrap").and_then(Value::as_u64).unwrap_or(1000);
    let resamples = run.results.bootstrap.map_or_else(of_recipe, |n| n as u64);
    (Seed(run.results.seed), resamples as usize)
}
