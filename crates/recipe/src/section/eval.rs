//! `[eval]`: what a mapper is measured on.

use anyhow::{Context, Result, ensure};
use pkv_core::{Policy, RetentionRatio, hinted};
use serde::{Deserialize, Serialize};

use super::benchmark::BenchmarkSection;

/// Metrics, tasks, methods, ratios and policies of the evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Retention ratios of the metrics against labels.
    pub ratios: Vec<f64>,
    /// Retention ratios of the tasks. Above 10% kept, nothing separates the methods.
    pub answer_ratios: Vec<f64>,
    pub policies: Vec<Policy>,
    /// Policies of the tasks.
    pub answer_policies: Vec<Policy>,
    pub methods: Vec<Method>,
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

/// A way to score KV pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The trained mapper.
    Mapper,
    /// KVzip's own scores: the oracle.
    Kvzip,
    /// KVzip's scores, span-pooled as the recipe trains on them.
    KvzipPooled,
    /// KVzap-style ridge regression per layer, from the target's own hidden states.
    KvzapLinear,
    /// The same by a network with one hidden layer.
    KvzapMlp,
    /// Ridge regression from all features.
    Linear,
    /// Ridge regression from the proxy's reconstruction scores (or strongest attention where they are absent).
    ProxyLinear,
    /// IAM-style rigid alignment (arXiv 2507.11953): each target head takes its best proxy head.
    Iam,
    /// Mean training score of each KV head, positions at random.
    HeadPrior,
    /// First and most recent positions.
    StreamingLlm,
    /// Attention of the last queries of the context (window 32, average pool 5).
    Snapkv,
    /// Positions at random.
    Random,
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

impl Method {
    pub const ALL: [Self; 12] = [
        Self::Mapper,
        Self::Kvzip,
        Self::KvzipPooled,
        Self::KvzapLinear,
        Self::KvzapMlp,
        Self::Linear,
        Self::ProxyLinear,
        Self::Iam,
        Self::HeadPrior,
        Self::StreamingLlm,
        Self::Snapkv,
        Self::Random,
    ];

    /// Those that are asked by default: all but KVzap's, which prefill the target on up to 512 training contexts first.
    /// On a real pair that is a part of what the labels cost.
    pub fn default_set() -> Vec<Self> {
        Self::ALL.into_iter().filter(|m| !m.reads_hidden_states()).collect()
    }

    /// Does it learn from the target's hidden states?
    pub const fn reads_hidden_states(self) -> bool {
        matches!(self, Self::KvzapLinear | Self::KvzapMlp)
    }

    /// The name in recipes, tables and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mapper => "mapper",
            Self::Kvzip => "kvzip",
            Self::KvzipPooled => "kvzip-pooled",
            Self::KvzapLinear => "kvzap-linear",
            Self::KvzapMlp => "kvzap-mlp",
            Self::Linear => "linear",
            Self::ProxyLinear => "proxy-linear",
            Self::Iam => "iam",
            Self::HeadPrior => "head-prior",
            Self::StreamingLlm => "streaming-llm",
            Self::Snapkv => "snapkv",
            Self::Random => "random",
        }
    }
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            ratios: vec![0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01],
            answer_ratios: vec![0.2, 0.1, 0.05, 0.03, 0.02, 0.01],
            policies: Policy::ALL.to_vec(),
            answer_policies: vec![Policy::Pair],
            methods: Method::default_set(),
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
