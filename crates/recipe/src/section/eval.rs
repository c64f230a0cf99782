//! `[eval]`: what a mapper is measured on.

use anyhow::{Context, Result, ensure};
use pkv_core::{Policy, RetentionRatio, hinted};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::benchmark::BenchmarkSection;
use crate::method::MethodName;
use crate::task::TaskName;

/// Metrics, tasks, methods, ratios and policies of the evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Retention ratios of the metrics against labels. 0.125, 0.0625 and 0.03125 are the compressions by 8,
    /// 16 and 32 that others report.
    pub ratios: Vec<f64>,
    /// Retention ratios of the tasks. On the nano and tiny pairs nothing separates the methods above 10%
    /// kept.
    pub answer_ratios: Vec<f64>,
    /// Policies of the metrics against labels.
    pub policies: Vec<Policy>,
    /// Policies of the tasks; tables show the first one first. `pair-keydiff` is what `infer` uses by
    /// default: on the real pair it answers 4 to 35 points more than `pair` at the same ratio.
    pub answer_policies: Vec<Policy>,
    /// Methods that score KV pairs.
    pub methods: Vec<MethodName>,
    /// What is asked of the pruned caches: `facts`, `perplexity`, suites such as `ruler`, single tasks such
    /// as `ruler/vt`.
    pub tasks: Vec<TaskName>,
    /// Contexts of the `facts` task, and at most as many test examples for `perplexity`.
    pub contexts: usize,
    /// Tokens of each context of the `facts` task.
    pub context_tokens: usize,
    /// Facts planted in each context; each is asked.
    pub facts_per_context: usize,
    /// When an answer counts as right.
    pub answer_match: AnswerMatch,
    /// Maximum number of tokens of an answer.
    pub max_answer_tokens: usize,
    /// Newest tokens of a context that are kept in every KV head of a pruned cache, regardless of their
    /// scores and within the budget; they count as kept. Metrics against labels are of the scores alone.
    #[serde(skip_serializing_if = "is_none")]
    #[schemars(extend("default" = 0))]
    pub keep_recent: usize,
    /// Tokens of the continuation scored by the `perplexity` task.
    pub continuation_tokens: usize,
    /// Resamples of the bootstrap over contexts.
    pub bootstrap: usize,
    /// Settings of the benchmark tasks.
    pub benchmark: BenchmarkSection,
}

/// When an answer to a planted fact counts as right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AnswerMatch {
    /// Greedy decoding gives the answer's tokens and then stops: for models trained to answer so.
    #[default]
    Exact,
    /// The decoded text contains the answer, letter case aside, as RULER scores: for chat models, which
    /// answer in sentences. Give `max_answer_tokens` room for one.
    Contains,
}

/// What is measured without being named: the mapper, KVzip, and the baselines that cost little beside a
/// context's own reading. KVzap's scorers prefill the target on up to 512 training contexts first, which on a
/// real pair is a part of what the labels cost. A longer list makes finished evaluations of recipes without a
/// list stale.
const DEFAULT_METHODS: [MethodName; 10] = [
    MethodName::MAPPER,
    MethodName::KVZIP,
    MethodName::of("kvzip-pooled"),
    MethodName::LINEAR,
    MethodName::of("proxy-linear"),
    MethodName::of("iam"),
    MethodName::HEAD_PRIOR,
    MethodName::of("streaming-llm"),
    MethodName::SNAPKV,
    MethodName::RANDOM,
];

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            ratios: vec![0.5, 0.3, 0.2, 0.125, 0.1, 0.0625, 0.05, 0.03125, 0.03, 0.02, 0.01],
            answer_ratios: vec![0.2, 0.125, 0.1, 0.0625, 0.05, 0.03125, 0.03, 0.02, 0.01],
            policies: Policy::WITHOUT_KEYS.to_vec(),
            answer_policies: vec![Policy::PairKeydiff, Policy::Pair, Policy::PairUniform],
            methods: DEFAULT_METHODS.to_vec(),
            tasks: vec![TaskName::FACTS, TaskName::PERPLEXITY],
            contexts: 60,
            context_tokens: 1400,
            facts_per_context: 8,
            answer_match: AnswerMatch::Exact,
            max_answer_tokens: 24,
            keep_recent: 0,
            continuation_tokens: 64,
            bootstrap: 2000,
            benchmark: BenchmarkSection::default(),
        }
    }
}

/// Fingerprints from before there was a choice say nothing of it.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_none(keep_recent: &usize) -> bool {
    *keep_recent == 0
}

