//! `[eval.benchmark]`: settings of the benchmark suites that `eval.tasks` names.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which tasks of each benchmark, how many examples, how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchmarkSection {
    /// Data manifest of the benchmarks' files. RULER's sources are `essays`, `squad`, `hotpotqa` and `words`;
    /// any other suite's source has the suite's name. Empty: none, which leaves RULER's tasks that need no
    /// file.
    pub manifest: String,
    /// Maximum number of examples of each task.
    pub examples: usize,
    /// Tokens of a RULER example, chat template and room for the answer included.
    pub ruler_tokens: usize,
    /// RULER's tasks; empty: all whose sources the manifest has.
    pub ruler_tasks: Vec<String>,
    /// LongBench's tasks; empty: all whose files there are.
    pub longbench_tasks: Vec<String>,
    /// SCBench's tasks; empty: all whose files there are.
    pub scbench_tasks: Vec<String>,
    /// Whether the questions of one SCBench context form a conversation.
    pub scbench_mode: SharedContext,
    /// Longest prompt of suites that read files, in tokens; of longer ones the middle is cut out. 31,500 is
    /// LongBench's own limit for models of 32k.
    pub prompt_tokens: usize,
    /// Maximum number of tokens of an answer; 0: each benchmark's own limit. A lower limit saves time on
    /// models that do not stop, and cuts longer answers.
    pub answer_tokens: usize,
}

/// How the questions of one SCBench context hang together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SharedContext {
    /// A conversation: each turn follows the earlier turns with their right answers.
    #[default]
    MultiTurn,
    /// Each question is asked of the context alone.
    MultiRequest,
}

impl Default for BenchmarkSection {
    fn default() -> Self {
        Self {
            manifest: String::new(),
            examples: 100,
            ruler_tokens: 4096,
            ruler_tasks: Vec::new(),
            longbench_tasks: Vec::new(),
            scbench_tasks: Vec::new(),
            scbench_mode: SharedContext::MultiTurn,
            prompt_tokens: 31_500,
            answer_tokens: 0,
        }
    }
}

impl BenchmarkSection {
    /// The list of a suite; empty where it has none.
    pub(crate) fn list(&self, suite: &str) -> &[String] {
        match suite {
            "ruler" => &self.ruler_tasks,
            "longbench" => &self.longbench_tasks,
            "scbench" => &self.scbench_tasks,
            _ => &[],
        }
    }

    /// The lists of the suites that have one; `eval.tasks` names single tasks of others.
    pub(crate) fn lists(&mut self) -> [(&'static str, &mut Vec<String>); 3] {
        [
            ("ruler", &mut self.ruler_tasks),
            ("longbench", &mut self.longbench_tasks),
            ("scbench", &mut self.scbench_tasks),
        ]
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (name, n) in [
            ("examples", self.examples),
            ("ruler_tokens", self.ruler_tokens),
            ("prompt_tokens", self.prompt_tokens),
        ] {
            ensure!(n > 0, "`eval.benchmark.{name}` is 0");
        }
        Ok(())
    }
}
