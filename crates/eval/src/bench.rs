//! The tasks of standard benchmarks that an evaluation is given: RULER, LongBench, SCBench.

use anyhow::Result;
use pkv_tasks::Example;

/// Makes example number `index` of a task; the same one whenever it is asked for.
pub type MakeExample<'a> = Box<dyn Fn(usize) -> Result<Example> + 'a>;

/// One task of a benchmark, its examples made when they are needed.
pub struct Benchmark<'a> {
    /// `ruler`, `longbench` or `scbench`.
    pub suite: &'static str,
    /// The task's name in its suite.
    pub task: String,
    pub examples: usize,
    pub example: MakeExample<'a>,
    /// Longest prompt in tokens; of longer ones the middle is cut out. `None` where examples have their length.
    pub prompt_tokens: Option<usize>,
    /// What the examples depend on beside their number: settings, files, versions. Outcomes are kept by it.
    pub identity: String,
}