impl EvalSection {
    /// The single tasks of a suite that are asked for, none for all of them; `None` if the suite is not asked
    /// for.
    pub fn named(&self, suite: &str) -> Option<Vec<&str>> {
        let of_suite = || self.tasks.iter().map(TaskName::parts).filter(|(of, _)| *of == suite);
        of_suite().next()?;
        let listed = self.benchmark.list(suite).iter().map(String::as_str);
        Some(of_suite().filter_map(|(_, single)| single).chain(listed).collect())
    }

    /// Single tasks of a suite with a list in `eval.benchmark` go there: both spellings are one recipe.
    pub(crate) fn settle(&mut self) {
        for (suite, list) in self.benchmark.lists() {
            let single =
                |task: &TaskName| Some(task.parts()).filter(|(of, _)| *of == suite)?.1.map(str::to_owned);
            let singles: Vec<String> = self.tasks.iter().filter_map(single).collect();
            if singles.is_empty() {
                continue;
            }
            *list = singles;
            let mut seen = false;
            self.tasks.retain_mut(|task| {
                if task.parts().0 != suite {
                    return true;
                }
                *task = TaskName::of(suite);
                !std::mem::replace(&mut seen, true)
            });
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_ratios("eval.ratios", &self.ratios)?;
        check_ratios("eval.answer_ratios", &self.answer_ratios)?;
        self.benchmark.check()?;
        ensure!(!self.policies.is_empty(), "`eval.policies` is empty");
        ensure!(!self.methods.is_empty(), "`eval.methods` is empty");
        for (i, name) in self.methods.iter().enumerate() {
            ensure!(
                !self.methods[..i].contains(name),
                hinted(format!("`eval.methods` names `{name}` twice"), "name each method once")
            );
        }
        for (name, policies) in [("policies", &self.policies), ("answer_policies", &self.answer_policies)] {
            for (i, policy) in policies.iter().enumerate() {
                ensure!(
                    !policies[..i].contains(policy),
                    hinted(format!("`eval.{name}` names `{}` twice", policy.name()), "name each policy once")
                );
            }
        }
        if let Some(policy) = self.policies.iter().find(|policy| policy.needs_keys()) {
            return Err(hinted(
                format!("`eval.policies` names `{}`, which needs keys; labels have none", policy.name()),
                "`eval.answer_policies` takes it",
            )
            .into());
        }
        for (name, n) in [
            ("max_answer_tokens", self.max_answer_tokens),
            ("continuation_tokens", self.continuation_tokens),
            ("bootstrap", self.bootstrap),
        ] {
            ensure!(n > 0, "`eval.{name}` is 0");
        }
        if self.tasks.contains(&TaskName::FACTS) {
            ensure!(self.contexts > 0, "`eval.contexts` is 0, but `eval.tasks` asks for `facts`");
            ensure!(
                self.facts_per_context > 0,
                "`eval.facts_per_context` is 0, but `eval.tasks` asks for `facts`"
            );
            ensure!(
                self.context_tokens >= 40 * self.facts_per_context,
                "`eval.context_tokens` is {}; {} facts need at least {}",
                self.context_tokens,
                self.facts_per_context,
                40 * self.facts_per_context
            );
        }
        Ok(())
    }
}

/// Every entry a retention ratio, and at least one.
pub(crate) fn check_ratios(key: &str, ratios: &[f64]) -> Result<()> {
    ensure!(!ratios.is_empty(), "`{key}` is empty");
    for (i, &r) in ratios.iter().enumerate() {
        RetentionRatio::new(r)
            .map_err(|e| hinted(format!("`{key}[{i}]`: {e}"), e.hint()))
            .context("a ratio is out of range")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(tasks: &[&str], ruler: &[&str]) -> EvalSection {
        let mut section =
            EvalSection { tasks: tasks.iter().map(|t| TaskName::new(t)).collect(), ..EvalSection::default() };
        section.benchmark.ruler_tasks = ruler.iter().map(|t| (*t).to_owned()).collect();
        section.settle();
        section
    }

    #[test]
    fn both_spellings_of_single_tasks_are_one_recipe() {
        let listed = settled(&["facts", "ruler"], &["vt", "cwe"]);
        let single = settled(&["facts", "ruler/vt", "ruler/cwe"], &["qa_1"]);
        assert_eq!(single, listed);
        assert_eq!(serde_json::to_string(&single).unwrap(), serde_json::to_string(&listed).unwrap());
        assert_eq!(listed.named("ruler").unwrap(), ["vt", "cwe"]);
        assert_eq!(settled(&["ruler"], &["vt"]).named("ruler").unwrap(), ["vt"], "the recipe's list stays");
        // A suite without a list of its own keeps them in `tasks`.
        let other = settled(&["toy/a", "toy/b", "facts"], &["vt"]);
        assert_eq!((other.tasks.len(), other.named("toy").unwrap()), (3, vec!["a", "b"]));
        assert_eq!((other.named("ruler"), other.named("facts").unwrap().len()), (None, 0));
    }
}
