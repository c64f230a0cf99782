//! `[eval]`: what a mapper is measured on.

use anyhow::{Context, Result, ensure};
use pkv_core::{Policy, RetentionRatio, hinted};
use serde::{Deserialize, Serialize};

use super::benchmark::BenchmarkSection;
use crate::method::MethodName;

/// Metrics, tasks, methods, ratios and policies of the evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Retention ratios of the metrics against labels. 0.125, 0.0625 and 0.03125 are the compressions by 8, 16 and 32 that others
    /// report.
    pub ratios: Vec<f64>,
    /// Retention ratios of the tasks. Above 10% kept, nothing separates the methods.
    pub answer_ratios: Vec<f64>,
    pub policies: Vec<Policy>,
    /// Policies of the tasks. On the real pair `pair-floor` answers 3 to 9 points more than `pair` at the same ratio.
    pub answer_policies: Vec<Policy>,
    /// Ways to score KV pairs; which there are, `pkv_eval::methods` knows.
    pub methods: Vec<MethodName>,
    pub tasks: Vec<Task>,
    /// Contexts of the `facts` task, and at most as many test examples for `perplexity`.
    pub contexts: usize,
    /// Tokens of each context of the `facts` task.
    pub context_tokens: usize,
    /// Facts planted in each, every one of them asked.
    pub facts_per_context: usize,
    /// When an answer counts.
    pub answer_match: AnswerMatch,
    /// Tokens that an answer may have.
    pub max_answer_tokens: usize,
    /// Tokens of the continuation scored by the `perplexity` task.
    pub continuation_tokens: usize,
    /// Resamples of the bootstrap over contexts.
    pub bootstrap: usize,
    /// What the benchmark tasks ask.
    pub benchmark: BenchmarkSection,
}

/// A question asked of a pruned cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Facts planted in documents, several questions per context.
    Facts,
    /// The document's continuation after the pruned context.
    Perplexity,
    /// RULER's 13 tasks, generated at any length.
    Ruler,
    /// LongBench's 21 tasks, from its own files.
    Longbench,
    /// SCBench's 12 tasks, from its own files.
    Scbench,
}

/// When an answer to a planted fact counts as right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnswerMatch {
    /// Greedy decoding gives the answer's tokens and then stops: for models trained to answer so.
    #[default]
    Exact,
    /// The decoded text contains the answer, letter case aside, as RULER scores: for chat models, which
    /// answer in sentences. Give `max_answer_tokens` room for one.
    Contains,
}

/// What is measured without being named: the mapper, KVzip, and the baselines that cost little beside a context's own reading.
/// KVzap's scorers prefill the target on up to 512 training contexts first, which on a real pair is a part of what the labels
/// cost. A longer list makes finished evaluations of recipes without a list stale.
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
            policies: Policy::ALL.to_vec(),
            answer_policies: vec![Policy::PairFloor, Policy::Pair, Policy::PairUniform],
            methods: DEFAULT_METHODS.to_vec(),
            tasks: vec![Task::Facts, Task::Perplexity],
            contexts: 60,
            context_tokens: 1400,
            facts_per_context: 8,
            answer_match: AnswerMatch::Exact,
            max_answer_tokens: 24,
            continuation_tokens: 64,
            bootstrap: 2000,
            benchmark: BenchmarkSection::default(),
        }
    }
}

impl EvalSection {
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
        for (name, n) in [
            ("max_answer_tokens", self.max_answer_tokens),
            ("continuation_tokens", self.continuation_tokens),
            ("bootstrap", self.bootstrap),
        ] {
            ensure!(n > 0, "`eval.{name}` is 0");
        }
        if self.tasks.contains(&Task::Facts) {
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
